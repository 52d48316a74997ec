"""How completions end other than by themselves: aborts, deadlines, full queues, slow readers.

The loop is let go step by step, so that each happens at the stage that its test is about.
"""

import threading
import time
from dataclasses import replace

import pytest

from pallasite.engine import ErrorCode, FinishReason, RequestError
from tests.engine.answers import assert_same_answers
from tests.engine.harness import (
    MAIN,
    TIGHT,
    assert_quiet,
    greedy,
    random_prompt,
    recorded_plans,
    stepped,
    tokens,
)

BOUNDED = replace(
    MAIN, max_waiting=4, max_unread_tokens=10, max_leases=2, max_lease_s=600.0, num_pages=160
)


@pytest.fixture
def bounded(engines):
    """An engine that is soon full."""
    return engines.get(BOUNDED)


def endless(prompt, **fields):
    """A greedy request that nothing but its length or the test ends."""
    return greedy(prompt, ignore_eos=True, **fields)


def read(stream):
    """A stream's tokens and its finish."""
    events = list(stream)
    assert sum(event.finish is not None for event in events) == 1
    assert events[-1].finish is not None
    return tuple(i for event in events for i in event.token_ids), events[-1].finish


def refusal(call, *arguments):
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value


# 40 prompt tokens in chunks of 16: taken in by turn 1, computed in turns 2 to 4, and a token a turn
# from the fifth on. The turn under way when the abort comes reads one more.
@pytest.mark.parametrize("num_turns", range(9))
def test_an_abort_at_any_stage_frees_its_slot_and_changes_no_other(
    engines, rng, monkeypatch, num_turns
):
    engine = engines.get(TIGHT)
    prompt, other_prompt = random_prompt(rng, 40), random_prompt(rng, 9)
    requests = [endless(prompt, max_tokens=12), endless(other_prompt, max_tokens=12)]
    whole, other = tokens(engine.generate(requests))
    with stepped(engine, monkeypatch) as loop, recorded_plans(engine, monkeypatch) as plans:
        stream = engine.submit(endless(prompt, max_tokens=12, request_id="aborted"))
        beside = engine.submit(endless(other_prompt, max_tokens=12))
        loop.step(num_turns)
        assert engine.abort("aborted")
        num_plans = len(plans)
        loop.step(3)
        late = [p for p in plans[num_plans:] for r in p.rows if r.sequence.group.stream is stream]
        assert len(late) <= 2
        assert engine.current_load().num_running + engine.current_load().num_waiting == 1
        assert not engine.abort("aborted")
    ids, finish = read(stream)
    assert finish.reason is FinishReason.ABORT
    assert len(ids) == max(0, num_turns - 3)
    assert finish.usage.completion_tokens == len(ids)
    assert_same_answers(requests, [ids, read(beside)[0]], [whole[: len(ids)], other])


def test_an_abort_ends_all_completions_of_its_request(engine, rng, monkeypatch):
    prompt = random_prompt(rng, 50)
    with stepped(engine, monkeypatch) as loop:
        stream = engine.submit(endless(prompt, max_tokens=100, n=12, request_id="many"))
        loop.step(5)
        assert engine.current_load().num_running == 8
        assert engine.current_load().num_waiting == 4
        engine.abort("many")
        loop.step(2)
    finishes = [event.finish for event in stream if event.finish]
    assert [finish.reason for finish in finishes] == [FinishReason.ABORT] * 12


def test_an_abort_of_nothing_says_so(engine):
    assert not engine.abort("nobody")
    [completion] = engine.generate([endless([1, 2], max_tokens=2, request_id="done")])
    assert completion.request_id == "done"
    assert not engine.abort("done")


def test_a_stop_text_ends_one_completion_and_counts_as_told(engine, rng, monkeypatch):
    prompt = random_prompt(rng, 20)
    [whole] = tokens(engine.generate([endless(prompt, max_tokens=20)]))
    with stepped(engine, monkeypatch) as loop:
        stream = engine.submit(endless(prompt, max_tokens=20, n=2, request_id="text"))
        loop.step(6)
        engine.stop("text", 1, "the end", 2)
        engine.stop("text", 1, "again", 1)
        loop.step(1)
    events = list(stream)
    finishes = {event.index: event.finish for event in events if event.finish}
    assert finishes[1].reason is FinishReason.STOP
    assert finishes[1].matched == "the end"
    assert finishes[1].usage.completion_tokens == 2
    assert finishes[0].reason is FinishReason.LENGTH
    ids = tuple(i for e in events if e.index == 0 for i in e.token_ids)
    assert_same_answers([endless(prompt, max_tokens=20)], [ids], [whole])
    engine.stop("text", 0, "too late", 1)


