"""The engine over several data shards, on a device of numpy: the answers of a request alone."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from pallasite.engine import (
    Engine,
    EngineConfig,
    ErrorCode,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
)
from tests.engine.harness import assert_quiet, random_prompt, recorded_plans, stepped
from tests.engine.toy_runtime import ToyRuntime, answers, score

CONFIG = EngineConfig(
    weights="f32",
    max_requests=8,
    max_batch_tokens=64,
    max_context_len=256,
    num_pages=160,
    max_leases=64,
)


@contextmanager
def engine_of(num_shards, config=CONFIG):
    """An engine of so many shards, audited and closed at the end."""
    with Engine(ToyRuntime(config, num_shards), config) as engine:
        yield engine
        if engine.metrics.is_alive:
            assert_quiet(engine)
            assert engine.metrics.misses == 0


def random_request(rng):
    """What touches each field that a row of a step has of its own."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.3 else otherwise

    ids = [int(i) for i in rng.integers(0, 256, 4)]
    params = SamplingParams(
        max_tokens=int(rng.integers(1, 20)),
        n=maybe(int(rng.integers(2, 4)), 1),
        logit_bias=maybe({ids[0]: 1.0, ids[1]: 2.0}, {}),
        bad_words=maybe(((ids[2],), *((i,) for i in range(0, 256, 5))), ()),
        logprobs=maybe(0, None),
        prompt_logprobs=maybe(0, None),
        ignore_eos=bool(rng.random() < 0.5),
    )
    prompt = random_prompt(rng, int(rng.integers(1, 100)))
    return Request(prompt_ids=prompt, params=params, priority=int(rng.integers(0, 3)))


def check(request, completions):
    for completion in completions:
        assert completion.finish.error is None
        assert completion.token_ids == answers(request)
        ids = (*request.prompt_ids, *completion.token_ids)
        if request.params.logprobs is not None:
            got = [entry.logprob for entry in completion.logprobs]
            start = len(request.prompt_ids)
            assert got == [score(ids[:i], ids[i]) for i in range(start, len(ids))]
        if request.params.prompt_logprobs is not None:
            first, *others = completion.prompt_logprobs
            assert first is None
            expected = [(ids[i], score(ids[:i], ids[i])) for i in range(1, len(request.prompt_ids))]
            assert [(entry.token_id, entry.logprob) for entry in others] == expected


