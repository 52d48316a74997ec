"""The engine end to end on a tiny model: the same tokens however they were computed.

Greedy answers are held against a float64 model without pages or batches, then every way of running
them against the one-by-one run.
"""

import threading

import numpy as np
import pytest

from pallasite.engine import FinishReason, Request, RequestError, SamplingParams
from tests.engine.answers import assert_same_answers
from tests.engine.harness import (
    MAIN,
    ORACLE,
    TIGHT,
    greedy,
    one_by_one,
    random_prompt,
    recorded_plans,
    taken_in_together,
    tokens,
)
from tests.engine.sampler_oracle import log_softmax
from tests.tiny_checkpoints import TINY

EOS = TINY.eos_token_ids[0]
LENGTHS = (1, 2, 15, 16, 17, 31, 64, 65, 100, 129)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(11)
    return [random_prompt(rng, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(engines, prompts):
    """The answers of the one-by-one run."""
    requests = [greedy(prompt, max_tokens=24) for prompt in prompts]
    return one_by_one(engines.get(), requests)


def test_greedy_answers_are_the_float64_models(alone, prompts):
    for prompt, completion in zip(prompts, alone, strict=True):
        ids = (*prompt, *completion.token_ids)
        logits = ORACLE.logits(ids)[len(prompt) - 1 :]
        gaps = logits.max(axis=1)[:-1] - np.take_along_axis(
            logits[:-1], np.asarray(completion.token_ids)[:, None], axis=1
        ).reshape(-1)
        assert gaps.max(initial=0.0) < 1e-4, "each token is the likeliest, to rounding"
        if completion.finish.reason is FinishReason.STOP:
            assert logits[-1].argmax() == EOS
        else:
            assert len(completion.token_ids) == 24
    answers = {completion.token_ids for completion in alone}
    assert len(answers) == len(prompts), "the model's answer depends on its prompt"
    assert len({i for answer in answers for i in answer}) > 40


def test_a_batch_gives_the_tokens_of_the_one_by_one_run(engine, prompts, alone):
    requests = [greedy(prompt, max_tokens=24) for prompt in prompts]
    assert tokens(engine.generate(requests)) == tokens(alone)
    assert tokens(engine.generate(requests[::-1])) == tokens(alone)[::-1]


def test_prompts_in_chunks_give_the_tokens_of_the_one_by_one_run(
    engines, prompts, alone, monkeypatch
):
    engine = engines.get(TIGHT)
    with recorded_plans(engine, monkeypatch) as plans:
        again = one_by_one(engine, [greedy(prompt, max_tokens=24) for prompt in prompts])
    assert tokens(again) == tokens(alone)
    chunks = [row.num_tokens for plan in plans for row in plan.rows]
    assert max(chunks) == 16
    assert chunks.count(16) >= sum(length // 16 for length in LENGTHS) - 1


def test_preempted_requests_give_the_tokens_of_the_one_by_one_run(engines, prompts, alone):
    engine = engines.get(TIGHT)
    before = engine.metrics.num_preemptions
    requests = [greedy(prompt, max_tokens=24) for prompt in prompts] * 4
    assert tokens(engine.generate(requests)) == tokens(alone) * 4
    assert engine.metrics.num_preemptions - before >= 4


def test_completions_that_share_a_prompt_give_the_tokens_of_one(engines, prompts, alone):
    for config in (MAIN, TIGHT):
        engine = engines.get(config)
        requests = [greedy(prompt, max_tokens=24, n=3) for prompt in prompts]
        completions = engine.generate(requests)
        assert tokens(completions) == [ids for ids in tokens(alone) for _ in range(3)]
        assert [c.index for c in completions] == [0, 1, 2] * len(prompts)
        cached = [c.finish.usage.cached_tokens for c in completions if c.index == 0]
        assert cached == [0] * len(prompts)
    completions = engines.get(MAIN).generate([greedy(range(100), max_tokens=4, n=3)])
    assert [c.finish.usage.cached_tokens for c in completions] == [0, 96, 96]


def test_prefill_and_decode_give_the_tokens_of_generate(engine, prompts, alone):
    for prompt, whole in zip(prompts, alone, strict=True):
        first = engine.prefill(greedy(prompt, max_tokens=24, tenant="t"), 30.0)
        [event] = list(first)
        assert event.finish is None
        assert engine.current_load().num_leased_pages == -(-len(prompt) // 16)
        rest = list(engine.decode(first.handle.handle_id, first.handle.epoch, "t", None))
        assert rest[-1].finish.reason is whole.finish.reason
        assert rest[-1].finish.usage == whole.finish.usage
        ids = (*event.token_ids, *(i for e in rest for i in e.token_ids))
        assert ids == whole.token_ids


def test_a_prefill_that_its_first_token_ends_has_no_handle(engine):
    stream = engine.prefill(greedy(range(20), max_tokens=1), 30.0)
    [event] = list(stream)
    assert len(event.token_ids) == 1
    assert event.finish.reason is FinishReason.LENGTH
    assert stream.handle is None


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(
    engine, rng, temperature
):
    def seeded(seed):
        params = SamplingParams(max_tokens=16, temperature=temperature, seed=seed, ignore_eos=True)
        return Request(prompt_ids=prompt, params=params)

    prompt = random_prompt(rng, 30)
    [first] = tokens(engine.generate([seeded(7)]))
    others = [
        Request(prompt_ids=random_prompt(rng, 1 + i * 9), params=SamplingParams(max_tokens=9 + i))
        for i in range(9)
    ]
    crowd = [*others[:5], seeded(7), *others[5:], seeded(8)]
    answers = tokens(engine.generate(crowd))
    assert_same_answers([seeded(7)], [answers[5]], [first])
    assert answers[-1] != first
    unseeded = [seeded(None), seeded(None)]
    one, two = tokens(engine.generate(unseeded))
    assert one != two


def test_completions_of_one_seed_differ_and_reproduce(engine):
    params = SamplingParams(max_tokens=12, n=4, seed=2**63 + 5, ignore_eos=True)
    request = Request(prompt_ids=tuple(range(40)), params=params)
    answers = tokens(engine.generate([request]))
    assert len(set(answers)) == 4
    twice = tokens(engine.generate([request, request]))
    assert_same_answers([request, request], twice, answers * 2)
    alone = Request(
        prompt_ids=request.prompt_ids,
        params=SamplingParams(max_tokens=12, n=1, seed=2**63 + 5, ignore_eos=True),
    )
    assert_same_answers([alone], tokens(engine.generate([alone])), answers[:1])


def test_seeded_answers_survive_preemption_and_chunks(engines, rng, monkeypatch):
    # The first three prompts fill 15 of 16 pages; as the first one ends, they would need 20.
    lengths = [*rng.integers(65, 80, 12), *rng.integers(1, 120, 12)]
    requests = [
        Request(
            prompt_ids=random_prompt(rng, int(length)),
            params=SamplingParams(
                max_tokens=40, seed=i, top_p=0.9, presence_penalty=0.5, ignore_eos=i < 12
            ),
        )
        for i, length in enumerate(lengths)
    ]
    whole = tokens(one_by_one(engines.get(), requests))
    engine = engines.get(TIGHT)
    before = engine.metrics.num_preemptions
    assert_same_answers(requests, tokens(taken_in_together(engine, requests, monkeypatch)), whole)
    assert engine.metrics.num_preemptions > before


def test_usage_and_times_add_up(engine, prompts, alone):
    for prompt, completion in zip(prompts, alone, strict=True):
        usage, timing = completion.finish.usage, completion.finish.timing
        assert usage.prompt_tokens == len(prompt)
        assert usage.completion_tokens == len(completion.token_ids)
        assert timing.queue_s >= 0.0
        assert timing.prefill_s > 0.0
        assert timing.decode_s > 0.0


def test_many_callers_at_once_each_get_their_own_answer(engine, prompts, alone):
    answers = {}

    def call(caller):
        for index in range(caller, len(prompts), 2):
            [completion] = engine.generate([greedy(prompts[index], max_tokens=24)])
            answers[caller, index] = completion.token_ids

    threads = [threading.Thread(target=call, args=(i % 2,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [answers[i % 2, i] for i in range(len(prompts))] == tokens(alone)


def test_a_prompt_of_one_token_and_one_that_fills_the_context(engine):
    [short] = engine.generate([greedy([5], max_tokens=1)])
    assert len(short.token_ids) == 1
    [full] = engine.generate([greedy([5] * 255, max_tokens=1)])
    assert full.finish.usage.prompt_tokens == 255
    logits = ORACLE.logits([5] * 255)[-1]
    assert log_softmax(logits)[full.token_ids[0]] == pytest.approx(log_softmax(logits).max())
    with pytest.raises(RequestError, match="prompt"):
        engine.submit(greedy([5] * 256, max_tokens=1))