def test_a_deadline_that_passes_in_the_queue_costs_no_token(engine, rng, monkeypatch):
    with stepped(engine, monkeypatch) as loop, recorded_plans(engine, monkeypatch) as plans:
        late = [
            engine.submit(endless(random_prompt(rng, 30), max_tokens=9, timeout_s=0.01))
            for _ in range(3)
        ]
        patient = engine.submit(endless(random_prompt(rng, 30), max_tokens=9, timeout_s=600.0))
        time.sleep(0.02)
        loop.step(14)
        assert {row.sequence.group.stream for p in plans for row in p.rows} == {patient}
    for stream in late:
        ids, finish = read(stream)
        assert ids == ()
        assert finish.reason is FinishReason.ERROR
        assert finish.error.code is ErrorCode.DEADLINE_EXCEEDED
        assert (finish.timing.prefill_s, finish.timing.decode_s) == (0.0, 0.0)
    assert len(read(patient)[0]) == 9


def test_a_deadline_that_passes_while_decoding_ends_the_completion_with_what_there_is(
    engine, rng, monkeypatch
):
    prompt = random_prompt(rng, 30)
    [whole] = tokens(engine.generate([endless(prompt, max_tokens=200)]))
    with stepped(engine, monkeypatch) as loop:
        start = time.monotonic()
        stream = engine.submit(endless(prompt, max_tokens=200, timeout_s=0.5))
        loop.step(6)
        has_time_left = time.monotonic() < start + 0.5
        time.sleep(0.5)
        loop.step(1)
        assert engine.current_load().num_running == 0
    ids, finish = read(stream)
    assert finish.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert ids == whole[: len(ids)]
    assert len(ids) == 5 or not has_time_left


def test_a_deadline_of_a_decode_counts_from_its_own_start(engine, rng, monkeypatch):
    request = endless(random_prompt(rng, 30), max_tokens=100, timeout_s=600.0)
    first = engine.prefill(request, 30.0)
    list(first)
    with stepped(engine, monkeypatch) as loop:
        stream = engine.decode(first.handle.handle_id, first.handle.epoch, "", 0.01)
        time.sleep(0.02)
        loop.step(2)
    ids, finish = read(stream)
    assert ids == ()
    assert finish.error.code is ErrorCode.DEADLINE_EXCEEDED


def test_a_full_queue_refuses_at_once_and_says_when_to_try_again(bounded, rng, monkeypatch):
    def request(n=1):
        return endless(random_prompt(rng, 9), max_tokens=3, n=n)

    with stepped(bounded, monkeypatch) as loop:
        streams = [bounded.submit(request()) for _ in range(2)]
        assert refusal(bounded.submit, request(n=3)).code is ErrorCode.RESOURCE_EXHAUSTED
        streams.append(bounded.submit(request(n=2)))
        for submit in (bounded.submit, lambda r: bounded.prefill(r, 1.0)):
            error = refusal(submit, request())
            assert error.code is ErrorCode.RESOURCE_EXHAUSTED
            assert error.retry_after_s == 1.0
        assert bounded.current_load().num_waiting == 4
        loop.step(1)
        assert refusal(bounded.submit, request()).code is ErrorCode.RESOURCE_EXHAUSTED
        loop.step(1)
        streams.append(bounded.submit(request()))
    for stream in streams:
        finishes = [event.finish for event in stream if event.finish]
        assert {finish.reason for finish in finishes} == {FinishReason.LENGTH}


def test_offline_requests_wait_for_the_queue_rather_than_fail(bounded, rng):
    requests = [endless(random_prompt(rng, 5), max_tokens=4) for _ in range(30)]
    assert [len(ids) for ids in tokens(bounded.generate(requests))] == [4] * 30
    for n in (4, 5):
        request = endless(random_prompt(rng, 5), max_tokens=4, n=n)
        if n == 4:
            assert len(bounded.generate([request])) == 4
        else:
            error = refusal(bounded.generate, [request])
            assert error.code is ErrorCode.RESOURCE_EXHAUSTED


def test_a_reader_that_falls_too_far_behind_ends_its_own_request_alone(bounded, rng):
    prompt = random_prompt(rng, 9)
    idle = bounded.submit(endless(prompt, max_tokens=60))
    busy = bounded.submit(endless(prompt, max_tokens=10))
    assert len(read(busy)[0]) == 10
    assert_quiet(bounded)
    ids, finish = read(idle)
    assert finish.reason is FinishReason.ERROR
    assert finish.error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert len(ids) == 11
    assert finish.usage.completion_tokens == 11


