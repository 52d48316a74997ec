"""The clients: what they try again and when, deadlines, cancels, and that both say the same."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.proto import inference_pb2 as pb
from pallasite.server import client_messages as messages
from pallasite.server.client import (
    AsyncClient,
    Client,
    RetryPolicy,
    SamplingParams,
    bad_fields,
    retry_after_s,
)
from pallasite.server.client_retry import Deadline
from pallasite.server.config import ServerConfig
from pallasite.server.grpc_server import GrpcServer
from tests.server.fake_engine import FakeEngine
from tests.server.serving import eventually, make_tokenizer, serving


class Failure(grpc.RpcError):
    """A call's error as both clients see it."""

    def __init__(self, code, trailers=()):
        super().__init__()
        self._code, self._trailers = code, trailers

    def code(self):
        return self._code

    def trailing_metadata(self):
        return self._trailers


def details(*messages):
    status = status_pb2.Status(code=8)
    for message in messages:
        packed = any_pb2.Any()
        packed.Pack(message)
        status.details.append(packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)


BUSY, AWAY = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
RETRY_INFO = error_details_pb2.RetryInfo(
    retry_delay=duration_pb2.Duration(seconds=1, nanos=250_000_000)
)


def test_the_server_says_how_long_to_wait():
    policy = RetryPolicy()
    busy = Failure(BUSY, details(RETRY_INFO))
    assert retry_after_s(busy) == 1.25
    assert policy.delay_s(busy, 1, None) == 1.25
    assert policy.delay_s(busy, 1, 2.0) == 1.25
    assert policy.delay_s(busy, 1, 1.0) is None, "the deadline would have passed"
    assert policy.delay_s(busy, 5, None) is None, "it was the last attempt"
    pushback = (("grpc-retry-pushback-ms", "40"), *details(RETRY_INFO))
    assert policy.delay_s(Failure(BUSY, pushback), 1, None) == 0.04
    for never in ("-1", "soon", ""):
        failure = Failure(AWAY, (("grpc-retry-pushback-ms", never),))
        assert policy.delay_s(failure, 1, None) is None


def test_what_is_not_worth_another_try_is_not_tried():
    policy = RetryPolicy()
    assert policy.delay_s(Failure(BUSY), 1, None) is None, "busy, and no word of when"
    for code in set(grpc.StatusCode) - {BUSY, AWAY}:
        assert policy.delay_s(Failure(code, details(RETRY_INFO)), 1, None) is None, code


def test_the_wait_grows_at_random_up_to_its_longest():
    policy = RetryPolicy(max_attempts=99, first_backoff_s=0.1, max_backoff_s=1.0)
    for num_attempts, longest_s in [(1, 0.1), (2, 0.2), (4, 0.8), (5, 1.0), (50, 1.0)]:
        waits = [policy.delay_s(Failure(AWAY), num_attempts, None) for _ in range(300)]
        assert 0 <= min(waits) < 0.2 * longest_s
        assert 0.8 * longest_s < max(waits) <= longest_s


def test_bad_fields_are_read_off_the_details():
    violation = error_details_pb2.BadRequest.FieldViolation
    bad = error_details_pb2.BadRequest(field_violations=[violation(field="a.b")])
    assert bad_fields(Failure(AWAY, details(RETRY_INFO, bad))) == ["a.b"]
    assert bad_fields(Failure(AWAY)) == []


def test_a_deadline_counts_down_to_zero():
    assert Deadline(None).left_s is None
    deadline = Deadline(1000.0)
    first_s = deadline.left_s
    assert 900 < first_s <= 1000.0
    time.sleep(0.01)
    assert deadline.left_s <= first_s - 0.01
    deadline = Deadline(0.02)
    time.sleep(0.03)
    assert deadline.left_s == 0.0


async def test_a_busy_server_is_asked_again_when_it_said(tmp_path):
    engine = FakeEngine()
    busy = RequestError("busy", code=ErrorCode.RESOURCE_EXHAUSTED, retry_after_s=0.08)
    refusals = [busy, busy]
    submit = engine.submit

    def refusing(request):
        if refusals:
            raise refusals.pop()
        return submit(request)

    engine.submit = refusing
    async with serving(tmp_path, engine, policy=RetryPolicy(max_attempts=3)) as s:
        start = time.monotonic()
        sampling = SamplingParams(max_tokens=2)
        text = "".join([event.text async for event in s.client.generate("ab", sampling)])
        assert text == "ab"
        assert time.monotonic() - start >= 0.16
        refusals += [busy, busy, busy]
        with pytest.raises(grpc.RpcError) as caught:
            [event async for event in s.client.generate("ab")]
        assert caught.value.code() is BUSY
        assert refusals == []
        refusals += [busy]
        assert len((await s.client.score("ab")).token_ids) == 2


