"""Every sampling parameter through the whole engine, token by token against its definition.

The logits come from the float64 model, the processing and the draws from the sampler's oracle;
neither knows steps, slots or what is in flight.
"""

from dataclasses import replace

import numpy as np
import pytest

from pallasite.engine import FinishReason, Request, SamplingParams
from tests.engine.answers import ROUNDING, possible_next
from tests.engine.harness import ORACLE, TIGHT, greedy, random_prompt, tokens
from tests.engine.sampler_oracle import log_softmax
from tests.tiny_checkpoints import TINY

EOS = TINY.eos_token_ids[0]
PLAIN = SamplingParams(max_tokens=20, temperature=0.0)
DRAWN = SamplingParams(max_tokens=20, seed=5)


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(np.random.default_rng(3), 37)


@pytest.fixture(scope="module")
def plain(engines, prompt):
    """The greedy answer without any processing."""
    [completion] = engines.get().generate([Request(prompt_ids=prompt, params=PLAIN)])
    assert len(completion.token_ids) == 20
    return completion.token_ids


def check(prompt, params, completion):
    """Each token, the stop that was cut off included, is one that its definition allows."""
    output = completion.token_ids
    finish = completion.finish
    if finish.reason is FinishReason.STOP and not params.include_stop:
        output = (*output, finish.matched)
    logits = ORACLE.logits((*prompt, *output))[len(prompt) - 1 :]
    for place, token_id in enumerate(output):
        possible = possible_next(prompt, params, completion.index, output[:place], logits[place])
        assert token_id in possible, (params, place)
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    assert ends.isdisjoint(output[:-1])
    if finish.reason is FinishReason.STOP:
        assert finish.matched == output[-1]
        assert finish.matched in ends
    else:
        assert finish.reason is FinishReason.LENGTH
        assert len(output) == params.max_tokens
    assert finish.usage.completion_tokens == len(completion.token_ids)


def variants(prompt, plain):
    """One request a parameter, each of which changes the answer."""
    favourites = tuple(sorted({*plain[:4], 7, 8, 9, EOS}))
    return {
        "temperature": replace(DRAWN, temperature=0.7),
        "a high temperature": replace(DRAWN, temperature=3.0),
        "top_k": replace(DRAWN, top_k=3),
        "top_p": replace(DRAWN, top_p=0.4),
        "min_p": replace(DRAWN, min_p=0.3),
        "all three": replace(DRAWN, top_k=20, top_p=0.8, min_p=0.05),
        "repetition_penalty": replace(PLAIN, repetition_penalty=1.8),
        "a reward for repetition": replace(PLAIN, repetition_penalty=0.3),
        "presence_penalty": replace(PLAIN, presence_penalty=-2.0),
        "frequency_penalty": replace(PLAIN, frequency_penalty=-1.0),
        "logit_bias": replace(PLAIN, logit_bias={plain[0]: -5.0, 17: 2.5, 18: 2.5}),
        "allowed_token_ids": replace(PLAIN, allowed_token_ids=favourites, ignore_eos=True),
        "allowed with a bias": replace(
            DRAWN, allowed_token_ids=(3, 4, 5, 6), logit_bias={4: 2.0, 300: 99.0}
        ),
        "a bad word": replace(PLAIN, bad_words=((plain[2],),)),
        "a bad word of three": replace(PLAIN, bad_words=(plain[3:6],)),
        "a bad word that the prompt begins": replace(PLAIN, bad_words=((prompt[-1], plain[0]),)),
        "a long bad word": replace(PLAIN, bad_words=((*prompt[-9:], *plain[:6]),)),
        "bad words": replace(PLAIN, bad_words=((plain[0],), plain[1:3], (1, 2, 3), plain[4:6])),
        "min_tokens": replace(PLAIN, min_tokens=9, stop_token_ids=plain[2:4]),
        "everything": replace(
            DRAWN,
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.2,
            presence_penalty=0.4,
            frequency_penalty=0.2,
            logit_bias={9: 3.0, 10: -3.0},
            bad_words=((9, 9), (9,) * 3, (11,)),
            min_tokens=5,
            stop_token_ids=(9,),
        ),
    }


