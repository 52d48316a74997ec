"""`pallasite serve`, and `pallasite demo`, which shows that serving works."""

import argparse
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.models.errors import ConfigError
from pallasite.models.pull import is_pulled_name, locate
from pallasite.server.arguments import engine_config, engine_line
from pallasite.server.auth import load_keys
from pallasite.server.config import ServerConfig, TextLimits, TlsFiles
from pallasite.server.flags import SERVER_FLAGS, TEXT_LIMIT_FLAGS, read_flags
from pallasite.server.progress import progress_printer
from pallasite.server.server import serve as serve_until_signal

_DEMO_MESSAGE = "In one sentence: what is a meteorite?"
_START_S = 600.0
_STOP_S = 30.0


def serve(args: argparse.Namespace) -> int:
    """Serves a model until a signal ends it."""
    return serve_until_signal(server_config(args), progress_printer())


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The server that the flags ask for. Raises ConfigError where they contradict."""
    tls = _tls(args.tls_certificate, args.tls_key, args.tls_client_ca)
    config = read_flags(
        args,
        ServerConfig,
        SERVER_FLAGS,
        model=locate(args.model),
        engine=engine_config(args),
        reflection=args.reflection,
        tls=tls,
        adapters=dict(args.load_adapter),
        api_keys={} if args.api_keys is None else load_keys(args.api_keys),
        text=read_flags(args, TextLimits, TEXT_LIMIT_FLAGS),
    )
    if not config.model_name and is_pulled_name(args.model):
        return replace(config, model_name=args.model)
    return config


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if certificate is not None and key is not None:
        return TlsFiles(certificate=certificate, private_key=key, client_ca=client_ca)
    if certificate is not None or key is not None or client_ca is not None:
        raise ConfigError(
            "got a part of what TLS needs; --tls-certificate and --tls-key must be given together;"
            " give both, or leave out every --tls flag"
        )
    return None


def demo(args: argparse.Namespace) -> int:
    """Starts `pallasite serve`, runs `pallasite chat` against it, and stops it."""
    locate(args.model)
    with _Served(args) as address:
        print(f"user: {_DEMO_MESSAGE}\nassistant: ", end="", flush=True)
        chat = ["chat", "--server", address, "--message", _DEMO_MESSAGE, "--temperature", "0"]
        command = [sys.executable, "-m", "pallasite.server", *chat, "--max-tokens", "64"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


class _Served:
    """A server in a process of its own, on a free port, while the `with` block runs.

    Entering waits until it listens and returns its address. Leaving ends it as an operator would.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        line = ["serve", args.model, "--port", "0", *engine_line(engine_config(args))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pallasite.server", *line],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._address = ""
        self._has_said = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> str:
        self._reader.start()
        self._has_said.wait(_START_S)
        if self._address:
            return self._address
        self.__exit__()
        raise RequestError(
            "the server did not start; what it said stands above; mend that and try again",
            code=ErrorCode.UNAVAILABLE,
        )

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_STOP_S)

    def _read(self) -> None:
        """Passes on what the server says, and notes the address when it names it."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if match := re.search(r" is served on (\S+)$", line.rstrip()):
                self._address = self._address or match[1]
                self._has_said.set()
        self._has_said.set()
