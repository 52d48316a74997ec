"""`serve` in a process of its own, with a real engine on a tiny model: signals, and how it ends."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pallasite.proto import inference_pb2 as pb
from pallasite.server.client import AsyncClient, RetryPolicy, SamplingParams
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

SCRIPT = """
import sys
import time
from pathlib import Path
from pallasite.engine.config import EngineConfig
from pallasite.engine.dispatcher import Dispatcher
from pallasite.server.config import ServerConfig
from pallasite.server.server import serve
model, compile_cache, go = map(Path, sys.argv[1:])
schedule, plans = Dispatcher.schedule, []

def schedule_and_wait(self, now):
    plan = schedule(self, now)
    if plan is not None:
        plans.append(plan)
    while len(plans) > 3 and not go.exists():
        time.sleep(0.005)
    return plan

Dispatcher.schedule = schedule_and_wait
engine = EngineConfig(
    weights="f32", max_requests=4, max_batch_tokens=32, compile_cache=compile_cache
)
# The wait is no stall.
config = ServerConfig(model=model, port=0, engine=engine, drain_s=600.0, stall_s=600.0)
sys.exit(serve(config, lambda message: print(message, flush=True)))
"""
"""A server whose fourth step waits until the test says go: until then no stream of ours ends."""

ONCE = RetryPolicy(max_attempts=1)


@asynccontextmanager
async def served(tmp_path, compile_cache):
    """Yields the process, its address, once it listens, and the file whose being says go."""
    go = tmp_path / "go"
    folder = write_hf(tmp_path / "tiny", TINY, random_tensors(TINY))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SCRIPT,
        str(folder),
        str(compile_cache),
        str(go),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(300):
            while not (line := await process.stdout.readline()).startswith(b"tiny is served on "):
                assert line, "the server ended before it listened"
        yield process, line.decode().split()[-1], go
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said_not_serving(client):
    """Waits until the server's health says so."""
    health = health_pb2_grpc.HealthStub(client._channel)
    status = health_pb2.HealthCheckResponse.SERVING
    while status == health_pb2.HealthCheckResponse.SERVING:
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING


async def arrived(client, count):
    """Waits until so many requests are open."""
    num_open = 0
    async with asyncio.timeout(60):
        while num_open < count:
            await asyncio.sleep(0.005)
            load = await client.load()
            num_open = load.num_running + load.num_waiting


async def tokens_of(stream):
    """How many tokens a stream had, and whether its end was an orderly one."""
    num_tokens, finish = 0, None
    async for event in stream:
        num_tokens += len(event.token_ids)
        finish = event.finish if event.HasField("finish") else finish
    return num_tokens, finish is not None and finish.reason == pb.FINISH_REASON_LENGTH


async def test_the_first_signal_lets_every_stream_end(tmp_path, compile_cache):
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    async with served(tmp_path, compile_cache) as (process, address, go):
        async with AsyncClient(address, policy=ONCE) as client:
            assert await client.wait_until_ready(60.0)
            streams = [
                asyncio.create_task(tokens_of(client.generate([i + 1], sampling)))
                for i in range(50)
            ]
            await arrived(client, 50)
            process.send_signal(signal.SIGTERM)
            await said_not_serving(client)
            with pytest.raises(grpc.RpcError) as caught:
                await tokens_of(client.generate([1], sampling))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            go.touch()
            ends = await asyncio.gather(*streams)
        assert ends == [(80, True)] * 50
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_the_second_signal_ends_it_with_streams_open(tmp_path, compile_cache):
    sampling = SamplingParams(max_tokens=500, ignore_eos=True)
    async with (
        served(tmp_path, compile_cache) as (process, address, go),
        AsyncClient(address, policy=ONCE) as client,
    ):
        assert await client.wait_until_ready(60.0)
        streams = [
            asyncio.create_task(tokens_of(client.generate([1], sampling))) for _ in range(80)
        ]
        await arrived(client, 80)
        process.send_signal(signal.SIGTERM)
        # Two signals at once would be one.
        await said_not_serving(client)
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*streams, return_exceptions=True)
        go.touch()
        assert await asyncio.wait_for(process.wait(), 60) == 128 + signal.SIGTERM
    assert all(isinstance(end, grpc.RpcError) for end in ends)
