"""The engine with speculation: the tokens that it gives without, in fewer steps."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest

from pallasite.engine import FinishReason, Request, SamplingParams
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels.cpu import best_instructions
from tests.engine.answers import assert_same_answers, logprob_errors, possible_next
from tests.engine.harness import (
    MAIN,
    ORACLE,
    greedy,
    one_by_one,
    random_params,
    random_prompt,
    taken_in_together,
    tokens,
)
from tests.engine.speculating import (
    DRAFTING,
    TIGHT_DRAFTING,
    eager,
    eager_engine,
    foreseen,
)

ALL = replace(
    SamplingParams(),
    max_tokens=40,
    seed=3,
    temperature=0.8,
    top_k=20,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.6,
    min_tokens=20,
)
"""Whatever makes a token depend on those before it."""


def repetitive(rng, count, max_tokens=48):
    """Prompts that repeat themselves, and few tokens to go on with."""
    requests = []
    for seed in range(count):
        piece = random_prompt(rng, int(rng.integers(2, 9)))
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(rng.choice([0.0, 0.7])),
            seed=seed,
            allowed_token_ids=tuple(sorted({*piece, *range(3)})),
            ignore_eos=True,
        )
        requests.append(Request(prompt_ids=piece * int(rng.integers(1, 9)), params=params))
    return requests


def sampled(rng, count, max_tokens=40):
    """Any parameters, with seeds."""
    return [
        Request(
            prompt_ids=random_prompt(rng, int(rng.integers(1, 100))),
            params=replace(random_params(rng, max_tokens), seed=int(rng.integers(0, 2**40))),
        )
        for _ in range(count)
    ]


def test_what_repeats_comes_in_fewer_steps_and_is_the_same(engines, rng):
    requests = repetitive(rng, 12)
    plain = engines.get(MAIN)
    before = plain.metrics.num_steps
    expected = tokens(one_by_one(plain, requests))
    num_steps = plain.metrics.num_steps - before
    with eager_engine(engines) as engine:
        got = one_by_one(engine, requests)
        metrics = engine.metrics
        assert_same_answers(requests, tokens(got), expected)
        engine.audit()  # a last step is counted a little later than its tokens are read
        # How often random weights repeat themselves is the seed's; what it saves is not.
        assert metrics.num_steps == num_steps - metrics.accepted_tokens
        assert 30 < metrics.accepted_tokens < metrics.draft_tokens
        assert metrics.acceptance == metrics.accepted_tokens / metrics.draft_tokens
        assert 0 < metrics.num_drafts <= metrics.draft_tokens <= 4 * metrics.num_drafts
        assert metrics.compilations == metrics.misses == 0
        usages = [completion.finish.usage for completion in got]
    assert sum(usage.draft_tokens for usage in usages) == metrics.draft_tokens
    assert sum(usage.accepted_tokens for usage in usages) == metrics.accepted_tokens


def crowd(rng):
    """Three requests of which TIGHT must preempt two, should they come together.

    Each fills 5 of 16 pages with its prompt, and the first one 12 or more at its end.
    """
    params = SamplingParams(max_tokens=120, temperature=0.8, ignore_eos=True)
    return [
        Request(
            prompt_ids=random_prompt(rng, int(rng.integers(65, 80))),
            params=replace(params, seed=int(rng.integers(0, 2**40))),
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("config", [DRAFTING, TIGHT_DRAFTING], ids=["roomy", "tight"])
def test_any_parameters_give_the_tokens_of_the_engine_without(engines, rng, monkeypatch, config):
    """Penalties, bans, logprobs, stops, several completions; chunks and preemption in TIGHT."""
    crowds = [crowd(rng), crowd(rng), sampled(rng, 100)]
    requests = list(chain(*crowds))
    answers = engines.get(MAIN).generate(requests)
    with eager_engine(engines, config) as engine:
        with foreseen(engine, requests, answers, monkeypatch):
            got = list(chain(*(taken_in_together(engine, each, monkeypatch) for each in crowds)))
        assert engine.metrics.accepted_tokens > 150
        assert engine.metrics.draft_tokens > engine.metrics.accepted_tokens + 30
        assert config is DRAFTING or engine.metrics.num_preemptions > 3
        assert engine.metrics.compilations == engine.metrics.misses == 0
    assert_same_answers(requests, tokens(got), tokens(answers))
    num_logprobs = 0
    for ours, theirs in zip(got, answers, strict=True):
        if ours.token_ids != theirs.token_ids:
            continue
        assert ours.finish.reason is theirs.finish.reason
        assert ours.finish.matched == theirs.finish.matched
        assert [entry.token_id for entry in ours.logprobs] == [e.token_id for e in theirs.logprobs]
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            num_logprobs += 1
    assert num_logprobs > 100


def test_each_token_is_what_its_definition_allows_after_the_drafts_before_it(
    engines, rng, monkeypatch
):
    """Penalties count accepted drafts, and min_tokens and bad_words see them."""
    prompt = random_prompt(rng, 30)
    words = tuple((int(a), int(b)) for a, b in rng.integers(0, 256, (8, 2)))
    params = [
        replace(ALL, seed=seed, bad_words=(*words, (int(seed),)), temperature=temperature)
        for seed in range(6)
        for temperature in (0.0, 0.8)
    ]
    requests = [Request(prompt_ids=prompt, params=each) for each in params]
    answers = engines.get(MAIN).generate(requests)
    with eager_engine(engines) as engine, foreseen(engine, requests, answers, monkeypatch):
        got = engine.generate(requests)
        assert engine.metrics.accepted_tokens > 100
    for request, completion in zip(requests, got, strict=True):
        ids = completion.token_ids
        logits = ORACLE.logits((*prompt, *ids))[len(prompt) - 1 :]
        for place, token_id in enumerate(ids):
            allowed = possible_next(prompt, request.params, 0, ids[:place], logits[place])
            assert token_id in allowed, (request.params, place)


def test_logprobs_are_the_float64_models(engines, rng, monkeypatch):
    requests = [
        greedy(random_prompt(rng, 20), max_tokens=30, logprobs=4, prompt_logprobs=0)
        for _ in range(6)
    ]
    answers = engines.get(MAIN).generate(requests)
    with eager_engine(engines) as engine, foreseen(engine, requests, answers, monkeypatch):
        got = engine.generate(requests)
        assert engine.metrics.accepted_tokens > 50
    assert logprob_errors(requests, got).max() < 1e-3


def test_draws_without_a_seed_have_the_models_distribution(engines, monkeypatch):
    """Three tokens out of three, drawn 3,000 times, against their exact chances (chi-squared)."""
    prompt, allowed = random_prompt(np.random.default_rng(7), 7), (5, 6, 7)
    request = Request(
        prompt_ids=prompt,
        params=SamplingParams(
            max_tokens=3, n=8, temperature=8.0, allowed_token_ids=allowed, ignore_eos=True, seed=0
        ),
    )
    # The prompts of all 8 are computed in one step: one that computes a prompt has no drafts.
    requests = [replace(request, params=replace(request.params, seed=s)) for s in range(375)]
    # A draft that is the same for all: right for some, wrong for others.
    guess = engines.get(MAIN).generate(requests[:1])[:1]
    with eager_engine(engines) as engine:
        with foreseen(engine, requests, guess * 3000, monkeypatch):
            answers = tokens(one_by_one(engine, requests))
        assert 500 < engine.metrics.accepted_tokens < engine.metrics.draft_tokens - 500
    observed = dict.fromkeys(product(allowed, repeat=3), 0)
    for answer in answers:
        observed[answer] += 1
    expected = {ids: 3000 * _chance(prompt, ids, allowed, 8.0) for ids in observed}
    chi_squared = sum((observed[i] - expected[i]) ** 2 / expected[i] for i in observed)
    assert min(expected.values()) > 5
    assert chi_squared < 54.05, "26 degrees of freedom: a chance of 0.1%, of fixed seeds"


def _chance(prompt, ids, allowed, temperature):
    chance = 1.0
    logits = ORACLE.logits((*prompt, *ids))[len(prompt) - 1 :]
    for place, token_id in enumerate(ids):
        weights = np.exp(logits[place][list(allowed)] / temperature)
        chance *= weights[allowed.index(token_id)] / weights.sum()
    return chance


def test_stop_ids_within_drafts_end_the_completion(engines, rng, monkeypatch):
    prompts = [random_prompt(rng, 20) for _ in range(8)]
    whole = engines.get(MAIN).generate([greedy(p, max_tokens=24, ignore_eos=True) for p in prompts])
    for include_stop in (False, True):
        requests = [
            greedy(p, max_tokens=24, stop_token_ids=(c.token_ids[9],), include_stop=include_stop)
            for p, c in zip(prompts, whole, strict=True)
        ]
        expected = engines.get(MAIN).generate(requests)
        with eager_engine(engines) as engine, foreseen(engine, requests, whole, monkeypatch):
            got = engine.generate(requests)
            assert engine.metrics.accepted_tokens > 15
        if not assert_same_answers(requests, tokens(got), tokens(expected)):
            assert [c.finish.matched for c in got] == [c.finish.matched for c in expected]
        assert {c.finish.reason for c in got} >= {FinishReason.STOP}


def test_prefill_and_decode_give_the_tokens_of_generate(engines, rng):
    requests = repetitive(rng, 4)
    with eager_engine(engines) as engine:
        whole = engine.generate(requests)
        for request, completion in zip(requests, whole, strict=True):
            first = engine.prefill(request, 30.0)
            [event] = list(first)
            rest = list(engine.decode(first.handle.handle_id, first.handle.epoch, "", None))
            ids = (*event.token_ids, *(i for e in rest for i in e.token_ids))
            assert_same_answers([request], [ids], [completion.token_ids])


@pytest.mark.parametrize("mesh", [MeshShape(data=2)], ids=str)
def test_data_shards_verify_drafts_of_their_own(engines, rng, monkeypatch, mesh):
    # The last one goes on alone on its shard, whatever the others' lengths.
    longest = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    requests = [*sampled(rng, 40), Request(prompt_ids=random_prompt(rng, 20), params=longest)]
    answers = engines.get(MAIN).generate(requests)
    with eager_engine(engines, replace(DRAFTING, mesh=mesh)) as engine:
        with (
            foreseen(engine, requests, answers, monkeypatch),
            recorded_launches(engine, monkeypatch) as plans,
        ):
            got = engine.generate(requests)
        assert engine.metrics.accepted_tokens > 150
        assert engine.metrics.compilations == engine.metrics.misses == 0
    assert_same_answers(requests, tokens(got), tokens(answers))
    both = [p for p in plans if all(any(row.draft for row in part.rows) for part in p.parts)]
    one = [p for p in plans if p.has_drafts and p not in both]
    assert len(both) > 5
    assert len(one) > 0


@contextmanager
def recorded_launches(engine, monkeypatch):
    """Every step's plan as it is launched, drafts included."""
    plans, launch = [], engine._stepper.launch
    with monkeypatch.context() as patch:
        patch.setattr(engine._stepper, "launch", lambda plan: (plans.append(plan), launch(plan))[1])
        yield plans