def test_every_parameter_does_what_its_definition_says(engine, prompt, plain):
    params = variants(prompt, plain)
    requests = [Request(prompt_ids=prompt, params=p) for p in params.values()]
    completions = dict(zip(params, engine.generate(requests), strict=True))
    for name, completion in completions.items():
        check(prompt, params[name], completion)
        assert completion.token_ids != plain, f"{name} changed nothing"
    [drawn] = tokens(engine.generate([Request(prompt_ids=prompt, params=DRAWN)]))
    answers = {name: c.token_ids for name, c in completions.items() if params[name].seed}
    for name, answer in answers.items():
        assert answer != drawn, f"{name} changed nothing"


def test_every_parameter_survives_chunks_and_preemption(engines, prompt, plain):
    engine = engines.get(TIGHT)
    before = engine.metrics.num_preemptions
    # Four of these fit when they begin, and no longer when they end.
    longer = (*prompt, *prompt[:23])
    params = [replace(p, max_tokens=40) for p in variants(prompt, plain).values()]
    requests = [Request(prompt_ids=longer, params=p) for p in params]
    completions = engine.generate(requests)
    assert engine.metrics.num_preemptions - before >= 8
    for p, completion in zip(params, completions, strict=True):
        check(longer, p, completion)


def test_every_parameter_survives_a_lease(engine, prompt, plain):
    params = variants(prompt, plain)
    params["a bad word across the lease"] = replace(PLAIN, bad_words=(plain[:2],))
    params["a long bad word across the lease"] = replace(PLAIN, bad_words=(plain[:3],))
    requests = [Request(prompt_ids=prompt, params=p) for p in params.values()]
    for request, whole in zip(requests, engine.generate(requests), strict=True):
        check(prompt, request.params, whole)
        first = engine.prefill(request, 30.0)
        ids = [i for event in first for i in event.token_ids]
        if first.handle is not None:
            rest = engine.decode(first.handle.handle_id, first.handle.epoch, "", None)
            ids += [i for event in rest for i in event.token_ids]
        assert tuple(ids) == whole.token_ids, request.params
    assert whole.token_ids[:2] == plain[:2]
    assert whole.token_ids[2] != plain[2]


def test_a_bad_word_that_was_begun_otherwise_forbids_nothing(engine, prompt, plain):
    other = next(i for i in range(TINY.vocab_size) if i not in (*prompt, *plain))
    words = [(other, *plain[place : place + 2]) for place in range(18)]
    words += [(plain[place], other, plain[place + 2]) for place in range(17)]
    words += [(other, *plain[:12]), (*plain[:11], other)]
    params = replace(PLAIN, bad_words=tuple(words))
    [completion] = engine.generate([Request(prompt_ids=prompt, params=params)])
    assert completion.token_ids == plain


def test_each_of_n_completions_follows_its_own_seed_and_history(engine, prompt):
    params = replace(DRAWN, n=4, frequency_penalty=0.7, seed=2**64 - 1)
    completions = engine.generate([Request(prompt_ids=prompt, params=params)])
    for completion in completions:
        check(prompt, params, completion)
    assert len({c.token_ids for c in completions}) == 4


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_id_ends_the_completion_and_is_part_of_it_if_asked(
    engine, prompt, plain, include_stop
):
    first = plain.index(plain[4])
    params = replace(PLAIN, stop_token_ids=(plain[4], 1), include_stop=include_stop, logprobs=0)
    [completion] = engine.generate([Request(prompt_ids=prompt, params=params)])
    assert completion.token_ids == plain[: first + include_stop]
    assert len(completion.logprobs) == first + include_stop
    assert completion.finish.reason is FinishReason.STOP
    assert completion.finish.matched == plain[4]
    assert completion.finish.usage.completion_tokens == first + include_stop


def test_a_stop_in_the_last_token_is_a_stop(engine, prompt, plain):
    assert plain[1] != plain[0]
    params = replace(PLAIN, max_tokens=2, stop_token_ids=(plain[1],))
    [completion] = engine.generate([Request(prompt_ids=prompt, params=params)])
    assert completion.finish.reason is FinishReason.STOP
    assert completion.token_ids == plain[:1]


