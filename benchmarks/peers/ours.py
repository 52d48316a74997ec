"""Drives Pallasite: the engine without a server, with the flags that the comparison was given."""

import asyncio
import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.options import benchmark_parser, engine_config
from benchmarks.peers.driver import Note, Room, Score
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request, SamplingParams
from pallasite.engine.stream import TokenStream
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.pull import locate
from pallasite.models.weights import num_bytes
from pallasite.server.flags import ENGINE_FLAGS, shown_flags


class Pallasite:
    """An engine in this process."""

    def __init__(self, room: Room) -> None:
        args = benchmark_parser("").parse_args([room.model, *room.options])
        chosen = engine_config(args)
        config = replace(
            chosen,
            max_requests=max(2, room.max_requests),
            max_context_len=room.max_len,
            cache_tokens=max(room.num_tokens, room.max_len),
        )
        self._engine = Engine.load(room.model, config)
        deployment = plan_deployment(open_checkpoint(locate(room.model)).config, config)
        self.settings = {
            "flags": " ".join(shown_flags(chosen, ENGINE_FLAGS)) or "none",
            "weights": config.weights,
            "max_batch_tokens": config.max_batch_tokens,
            "prefix cache": "none",
            "weight_bytes": num_bytes(deployment.model),
        }
        self.versions = {
            name: importlib.metadata.version(name) for name in ("pallasite", "jax", "jaxlib")
        }

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Has nothing to do: there is room since it was loaded."""

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        requests = [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts]
        streams = [self._engine.submit(request) for request in requests]
        if len(streams) > 1:
            asyncio.run(_read_all(streams, note))
            return
        for event in streams[0]:
            note(0, len(event.token_ids))
            if event.finish is not None and event.finish.error is not None:
                raise event.finish.error

    def score(self, token_ids: Sequence[int]) -> Score:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
        (completion,) = self._engine.generate([Request(prompt_ids=tuple(token_ids), params=params)])
        if completion.finish.error is not None:
            raise completion.finish.error
        assert completion.prompt_logprobs is not None
        places = [place for place in completion.prompt_logprobs if place is not None]
        return Score(
            logprobs=[place.logprob for place in places], top=[place.top[0][0] for place in places]
        )


async def _read_all(streams: Sequence[TokenStream], note: Note) -> None:
    async def read(index: int, stream: TokenStream) -> None:
        async for event in stream:
            note(index, len(event.token_ids))
            if event.finish is not None and event.finish.error is not None:
                raise event.finish.error

    await asyncio.gather(*(read(index, stream) for index, stream in enumerate(streams)))


def load(room: Room) -> Pallasite:
    """Loads the engine. Raises ConfigError where it cannot be."""
    return Pallasite(room)