@pytest.mark.parametrize("pages_each", [40, 8])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_request_gets_its_own_answer_whatever_its_shard(rng, num_shards, pages_each):
    # 8 pages hold the longest request and no more, so most are sent back at some time.
    config = replace(CONFIG, max_batch_tokens=24, num_pages=pages_each * num_shards)
    requests = [random_request(rng) for _ in range(60)]
    with engine_of(num_shards, config) as engine:
        completions = iter(engine.generate(requests))
        for request in requests:
            check(request, [next(completions) for _ in range(request.params.n)])
        rows = engine._runtime.num_rows
        assert all(max(each) <= 8 // num_shards for each in rows)
        assert all(sum(each) > 0 for each in zip(*rows, strict=True)), "every shard has run some"
        assert engine.metrics.num_preemptions > 0 or pages_each > 8


def test_a_step_is_mixed_for_one_shard_and_all_decode_for_another(rng, monkeypatch):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    short, long = (Request(prompt_ids=random_prompt(rng, n), params=params) for n in (20, 120))
    with engine_of(2) as engine:
        with recorded_plans(engine, monkeypatch) as plans:
            with stepped(engine, monkeypatch) as loop:
                streams = [engine.submit(short)]
                loop.step(3)
                streams.append(engine.submit(long))
            for request, stream in zip((short, long), streams, strict=True):
                assert tuple(i for event in stream for i in event.token_ids) == answers(request)
        shapes = [
            [(part.num_decode, len(part.rows) - part.num_decode) for part in plan.parts]
            for plan in plans
        ]
        assert [(1, 0), (0, 0)] in shapes, "one shard has nobody"
        assert [(1, 0), (0, 1)] in shapes
        assert [(1, 0), (1, 0)] in shapes
        buckets = [engine._runtime.bucket_for(plan) for plan in plans]
        assert {bucket.has_prefill for bucket in buckets} == {False, True}
        computed = sum(2 * bucket.num_tokens for bucket in buckets)
        assert engine.metrics.padded_tokens == computed - sum(plan.num_tokens for plan in plans)


def test_a_request_that_no_shard_can_hold_is_refused(rng):
    config = replace(CONFIG, num_pages=16)
    request = Request(prompt_ids=random_prompt(rng, 100), params=SamplingParams(max_tokens=29))
    with engine_of(1, config) as engine:
        assert len(engine.generate([request])) == 1
    with engine_of(2, config) as engine:
        assert engine.current_load().num_pages == 16
        with pytest.raises(RequestError, match="allowed is the 128 that") as refused:
            engine.submit(request)
        assert refused.value.field == "sampling.max_tokens"
        smaller = replace(request, params=SamplingParams(max_tokens=28))
        check(smaller, engine.generate([smaller]))


def test_a_lease_is_decoded_on_the_shard_of_its_pages(rng):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    requests = [Request(prompt_ids=random_prompt(rng, n), params=params) for n in (40, 50, 30, 20)]
    with engine_of(2) as engine:
        prefills = [engine.prefill(request, 30.0) for request in requests]
        firsts = [event.token_ids for stream in prefills for event in stream]
        leases = engine._leases.sequences()
        assert {sequence.shard for sequence in leases} == {0, 1}
        load, audit = engine.current_load(), engine.audit()
        assert load.num_leased_pages == audit.leased == sum(-(-n // 16) for n in (40, 50, 30, 20))
        assert audit.problems == ()
        # Others take the slots and the pages beside them meanwhile.
        others = [random_request(rng) for _ in range(10)]
        engine.generate(others)
        for request, first, prefill in list(zip(requests, firsts, prefills, strict=True))[:3]:
            stream = engine.decode(prefill.handle.handle_id, engine.epoch, "", None)
            rest = [i for event in stream for i in event.token_ids]
            assert (*first, *rest) == answers(request)
            assert engine.current_load().num_running == 0
        engine.release(prefills[3].handle.handle_id, engine.epoch, "")


def test_a_failed_step_ends_what_runs_on_every_shard_and_the_others_get_their_answers(
    rng, monkeypatch
):
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    requests = [Request(prompt_ids=random_prompt(rng, 30 + i), params=params) for i in range(20)]
    with engine_of(4) as engine:
        run, held = engine._runtime.run, engine.prefill(requests[0], 30.0)
        list(held)

        def fail(*arguments):
            monkeypatch.setattr(engine._runtime, "run", run)
            raise RuntimeError("the device is gone")

        with stepped(engine, monkeypatch) as loop:
            streams = [engine.submit(request) for request in requests]
            loop.step(4)
            running = engine.current_load().num_running
            monkeypatch.setattr(engine._runtime, "run", fail)
        ends = [list(stream) for stream in streams]
        errors = [events[-1].finish.error for events in ends]
        assert running == 8
        assert [e.code for e in errors if e is not None] == [ErrorCode.UNAVAILABLE] * 8
        for request, events, error in zip(requests, ends, errors, strict=True):
            if error is None:
                assert tuple(i for event in events for i in event.token_ids) == answers(request)
        with pytest.raises(RequestError, match="lost with a failed step"):
            engine.decode(held.handle.handle_id, engine.epoch, "", None)


def test_requests_end_early_on_any_shard_and_leave_the_rest_alone(rng, monkeypatch):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    requests = [Request(prompt_ids=random_prompt(rng, 20 + i), params=params) for i in range(24)]
    with engine_of(2) as engine:
        with stepped(engine, monkeypatch) as loop:
            streams = [
                engine.submit(
                    replace(request, request_id=f"r{i}", timeout_s=(None, 1e-3)[i % 3 == 2])
                )
                for i, request in enumerate(requests)
            ]
            loop.step(5)
            for i in range(0, 24, 3):
                assert engine.abort(f"r{i}")
        for i, (request, stream) in enumerate(zip(requests, streams, strict=True)):
            events = list(stream)
            ids = tuple(token_id for event in events for token_id in event.token_ids)
            finish = events[-1].finish
            if i % 3 == 1:
                assert ids == answers(request)
            else:
                assert ids == answers(request)[: len(ids)]
                late = finish.error is not None and finish.error.code
                assert late is ErrorCode.DEADLINE_EXCEEDED or finish.reason is FinishReason.ABORT


def test_what_is_compared_are_answers_of_every_kind(rng):
    requests = [random_request(rng) for _ in range(800)]
    stops = [len(answers(r)) < r.params.max_tokens for r in requests if not r.params.ignore_eos]
    assert {False, True} == set(stops)
    for name in ("bad_words", "logit_bias"):
        plain = [
            answers(replace(r, params=replace(r.params, **{name: type(getattr(r.params, name))()})))
            for r in requests
        ]
        assert sum(one != answers(r) for one, r in zip(plain, requests, strict=True)) > 50
