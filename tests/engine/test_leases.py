"""Leases: the right code for every handle that cannot serve, and pages that come back once."""

import time

import pytest

from pallasite.engine import ErrorCode, Request, RequestError
from pallasite.engine.leases import LeaseTable
from pallasite.engine.sequence import new_group
from pallasite.engine.stream import TokenStream

LONG_S = 60.0


def held(tenant="a", num_pages=1):
    request = Request(prompt_ids=(1,), tenant=tenant)
    [sequence] = new_group(request, TokenStream("r"), 0, LONG_S).sequences
    sequence.pages = list(range(num_pages))
    return sequence


def granted(table, sequence=None, lease_s=LONG_S):
    table.reserve(1000)
    return table.grant(sequence or held(), lease_s)


def refusal(call, *arguments):
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value


def key(handle):
    return handle.handle_id, handle.epoch


def test_a_handle_is_128_random_bits_of_this_epoch():
    table = LeaseTable(100, 60.0)
    handles = [granted(table) for _ in range(100)]
    ids = {handle.handle_id for handle in handles}
    assert len(ids) == 100
    assert all(len(i) == 32 and int(i, 16) < 2**128 for i in ids)
    assert {handle.epoch for handle in handles} == {table.epoch}
    assert LeaseTable(1, 60.0).epoch != table.epoch


@pytest.mark.parametrize("method", ["take", "release", "extend"])
def test_each_method_refuses_a_handle_for_what_is_wrong_with_it(method):
    table = LeaseTable(10, 60.0)
    call = getattr(table, method)
    more = (LONG_S,) if method == "extend" else ()

    def code_and_field(handle_id, epoch, tenant):
        error = refusal(call, handle_id, epoch, tenant, *more)
        return error.code, error.field

    good = granted(table)
    foreign = code_and_field(*key(good), "b")
    assert foreign == (ErrorCode.PERMISSION_DENIED, "handle")
    stale = code_and_field(good.handle_id, "another", "a")
    assert stale == (ErrorCode.FAILED_PRECONDITION, "handle.epoch")
    forged = code_and_field("0" * 32, table.epoch, "a")
    assert forged == (ErrorCode.NOT_FOUND, "handle")

    expired = granted(table, lease_s=0.0)
    assert code_and_field(*key(expired), "a") == (ErrorCode.FAILED_PRECONDITION, "handle")
    table.collect(time.monotonic())
    assert code_and_field(*key(expired), "a") == (ErrorCode.FAILED_PRECONDITION, "handle")
    revoked = granted(table)
    table.take(*key(good), "a")
    table.revoke_all("was lost")
    assert "was lost" in str(refusal(call, *key(revoked), "a", *more))
    assert code_and_field(*key(revoked), "a") == (ErrorCode.FAILED_PRECONDITION, "handle")
    assert table.num_pages() == 0


def test_a_handle_serves_once_and_a_second_try_says_how_the_first_ended_it():
    table = LeaseTable(10, 60.0)
    sequence = held()
    taken, released = granted(table, sequence), granted(table)
    assert table.take(*key(taken), "a") is sequence
    for call in (table.take, table.release):
        error = refusal(call, *key(taken), "a")
        assert error.code is ErrorCode.FAILED_PRECONDITION
        assert "was decoded from" in str(error)
    table.release(*key(released), "a")
    assert "was released" in str(refusal(table.take, *key(released), "a"))


def test_pages_are_collected_once_after_the_lease_or_the_release():
    table = LeaseTable(10, 60.0)
    short, long, freed = held(num_pages=2), held(num_pages=3), held(num_pages=4)
    granted(table, short, 20.0)
    granted(table, long, 60.0)
    now = time.monotonic()
    table.release(*key(granted(table, freed)), "a")
    assert table.num_pages() == 9, "released pages are held until they are collected"
    assert table.collect(now) == [freed]
    assert table.num_pages() == 5
    assert table.collect(now + 1) == []
    assert table.collect(now + 21) == [short]
    assert table.collect(now + 21) == []
    assert table.num_pages() == 3
    assert table.sequences() == [long]


def test_an_extended_lease_ends_when_it_now_says():
    table = LeaseTable(10, 60.0)
    sequence = held()
    handle = granted(table, sequence, 20.0)
    extended = table.extend(*key(handle), "a", 60.0)
    assert (extended.handle_id, extended.epoch) == key(handle)
    assert extended.expires_in_s == 60.0
    now = time.monotonic()
    assert table.collect(now + 30) == []
    assert table.collect(now + 61) == [sequence]


def test_handles_are_bounded_and_a_promise_counts_as_one():
    table = LeaseTable(2, 60.0)
    table.reserve(100)
    first = table.grant(held(), LONG_S)
    table.reserve(100)
    error = refusal(table.reserve, 100)
    assert error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert error.retry_after_s == 1.0
    table.cancel()
    table.reserve(100)
    table.cancel()
    table.release(*key(first), "a")
    table.reserve(100)
    table.reserve(100)
    assert refusal(table.reserve, 100).code is ErrorCode.RESOURCE_EXHAUSTED


def test_leased_pages_are_bounded():
    table = LeaseTable(100, 60.0)
    granted(table, held(num_pages=5))
    table.reserve(5)
    error = refusal(table.reserve, 4)
    assert error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert "5 pages" in str(error)


def test_what_is_remembered_of_ended_handles_is_bounded():
    table = LeaseTable(10_000, 60.0)
    first = granted(table)
    table.release(*key(first), "a")
    for _ in range(5000):
        table.release(*key(granted(table)), "a")
        table.collect(time.monotonic())
    assert refusal(table.take, *key(first), "a").code is ErrorCode.NOT_FOUND
    assert len(table._ended) == 4096
    assert table.sequences() == []
