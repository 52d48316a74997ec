"""From a config to a served model: load, listen, and on a signal drain and leave."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable

from pallasite.engine.engine import Engine
from pallasite.server.auth import ApiKeys
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.config import ServerConfig
from pallasite.server.grpc_server import GrpcServer
from pallasite.server.tokenizer import load_tokenizer

_HURRY_S = 1.0


def serve(config: ServerConfig, progress: Callable[[str], None] = print) -> int:
    """Loads the model and serves it until SIGTERM or SIGINT; returns the exit status.

    The first signal drains: 0 where every request in flight ended in time, else 1. A second one
    cuts them off and exits within two seconds, with 128 + its number. Raises ConfigError where
    something that the operator chose cannot work.
    """
    ApiKeys(config.api_keys)
    tokenizer = load_tokenizer(config.model)
    source = tokenizer.chat_template
    chat_template = None if source is None else ChatTemplate(source, tokenizer)
    engine = Engine.load(config.model, config.engine, progress)
    try:
        for name, folder in config.adapters.items():
            engine.load_adapter(name, folder)
            progress(f"adapter {name} is loaded")
        server = GrpcServer(config, engine, tokenizer, chat_template)
        return asyncio.run(_serve_until_signal(server, config, progress))
    finally:
        engine.close()


async def _serve_until_signal(
    server: GrpcServer, config: ServerConfig, progress: Callable[[str], None]
) -> int:
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        await server.start()
        progress(f"{config.served_name} is served on {server.address}")
        if server.admin_address is not None:
            progress(f"Admin is served on {server.admin_address}")
        await signals.get()
        progress(f"stopping: requests in flight have {config.drain_s:g} s; again to stop at once")
        draining = loop.create_task(server.drain(config.drain_s))
        again = loop.create_task(signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        if not again.done():
            again.cancel()
            status = 0 if draining.result() else 1
        else:
            status = 128 + again.result()
            draining.cancel()
            _exit_soon(status)
        return status
    finally:
        await server.stop()


def _exit_soon(status: int) -> None:
    """Ends the process by force, should a thread or a step hold up its orderly end."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(_HURRY_S, leave)
    timer.daemon = True
    timer.start()