def test_a_request_id_names_one_open_request(engine, rng, monkeypatch):
    request = endless(random_prompt(rng, 9), max_tokens=3, request_id="mine")
    with stepped(engine, monkeypatch):
        stream = engine.submit(request)
        assert stream.request_id == "mine"
        error = refusal(engine.submit, request)
        assert (error.code, error.field) == (ErrorCode.INVALID_ARGUMENT, "request_id")
        drawn = {engine.submit(replace(request, request_id="")).request_id for _ in range(5)}
        assert len(drawn) == 5
    read(stream)
    assert_quiet(engine)
    read(engine.submit(request))


def test_leases_are_bounded_and_a_prefill_that_fails_gives_its_place_back(
    bounded, rng, monkeypatch
):
    request = endless(random_prompt(rng, 20), max_tokens=5, request_id="first")
    with stepped(bounded, monkeypatch) as loop:
        aborted = bounded.prefill(request, 1.0)
        late = bounded.prefill(replace(request, request_id="", timeout_s=0.01), 1.0)
        error = refusal(bounded.prefill, replace(request, request_id="third"), 1.0)
        assert error.code is ErrorCode.RESOURCE_EXHAUSTED
        assert "2 handles" in str(error)
        bounded.abort("first")
        time.sleep(0.02)
        loop.step(1)
    assert read(aborted)[1].reason is FinishReason.ABORT
    assert read(late)[1].error.code is ErrorCode.DEADLINE_EXCEEDED
    assert_quiet(bounded)
    short = replace(request, params=replace(request.params, max_tokens=1))
    for _ in range(3):
        assert read(bounded.prefill(short, 1.0))[1].reason is FinishReason.LENGTH
    held = []
    for _ in range(2):
        held.append(bounded.prefill(replace(request, request_id=""), 600.0))
        assert [len(event.token_ids) for event in held[-1]] == [1]
    assert refusal(bounded.prefill, request, 1.0).code is ErrorCode.RESOURCE_EXHAUSTED
    for stream in held:
        bounded.release(stream.handle.handle_id, bounded.epoch, "")


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 600.1, float("nan"), float("inf")])
def test_a_lease_is_within_what_the_operator_allows(bounded, lease_s):
    error = refusal(bounded.prefill, endless([1, 2], max_tokens=2), lease_s)
    assert (error.code, error.field) == (ErrorCode.INVALID_ARGUMENT, "lease_s")
    error = refusal(bounded.extend_lease, "0" * 32, bounded.epoch, "", lease_s)
    assert (error.code, error.field) == (ErrorCode.INVALID_ARGUMENT, "lease_s")


def test_a_prefill_of_several_completions_is_refused(engine):
    error = refusal(engine.prefill, endless([1, 2], max_tokens=2, n=2), 1.0)
    assert error.field == "sampling.n"


def test_draining_refuses_what_is_new_and_waits_for_what_is_open(engines, rng, monkeypatch):
    prompt = random_prompt(rng, 9)
    with engines.fresh() as engine:
        [whole] = tokens(engine.generate([endless(prompt, max_tokens=200)]))
        first = engine.prefill(endless(prompt, max_tokens=9), 60.0)
        list(first)
        with stepped(engine, monkeypatch):
            stream = engine.submit(endless(prompt, max_tokens=200))
            assert not engine.drain(0.0)
            for call in (
                lambda: engine.submit(endless(prompt, max_tokens=2)),
                lambda: engine.prefill(endless(prompt, max_tokens=2), 1.0),
                lambda: engine.decode(first.handle.handle_id, engine.epoch, "", None),
            ):
                error = refusal(call)
                assert error.code is ErrorCode.UNAVAILABLE
                assert error.retry_after_s == 1.0
        assert engine.drain(60.0)
        assert read(stream)[0] == whole
        engine.release(first.handle.handle_id, engine.epoch, "")


def test_closing_ends_what_is_open_and_every_later_call_says_so(engines, rng, monkeypatch):
    prompt = random_prompt(rng, 9)
    with engines.fresh() as engine:
        with stepped(engine, monkeypatch) as loop:
            streams = [engine.submit(endless(prompt, max_tokens=240)) for _ in range(20)]
            loop.step(3)
            thread = threading.Thread(target=engine.close)
            thread.start()
            while not engine._intake.is_closed:
                time.sleep(0.001)
        finishes = [read(stream)[1] for stream in streams]
        thread.join(60)
        assert all(finish.error for finish in finishes)
        assert {finish.error.code for finish in finishes} == {ErrorCode.UNAVAILABLE}
        assert not engine.metrics.is_alive
        assert refusal(engine.submit, endless(prompt)).code is ErrorCode.UNAVAILABLE
        assert not engine.abort(streams[0].request_id)
        assert engine.drain(0.0)
        assert engine.audit().problems == ()
        assert engine.audit().free == engine.audit().total
        engine.close()