def test_a_step_without_drafts_is_an_ordinary_one(engines, rng, monkeypatch):
    requests = [greedy(random_prompt(rng, 20), max_tokens=20, ignore_eos=True) for _ in range(8)]
    expected = tokens(engines.get(MAIN).generate(requests))
    with eager_engine(engines) as engine:
        monkeypatch.setattr(engine._speculator, "_draft", lambda sequence, most: None)
        buckets = []
        run = engine._runtime.run
        monkeypatch.setattr(
            engine._runtime,
            "run",
            lambda bucket, words: (buckets.append(bucket), run(bucket, words))[1],
        )
        assert_same_answers(requests, tokens(engine.generate(requests)), expected)
        assert engine.metrics.draft_tokens == engine.metrics.num_drafts == 0
    assert not any(bucket.num_drafts for bucket in buckets)


def test_drafts_that_do_not_pay_are_not_verified(engines, rng):
    requests = repetitive(rng, 8)
    expected = tokens(engines.get(MAIN).generate(requests))
    with eager_engine(engines) as engine:
        speculator = engine._speculator
        speculator._verify_s = dict.fromkeys(speculator._verify_s, 100.0)
        assert_same_answers(requests, tokens(engine.generate(requests)), expected)
        assert engine.metrics.num_drafts == 0


def test_an_engine_measures_its_steps_at_the_start_and_serves_as_one_that_did_not(engines, rng):
    requests = repetitive(rng, 8)
    expected = tokens(engines.get(MAIN).generate(requests))
    with engines.fresh(DRAFTING) as engine:
        times = {**engine._speculator._decode_s, **engine._speculator._verify_s}
        assert all(seconds > 0 for seconds in times.values())
        assert len(engine._speculator._verify_s) == (5 if best_instructions() else 4)
        assert_same_answers(requests, tokens(engine.generate(requests)), expected)
    plain = engines.get(MAIN)
    assert plain._speculator._verify_s == {}
    assert eager(plain).metrics.num_drafts == 0