def test_the_end_of_sequence_waits_for_min_tokens_and_stops_unless_ignored(engine, prompt):
    wants_eos = replace(PLAIN, logit_bias={EOS: 500.0})
    cases = {
        "at once": wants_eos,
        "late": replace(wants_eos, min_tokens=6),
        "included": replace(wants_eos, include_stop=True),
        "ignored": replace(wants_eos, ignore_eos=True),
        "at the very end": replace(wants_eos, min_tokens=20),
    }
    requests = [Request(prompt_ids=prompt, params=params) for params in cases.values()]
    ends = dict(zip(cases, engine.generate(requests), strict=True))
    reasons = {name: (c.finish.reason.value, c.finish.matched) for name, c in ends.items()}
    assert reasons == {
        "at once": ("stop", EOS),
        "late": ("stop", EOS),
        "included": ("stop", EOS),
        "ignored": ("length", None),
        "at the very end": ("length", None),
    }
    assert ends["at once"].token_ids == ()
    assert len(ends["late"].token_ids) == 6
    assert EOS not in ends["late"].token_ids
    assert ends["included"].token_ids == (EOS,)
    assert ends["ignored"].token_ids == (EOS,) * 20
    assert EOS not in ends["at the very end"].token_ids


@pytest.mark.parametrize("width", [0, 1, 20])
def test_logprobs_are_the_models_own_whatever_is_sampled(engine, prompt, width):
    processed_params = replace(
        DRAWN, logprobs=width, temperature=2.0, repetition_penalty=1.5, logit_bias={3: 4.0}
    )
    for params in (replace(PLAIN, logprobs=width), processed_params):
        [completion] = engine.generate([Request(prompt_ids=prompt, params=params)])
        ids = completion.token_ids
        logits = ORACLE.logits((*prompt, *ids))[len(prompt) - 1 :]
        assert [entry.token_id for entry in completion.logprobs] == list(ids)
        for entry, row in zip(completion.logprobs, logits[: len(ids)], strict=True):
            check_entry(entry, log_softmax(row), width)


def check_entry(entry, logprobs, width):
    assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=ROUNDING)
    assert len(entry.top) == width
    best = np.sort(logprobs)[::-1][:width]
    np.testing.assert_allclose([value for _, value in entry.top], best, atol=ROUNDING)
    np.testing.assert_allclose([logprobs[i] for i, _ in entry.top], best, atol=ROUNDING)
    assert len({i for i, _ in entry.top}) == width


@pytest.mark.parametrize("config", [None, TIGHT])
def test_prompt_logprobs_are_those_of_one_pass_over_the_prompt(engines, rng, config):
    engine = engines.get() if config is None else engines.get(config)
    prompts = [random_prompt(rng, length) for length in (1, 2, 16, 17, 33, 130)] * 2
    requests = [greedy(p, max_tokens=3, prompt_logprobs=5, logprobs=2, n=2) for p in prompts]
    completions = engine.generate(requests)
    for index, completion in enumerate(completions):
        ids = prompts[index // 2]
        scores = completion.prompt_logprobs
        assert len(scores) == len(ids)
        assert scores[0] is None
        logits = ORACLE.logits(ids)
        for entry, token_id, row in zip(scores[1:], ids[1:], logits, strict=False):
            assert entry.token_id == token_id
            check_entry(entry, log_softmax(row), 5)


def test_a_row_that_asks_for_no_logprobs_gets_none_beside_one_that_does(engine, prompt):
    asks = greedy(prompt, max_tokens=5, logprobs=2, prompt_logprobs=1)
    silent = greedy(prompt, max_tokens=5)
    first, second = engine.generate([asks, silent])
    assert len(first.logprobs) == 5
    assert len(first.prompt_logprobs) == 37
    assert second.logprobs == ()
    assert second.prompt_logprobs is None
    assert first.token_ids == second.token_ids


def test_a_request_without_a_token_left_ends_alone_and_names_its_parameters(engine, prompt, plain):
    # Only two ids are allowed, one is banned after the other, and the second always.
    stuck = replace(PLAIN, allowed_token_ids=(5, 6), bad_words=((6,), (5, 5)), seed=1)
    requests = [Request(prompt_ids=prompt, params=params) for params in (PLAIN, stuck, PLAIN)]
    before, ended, after = engine.generate(requests)
    assert before.token_ids == after.token_ids == plain
    assert ended.token_ids == (5,)
    assert ended.finish.reason is FinishReason.ERROR
    assert ended.finish.error.field == "sampling"
    assert "rule out every token" in str(ended.finish.error)
