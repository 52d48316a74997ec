"""A server over the fake engine or a real one, and a client of it, while a `with` block lasts."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from pallasite.proto import admin_pb2_grpc, control_pb2_grpc, inference_pb2_grpc
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.client import AsyncClient, RetryPolicy, bad_fields
from pallasite.server.config import ServerConfig
from pallasite.server.grpc_server import GrpcServer
from pallasite.server.tokenizer import load_tokenizer
from tests.server.fake_engine import FakeEngine
from tests.tiny_checkpoints import CHAT_TEMPLATE, byte_tokenizer, write_json


def make_tokenizer(folder: Path, chat_template: str = CHAT_TEMPLATE):
    """The byte tokenizer of the tiny checkpoints, with its chat template or another."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", byte_tokenizer())
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "chat_template": chat_template,
        },
    )
    return load_tokenizer(folder)


@asynccontextmanager
async def serving(
    tmp_path, engine=None, *, api_key=None, policy=None, chat_template=CHAT_TEMPLATE, **config
):
    """Yields server, engine, client and the raw stubs of one channel."""
    engine = engine or FakeEngine()
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template)
    server_config = ServerConfig(model=Path("tiny"), port=0, **config)
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    server = GrpcServer(server_config, engine, tokenizer, template)
    await server.start()
    channel = grpc.aio.insecure_channel(
        server.address, options=[("grpc.max_send_message_length", 1 << 30)]
    )
    admin = None
    if server.admin_address is not None:
        admin = grpc.aio.insecure_channel(server.admin_address)
    policy = policy or RetryPolicy(max_attempts=1)
    try:
        async with AsyncClient(server.address, api_key=api_key, policy=policy) as client:
            yield SimpleNamespace(
                server=server,
                engine=engine,
                client=client,
                channel=channel,
                inference=inference_pb2_grpc.InferenceStub(channel),
                control=control_pb2_grpc.ControlStub(channel),
                admin=None if admin is None else admin_pb2_grpc.AdminStub(admin),
            )
    finally:
        await channel.close()
        if admin is not None:
            await admin.close()
        await server.stop()
        engine.close()


@asynccontextmanager
async def serving_engine(engine, folder, *, api_key=None, **config):
    """Yields server, client, stubs and Admin's stub of a real engine, which stays; at the end every
    page must be free and nothing may have been compiled."""
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    server_config = ServerConfig(model=folder, port=0, admin_port=0, **config)
    server = GrpcServer(server_config, engine, tokenizer, template)
    await server.start()
    policy = RetryPolicy(max_attempts=1)
    # Another test's engine may have been compiled in this process before.
    num_compilations = engine.metrics.compilations
    try:
        async with (
            AsyncClient(server.address, api_key=api_key, policy=policy) as client,
            grpc.aio.insecure_channel(server.address) as channel,
            grpc.aio.insecure_channel(server.admin_address) as admin,
        ):
            yield SimpleNamespace(
                server=server,
                client=client,
                inference=inference_pb2_grpc.InferenceStub(channel),
                admin=admin_pb2_grpc.AdminStub(admin),
            )
        await eventually(lambda: is_quiet(engine))
        assert engine.audit().problems == ()
        assert engine.metrics.compilations == num_compilations
        assert engine.metrics.misses == 0
    finally:
        await server.stop()


def is_quiet(engine):
    """Whether all pages are free and nothing is open."""
    audit, load = engine.audit(), engine.current_load()
    is_idle = (load.num_running, load.num_waiting, load.num_leased_pages) == (0, 0, 0)
    return is_idle and audit.free == audit.total


async def collect(stream):
    """The events of a stream as (text, token ids, last finish) by index."""
    texts, token_ids, finishes = {}, {}, {}
    async for event in stream:
        assert event.index not in finishes, "an event after the completion's finish"
        texts[event.index] = texts.get(event.index, "") + event.text
        token_ids.setdefault(event.index, []).extend(event.token_ids)
        if event.HasField("finish"):
            finishes[event.index] = event.finish
    return texts, token_ids, finishes


async def ids_of(stream):
    """The token ids of a stream of one completion."""
    return [token_id async for event in stream for token_id in event.token_ids]


async def refused(call, code=grpc.StatusCode.INVALID_ARGUMENT):
    """The fields that a call was refused for, and its message."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    return bad_fields(caught.value), caught.value.details()


async def eventually(condition, timeout_s=30.0):
    """Waits until `condition()` holds: what follows from a call's end is true a little later."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
