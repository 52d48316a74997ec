"""Prefills that nobody decodes, and handles that cannot serve."""

import time

import pytest

from pallasite.engine import ErrorCode, RequestError
from tests.engine.harness import greedy, random_prompt

LEASE_S = 0.5


def prefilled(engine, request):
    """A prefill's stream, or None where too much is leased just now."""
    error = None
    try:
        return engine.prefill(request, LEASE_S)
    except RequestError as raised:
        error = raised
    assert error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert error.retry_after_s > 0
    return None


def refusal(call, *arguments):
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value.code


def test_prefills_without_a_decode_give_their_pages_back_when_the_lease_ends(
    engine, rng, repetitions, figures
):
    count = repetitions(50, 1000)
    handles, num_full, most_leased = [], 0, 0
    while len(handles) < count:
        request = greedy(random_prompt(rng, int(rng.integers(1, 120))), max_tokens=9, tenant="a")
        while (stream := prefilled(engine, request)) is None:
            num_full += 1
            time.sleep(0.05)
        list(stream)
        most_leased = max(most_leased, engine.current_load().num_leased_pages)
        if stream.handle is not None:  # else its first token ended it
            handles.append(stream.handle)
    last = time.monotonic()
    assert most_leased > 0
    while engine.current_load().num_free_pages < engine.current_load().num_pages:
        assert time.monotonic() - last < 60.0
        time.sleep(0.01)
    until_free_s = time.monotonic() - last

    decode, release, extend = engine.decode, engine.release, engine.extend_lease
    for handle in handles[-40:]:
        expired = (handle.handle_id, handle.epoch, "a")
        assert refusal(decode, *expired, None) is ErrorCode.FAILED_PRECONDITION
        assert refusal(release, *expired) is ErrorCode.FAILED_PRECONDITION
        assert refusal(extend, *expired, 1.0) is ErrorCode.FAILED_PRECONDITION
        stale = (handle.handle_id, "0" * 16, "a")
        assert refusal(decode, *stale, None) is ErrorCode.FAILED_PRECONDITION
        forged = (f"{int(rng.integers(2**62)):032x}", handle.epoch, "a")
        assert refusal(decode, *forged, None) is ErrorCode.NOT_FOUND
    for _ in range(20):
        prompt = random_prompt(rng, 20)
        stream = engine.prefill(greedy(prompt, max_tokens=9, ignore_eos=True, tenant="a"), 30.0)
        list(stream)
        key = (stream.handle.handle_id, stream.handle.epoch)
        assert refusal(decode, *key, "b", None) is ErrorCode.PERMISSION_DENIED
        assert refusal(release, *key, "b") is ErrorCode.PERMISSION_DENIED
        decoded = decode(*key, "a", None)
        assert refusal(decode, *key, "a", None) is ErrorCode.FAILED_PRECONDITION
        assert sum(len(event.token_ids) for event in decoded) == 8
    figures(
        prefills=count,
        refused_while_full=num_full,
        lease_s=LEASE_S,
        pages_back_after_s=round(until_free_s, 3),
        leaks=0,
    )