async def test_a_stream_that_has_begun_is_not_begun_again(tmp_path):
    error = RequestError("gone", code=ErrorCode.UNAVAILABLE, retry_after_s=0.0)
    engine = FakeEngine(step_s=0.02)
    async with serving(tmp_path, engine, policy=RetryPolicy(max_attempts=5)) as s:
        texts = []

        async def read():
            async for event in s.client.generate("ab", SamplingParams(max_tokens=99)):
                texts.append(event.text)
                engine.fault = (ord("a"), error)

        with pytest.raises(grpc.RpcError) as caught:
            await read()
        assert caught.value.code() is AWAY
        assert texts[0].startswith("a")
        assert len(engine.submitted) == 1


async def test_a_client_waits_for_a_server_that_comes_later(tmp_path):
    policy = RetryPolicy(max_attempts=1000, max_backoff_s=0.1)
    with reserved_port() as port:
        address = f"127.0.0.1:{port}"
        async with AsyncClient(address, policy=policy) as client:
            assert await client.wait_until_ready(0.2) is False
            once = AsyncClient(address, policy=RetryPolicy(max_attempts=1))
            with pytest.raises(grpc.RpcError) as caught:
                await once.tokenize("ab")
            assert caught.value.code() is AWAY
            await once.close()
            call = asyncio.create_task(client.tokenize("ab"))
            await asyncio.sleep(0.2)
            assert not call.done()
            async with serving_at(tmp_path, port):
                assert await call == list(b"ab")
                assert await client.wait_until_ready(10.0)


@contextlib.contextmanager
def reserved_port():
    """A port that nobody listens on, and that no other process is given."""
    with socket.socket() as holder:
        # Beside a socket that does not listen, one that asks for this port by its number may.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextlib.asynccontextmanager
async def serving_at(tmp_path, port):
    engine = FakeEngine()
    tokenizer = make_tokenizer(tmp_path)
    server = GrpcServer(ServerConfig(model=Path("tiny"), port=port), engine, tokenizer, None)
    await server.start()
    try:
        yield
    finally:
        await server.stop()
        engine.close()


