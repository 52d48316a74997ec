"""Streams: both kinds of reader, lagging ones, and that each completion ends once."""

import asyncio
import threading

import pytest

from pallasite.engine.request import (
    Finish,
    FinishReason,
    KvHandle,
    Timing,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from pallasite.engine.stream import TokenStream, wake

FINISH = Finish(
    reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1),
    timing=Timing(queue_s=0.0, prefill_s=0.0, decode_s=0.0),
)
HANDLE = KvHandle(handle_id="0" * 32, epoch="e", expires_in_s=1.0)


def event(*token_ids, index=0, finish=None, **fields):
    return TokenEvent(index=index, token_ids=token_ids, finish=finish, **fields)


def test_a_reader_that_keeps_up_gets_each_event_as_it_was_put():
    stream = TokenStream("r")
    reader = iter(stream)
    for token_id in (5, 6):
        stream.put(event(token_id))
        assert stream.num_unread == 1
        assert next(reader) == event(token_id)
        assert stream.num_unread == 0
    assert not stream.is_complete
    stream.put(event(7, finish=FINISH))
    assert stream.is_complete
    assert next(reader) == event(7, finish=FINISH)
    assert list(reader) == []


def test_what_a_lagging_reader_left_is_joined_in_order_and_complete():
    stream = TokenStream("r", 2)
    scores = (None, TokenLogprobs(token_id=9, logprob=-1.0))
    for token_id in range(300):
        logprobs = (TokenLogprobs(token_id=token_id, logprob=-0.5),)
        first = {"prompt_logprobs": scores} if token_id == 0 else {}
        stream.put(event(token_id, logprobs=logprobs, **first))
        stream.put(event(1000 + token_id, index=1))
    assert stream.num_unread == 600
    stream.put(event(index=1, finish=FINISH))
    stream.put(event(300, finish=FINISH, logprobs=()))
    first, second = stream
    assert first.index == 0
    assert first.token_ids == tuple(range(301))
    assert [entry.token_id for entry in first.logprobs] == list(range(300))
    assert first.prompt_logprobs == scores
    assert first.finish == second.finish == FINISH
    assert second.token_ids == tuple(range(1000, 1300))
    assert second.prompt_logprobs is None
    assert stream.num_unread == 0


def test_a_handle_ends_a_stream_without_a_finish():
    stream = TokenStream("r")
    stream.put(event(3), HANDLE)
    assert stream.is_complete
    assert list(stream) == [event(3)]
    assert stream.handle == HANDLE


def test_a_reader_in_a_thread_waits_for_what_comes():
    stream = TokenStream("r", 2)
    received = []
    thread = threading.Thread(target=lambda: received.extend(stream))
    thread.start()
    for token_id in range(100):
        stream.put(event(token_id))
    stream.put(event(index=1, finish=FINISH))
    stream.put(event(finish=FINISH))
    thread.join(10)
    assert not thread.is_alive()
    assert [i for e in received for i in e.token_ids] == list(range(100))
    assert sorted(e.index for e in received if e.finish) == [0, 1]


async def test_an_asynchronous_reader_is_woken_from_another_thread():
    stream = TokenStream("r")
    step = threading.Semaphore(0)

    def engine():
        for token_id in range(50):
            step.acquire()
            stream.put(event(token_id, finish=FINISH if token_id == 49 else None))
            wake([stream])

    thread = threading.Thread(target=engine)
    thread.start()
    received = []
    step.release()
    async with asyncio.timeout(30):
        async for e in stream:
            received.append(e)
            step.release()
    thread.join()
    assert received == [event(i, finish=FINISH if i == 49 else None) for i in range(50)]


async def test_one_wake_resumes_the_readers_of_many_streams():
    streams = [TokenStream(str(i)) for i in range(20)]

    async def read(stream):
        return [e async for e in stream]

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    await asyncio.sleep(0)
    for i, stream in enumerate(streams):
        stream.put(event(i, finish=FINISH))
    wake(streams)
    async with asyncio.timeout(30):
        received = await asyncio.gather(*readers)
    assert received == [[event(i, finish=FINISH)] for i in range(20)]


async def test_waking_a_reader_that_was_cancelled_or_left_is_harmless():
    stream = TokenStream("r")

    async def read():
        return [e async for e in stream]

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    stream.put(event(1))
    wake([stream])
    await asyncio.sleep(0)
    stream.put(event(2, finish=FINISH))
    wake([stream])
    assert await read() == [event(1, 2, finish=FINISH)]


def test_waking_a_reader_whose_event_loop_was_closed_is_harmless():
    stream = TokenStream("r")

    async def begin():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await anext(aiter(stream))

    asyncio.run(begin())
    stream.put(event(1, finish=FINISH))
    wake([stream])
    assert list(stream) == [event(1, finish=FINISH)]
