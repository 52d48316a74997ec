"""Where the command line's completions come from: an engine in this process, or a server.

Both take a `TextRequest` and give `TextEvent`s, so that a command does not know which it has.
"""

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from pallasite.engine.config import EngineConfig
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.server.arguments import engine_config, engine_flags_given, own_adapters
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.config import TextLimits
from pallasite.server.generate import TextEngine
from pallasite.server.progress import gather_shown, progress_printer
from pallasite.server.prompts import PromptEncoder
from pallasite.server.session_server import open_server
from pallasite.server.text_request import Scores, TextEvent, TextRequest
from pallasite.server.text_stream import score_params, scores_of
from pallasite.server.tokenizer import load_tokenizer


@runtime_checkable
class Session(Protocol):
    """One place that completes prompts."""

    def generate(self, request: TextRequest) -> AsyncIterator[TextEvent]:
        """Yields the events of a request. Raises RequestError where it failed."""
        ...

    async def score(
        self, sequences: Sequence[Sequence[int]], top: int, adapter: str
    ) -> list[Scores]:
        """Scores sequences of token ids. Raises RequestError for the first that failed."""
        ...


class EngineSession:
    """An engine's completions. The tokenizer is loaded where text is first asked for, so that a
    checkpoint without one can be scored."""

    def __init__(self, path: Path, engine: Engine, progress: Callable[[str], None]) -> None:
        self._path = path
        self._engine = engine
        self._progress = progress

    @cached_property
    def _text_engine(self) -> TextEngine:
        tokenizer = load_tokenizer(self._path)
        source = tokenizer.chat_template
        template = None if source is None else ChatTemplate(source, tokenizer)
        encoder = PromptEncoder(tokenizer, template, TextLimits())
        return TextEngine(self._engine, encoder, model_name=self._path.name)

    async def generate(self, request: TextRequest) -> AsyncIterator[TextEvent]:
        """Yields the events of a request. Raises RequestError where it failed."""
        with closing(await self._text_engine.generate(request)) as stream:
            async for event in stream:
                yield event

    async def score(
        self, sequences: Sequence[Sequence[int]], top: int, adapter: str
    ) -> list[Scores]:
        """Scores sequences of token ids together. Raises RequestError for the first that failed."""
        params = score_params(top)

        async def run(ids: Sequence[int]) -> Scores:
            request = Request(prompt_ids=tuple(ids), params=params, adapter=adapter)
            return await scores_of(self._engine, self._engine.submit(request), request.prompt_ids)

        at_once = min(2 * self._engine.config.max_requests, self._engine.config.max_waiting)
        calls = [partial(run, ids) for ids in sequences]
        return await gather_shown(calls, at_once, "scored", self._progress)

    def close(self) -> None:
        """Lets go of what text needed; the engine stays."""
        if "_text_engine" in self.__dict__:
            self._text_engine.encoder.close()


def open_session(args: argparse.Namespace) -> AbstractAsyncContextManager[Session]:
    """The session that the flags ask for. Raises ConfigError where they contradict."""
    if args.server is None:
        for name in ("api_key_file", "server_ca"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"got {flag} without --server; it is for one; leave it out")
        if args.model is None:
            raise ConfigError(
                "got neither MODEL nor --server; one of them is required; name a model, or a"
                " server that runs"
            )
        return open_engine(locate(args.model), engine_config(args), own_adapters(args))
    if given := engine_flags_given(args):
        raise ConfigError(
            f"got {given[0]} with --server, whose engine is set up already; it is allowed where"
            " the model is loaded here; leave it out"
        )
    return open_server(args)


@asynccontextmanager
async def open_engine(
    path: Path, config: EngineConfig, adapters: Sequence[tuple[str, Path]]
) -> AsyncIterator[Session]:
    """A session with an engine of its own, and with adapters from folders, by name. Raises
    ConfigError where the model or an adapter cannot be loaded."""
    progress = progress_printer()
    with closing(Engine.load(path, config, progress)) as engine:
        for name, folder in adapters:
            engine.load_adapter(name, folder)
        with closing(EngineSession(path, engine, progress)) as session:
            yield session
