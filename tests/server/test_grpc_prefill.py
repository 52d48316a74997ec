"""Prefill and Decode over a real socket and a fake engine: handles, leases and the text of both."""

import asyncio

import grpc
import pytest

from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import SamplingParams, bad_fields
from tests.server.serving import collect, eventually, serving


@pytest.mark.parametrize("stop", [[], ["cab"], ["b"], ["bc", "ca"]])
async def test_prefill_and_decode_say_what_generate_says(tmp_path, stop):
    sampling = SamplingParams(max_tokens=8, stop=stop)
    async with serving(tmp_path) as s:
        texts, token_ids, finishes = await collect(s.client.generate("abc", sampling))
        first = await s.client.prefill("abc", sampling)
        assert not first.event.HasField("finish")
        rest_texts, rest_ids, rest_finishes = await collect(s.client.decode(first.handle))
        assert s.engine.audit().leased == 0
    assert {0: first.event.text + rest_texts[0]} == texts
    assert {0: [*first.event.token_ids, *rest_ids[0]]} == token_ids
    assert rest_finishes[0].reason == finishes[0].reason
    assert rest_finishes[0].stop_text == finishes[0].stop_text
    assert rest_finishes[0].usage == finishes[0].usage


async def test_half_a_character_waits_from_prefill_to_decode(tmp_path):
    async with serving(tmp_path) as s:
        first = await s.client.prefill("é", SamplingParams(max_tokens=2))
        texts, _, _ = await collect(s.client.decode(first.handle))
    assert (first.event.text, texts) == ("", {0: "é"})


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"stop": ["a"]}, {"stop_token_ids": [97]}])
async def test_a_prefill_that_the_first_token_ends_leaves_no_lease(tmp_path, sampling):
    async with serving(tmp_path) as s:
        answer = await s.client.prefill("abc", SamplingParams(**sampling))
        assert not answer.HasField("handle")
        assert answer.event.HasField("finish")
        assert answer.event.finish.usage.completion_tokens == 1
        assert s.engine.audit().leased == 0
        assert not s.engine.rows
    assert answer.event.text == ("a" if "max_tokens" in sampling else "")


async def test_a_handle_serves_once_and_its_own_tenant(tmp_path):
    async def code_of(awaitable):
        with pytest.raises(grpc.RpcError) as caught:
            await awaitable
        if caught.value.code() is status.FAILED_PRECONDITION:
            assert bad_fields(caught.value) == ["handle_id"]
        return caught.value.code()

    status = grpc.StatusCode
    async with serving(tmp_path) as s:
        first = await s.client.prefill("abc", SamplingParams(max_tokens=4), lease_s=50.0)
        assert first.handle.expires_in_s == 50
        longer = await s.client.extend_lease(first.handle, 55.0)
        assert longer.expires_in_s == 55
        await collect(s.client.decode(first.handle))
        assert await code_of(collect(s.client.decode(first.handle))) is status.FAILED_PRECONDITION
        assert await code_of(s.client.release(first.handle)) is status.FAILED_PRECONDITION
        forged = pb.KvHandle(handle_id="0" * 32, epoch=s.engine.epoch)
        assert await code_of(collect(s.client.decode(forged))) is status.NOT_FOUND
        stale = pb.KvHandle(handle_id=first.handle.handle_id, epoch="before")
        assert await code_of(s.client.extend_lease(stale)) is status.FAILED_PRECONDITION
        second = await s.client.prefill("abc", SamplingParams(max_tokens=4))
        assert second.handle.expires_in_s == s.engine.config.max_lease_s
        await s.client.release(second.handle)
        assert s.engine.audit().leased == 0
        third = await s.client.prefill("abc", SamplingParams(max_tokens=4), lease_s=0.01)
        await eventually(lambda: not s.engine.leases)
        assert await code_of(collect(s.client.decode(third.handle))) is status.FAILED_PRECONDITION


async def test_a_prefill_whose_caller_goes_leaves_no_lease(tmp_path):
    async with serving(tmp_path) as s:
        s.engine.is_paused = True
        call = asyncio.create_task(s.client.prefill("abc", SamplingParams(max_tokens=9)))
        await eventually(lambda: s.engine.rows)
        # Too late to abort: the engine does not see it, and grants the lease.
        s.engine.abort = lambda request_id: False
        call.cancel()
        await eventually(lambda: s.server._door.num_calls == 0)
        s.engine.is_paused = False
        await eventually(lambda: s.engine.ended_handles)
        assert not s.engine.leases
