"""What the reliability tests share: the engines on a tiny model, a gRPC door to one, and figures.

Each test prints one line of JSON. `--full` repeats as often as the figures are stated for.
"""

import json
from contextlib import asynccontextmanager

import pytest

from pallasite.server.chat_template import ChatTemplate
from pallasite.server.client import AsyncClient, RetryPolicy
from pallasite.server.config import ServerConfig
from pallasite.server.grpc_server import GrpcServer
from pallasite.server.tokenizer import load_tokenizer
from tests.engine.harness import Engines, engines_of_run


@pytest.fixture(scope="session")
def engines(request):
    """Loads an engine when a test first asks for its configuration; closes all at the end."""
    engines = engines_of_run(request)
    yield engines
    engines.close()


@pytest.fixture
def engine(engines: Engines):
    """The shared engine with pages for all."""
    return engines.get()


@pytest.fixture(autouse=True)
def leak_audit(engines: Engines):
    """Whatever a test did, every page comes back and nothing stays open."""
    yield
    engines.assert_quiet()


@pytest.fixture
def figures(request, capsys):
    """Prints a test's figures as a line of JSON."""

    def show(**values):
        with capsys.disabled():
            print("\n" + json.dumps({"test": request.node.name, **values}))

    return show


@pytest.fixture
def door(engines: Engines):
    """`async with door(engine) as client`: a client of a gRPC server over an engine."""

    @asynccontextmanager
    async def open_door(engine):
        folder = engines.checkpoint
        tokenizer = load_tokenizer(folder)
        template = ChatTemplate(tokenizer.chat_template, tokenizer)
        server = GrpcServer(ServerConfig(model=folder, port=0), engine, tokenizer, template)
        await server.start()
        try:
            async with AsyncClient(server.address, policy=RetryPolicy(max_attempts=1)) as client:
                yield client
        finally:
            await server.stop()

    return open_door