async def test_an_async_stream_ends_quietly_where_it_was_cancelled(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        stream = s.client.generate("ab", SamplingParams(max_tokens=500))
        count = 0
        async for _ in stream:
            count += 1
            stream.cancel()
        assert count == 1
        await eventually(lambda: not s.engine.rows)
        # The task that reads is another matter: it must not swallow its own cancelling.
        reading = asyncio.create_task(
            drain(s.client.generate("ab", SamplingParams(max_tokens=500)))
        )
        await eventually(lambda: s.engine.rows)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await eventually(lambda: not s.engine.rows)


async def drain(stream):
    return [event async for event in stream]


async def test_the_synchronous_client_says_the_same(tmp_path):
    def talk(address):
        said = {}
        sampling = SamplingParams(max_tokens=5)
        with Client(address, policy=RetryPolicy(max_attempts=1), timeout_s=60.0) as client:
            assert client.wait_until_ready(20.0)
            stream = client.generate("abc", sampling, request_id="r")
            said["text"] = "".join(event.text for event in stream)
            said["request_id"] = stream.request_id
            chat = client.chat([{"role": "user", "content": "a"}], sampling)
            said["chat"] = sum(len(event.token_ids) for event in chat)
            first = client.prefill("abc", sampling, lease_s=60.0)
            said["lease"] = client.extend_lease(first.handle, 50.0).expires_in_s
            rest = "".join(event.text for event in client.decode(first.handle))
            said["halves"] = first.event.text + rest
            second = client.prefill("abc", sampling)
            client.release(second.handle)
            said["ids"] = client.tokenize("ab")
            said["detokenized"] = client.detokenize([97, 98])
            said["scores"] = list(client.score([10, 20]).logprobs)
            said["model"] = client.model_info().model
            said["epoch"] = client.server_info().epoch
            said["running"] = client.load().num_running
            said["aborted"] = client.abort("none")
            said["count"] = 0
            long = client.generate("abc", SamplingParams(max_tokens=500))
            for _ in long:
                said["count"] += 1
                long.cancel()
            with pytest.raises(grpc.RpcError) as caught:
                list(client.generate("abc", SamplingParams(max_tokens=500), timeout_s=0.05))
            said["late"] = caught.value.code()
            with pytest.raises(grpc.RpcError) as caught:
                client.score([320])
            said["bad"] = bad_fields(caught.value)
        return said

    async with serving(tmp_path, FakeEngine(step_s=0.005)) as s:
        said = await asyncio.to_thread(talk, s.server.address)
        await eventually(lambda: not s.engine.rows)
        assert s.engine.audit().leased == 0
        epoch = s.engine.epoch
    assert said == {
        "text": "abcab",
        "request_id": "r",
        "chat": 5,
        "lease": 50.0,
        "halves": "abcab",
        "ids": [97, 98],
        "detokenized": "ab",
        "scores": [pytest.approx(-0.2)],
        "model": "tiny",
        "epoch": epoch,
        "running": 0,
        "aborted": False,
        "count": 1,
        "late": grpc.StatusCode.DEADLINE_EXCEEDED,
        "bad": ["token_ids"],
    }


async def test_a_synchronous_stream_is_cancelled_from_another_thread(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        with Client(s.server.address) as client:
            stream = client.generate([1, 2], SamplingParams(max_tokens=500))
            reader = threading.Thread(target=lambda: list(stream))
            reader.start()
            await eventually(lambda: s.engine.rows)
            await asyncio.to_thread(stream.cancel)
            await asyncio.to_thread(reader.join, 30)
            assert not reader.is_alive()
            await eventually(lambda: s.engine.aborted)
            await eventually(lambda: not s.engine.rows)


async def test_a_stream_that_is_cancelled_while_its_call_begins_ends(tmp_path):
    async with serving(tmp_path, FakeEngine(step_s=0.01)) as s:
        with Client(s.server.address) as client:
            stream = client.generate([1, 2], SamplingParams(max_tokens=500))
            begin = stream._begin

            def begin_late(left_s):
                call = begin(left_s)
                stream.cancel()
                return call

            stream._begin = begin_late
            assert len(await asyncio.to_thread(list, stream)) < 500
            await eventually(lambda: not s.engine.rows)


async def test_a_busy_server_is_asked_again_by_the_synchronous_client_too(tmp_path):
    engine = FakeEngine()
    busy = RequestError("busy", code=ErrorCode.RESOURCE_EXHAUSTED, retry_after_s=0.01)
    refusals = [busy, busy]
    submit = engine.submit
    engine.submit = lambda request: _raise(refusals.pop()) if refusals else submit(request)

    def talk(address):
        with Client(address) as client:
            stream = client.generate("ab", SamplingParams(max_tokens=2))
            text = "".join(event.text for event in stream)
            refusals.append(busy)
            return text, len(client.score("ab").token_ids)

    async with serving(tmp_path, engine) as s:
        assert await asyncio.to_thread(talk, s.server.address) == ("ab", 2)
    assert refusals == []


def _raise(error):
    raise error


def test_messages_carry_what_was_asked():
    chat = messages.chat_prompt([{"role": "user", "content": "a"}])
    request = messages.generate_request(chat, SamplingParams(n=2), 3, "a")
    assert (request.chat, request.sampling.n, request.priority) == (chat, 2, 3)
    assert request.adapter == "a"
    plain = messages.generate_request([1, 2], None, 0, "")
    assert plain == pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))
    assert not plain.HasField("sampling")
    assert not plain.HasField("adapter")
    score = messages.score_request([1, 2], 3, 0, "a")
    assert score == pb.ScoreRequest(token_ids=pb.TokenIds(ids=[1, 2]), top=3, adapter="a")
    assert not messages.score_request([1, 2], 3, 0, "").HasField("adapter")
    assert messages.call_metadata("k", "r") == (
        ("authorization", "Bearer k"),
        ("x-request-id", "r"),
    )
    assert messages.call_metadata(None, "") == ()
