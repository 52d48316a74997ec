"""What an engine promises, names and keeps of requests, beyond their tokens."""

from dataclasses import replace

import pytest

from pallasite.engine import ConfigError, ErrorCode, FinishReason, RequestError
from pallasite.engine import runtime as runtime_module
from tests.engine.answers import assert_same_answers
from tests.engine.harness import MAIN, assert_quiet, greedy, random_prompt, stepped


def endless(prompt, **params):
    return greedy(prompt, ignore_eos=True, **params)


def ids_of(stream):
    return [token_id for event in stream for token_id in event.token_ids]


def test_ended_requests_are_not_kept_until_their_deadline(engine, rng):
    prompt = random_prompt(rng, 5)
    for _ in range(4):
        engine.generate([endless(prompt, max_tokens=1, timeout_s=10_000.0)] * 100)
    assert len(engine._scheduler._deadlines) <= 2 * 100 + 64
    engine.generate([endless(prompt, max_tokens=1, timeout_s=10_000.0)] * 65)
    assert len(engine._scheduler._deadlines) <= 2 * 65 + 64


def test_leases_that_are_only_promised_count_against_half_of_the_cache(engine, rng, monkeypatch):
    prompt = random_prompt(rng, 240)  # 15 of 160 pages
    taken = []
    with stepped(engine, monkeypatch):
        for _ in range(5):
            taken.append(engine.prefill(endless(prompt, max_tokens=5), 30.0))
        with pytest.raises(RequestError, match="pages") as refused:
            engine.prefill(endless(prompt, max_tokens=5), 30.0)
        assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    assert [len(ids_of(stream)) for stream in taken] == [1] * 5
    for stream in taken:
        engine.release(stream.handle.handle_id, engine.epoch, "")
    assert_quiet(engine)
    again = engine.prefill(endless(prompt, max_tokens=5), 30.0)
    assert len(ids_of(again)) == 1
    engine.release(again.handle.handle_id, engine.epoch, "")


def test_a_decode_is_named_by_its_caller_and_a_used_name_costs_no_handle(engine, rng, monkeypatch):
    prompt = random_prompt(rng, 20)
    expected = list(engine.generate([endless(prompt, max_tokens=30)])[0].token_ids)
    prefill = engine.prefill(endless(prompt, max_tokens=30), 30.0)
    head = ids_of(prefill)
    handle = prefill.handle
    with stepped(engine, monkeypatch) as loop:
        other = engine.submit(endless(prompt, max_tokens=30, request_id="mine"))
        with pytest.raises(RequestError, match="'mine', which is in flight"):
            engine.decode(handle.handle_id, handle.epoch, "", None, "mine")
        with pytest.raises(RequestError, match="request_id"):
            engine.decode(handle.handle_id, handle.epoch, "", None, "x" * 1000)
        stream = engine.decode(handle.handle_id, handle.epoch, "", None, "yours")
        assert stream.request_id == "yours"
        assert engine.abort("mine")
        loop.step(1)
    assert_same_answers([endless(prompt, max_tokens=30)], [head + ids_of(stream)], [expected])
    assert list(other)[-1].finish.reason is FinishReason.ABORT


def test_offline_completions_may_be_longer_than_a_reader_may_lag(engines, rng):
    requests = [endless(random_prompt(rng, 5), max_tokens=60) for _ in range(4)]
    with engines.fresh(replace(MAIN, max_unread_tokens=8)) as engine:
        completions = engine.generate(requests)
    assert [c.finish.reason for c in completions] == [FinishReason.LENGTH] * 4
    assert [len(c.token_ids) for c in completions] == [60] * 4


def test_a_model_too_large_by_its_shapes_is_refused_before_a_weight_is_read(engines, monkeypatch):
    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(runtime_module, "memory_limit", lambda device: 100_000)
    monkeypatch.setattr(runtime_module, "load_weights", read)
    with pytest.raises(ConfigError, match="got a model that needs"), engines.fresh():
        pass
