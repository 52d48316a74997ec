"""The flags that the benchmarks have in common, and what is sent: prompts and arrivals."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallasite.engine.config import EngineConfig
from pallasite.engine.request import Request, SamplingParams
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.pull import cache_folder, locate
from pallasite.server.arguments import Parser
from pallasite.server.flags import (
    ENGINE_FLAGS,
    FILE,
    FOLDER,
    WHOLE,
    Flag,
    add_flags,
    read_flags,
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of random prompts that all run to their full length.

    Attributes:
        input_len, output_len: tokens of each prompt and of each completion.
        request_rate: requests a second, at random times (a Poisson process); inf sends all at once.
        seed: of prompts and times.
    """

    num_prompts: int = 32
    input_len: int = 128
    output_len: int = 64
    request_rate: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"got {name}={getattr(self, name)}; it must be at least 1; raise it"
                )
        if not self.request_rate > 0:
            raise ConfigError(f"got request_rate={self.request_rate}; it must be > 0; raise it")
        if self.seed < 0:
            raise ConfigError(f"got seed={self.seed}; it must be >= 0; change it")

    def requests(self, vocab_size: int) -> list[Request]:
        """Returns the requests, greedy; the same seed gives the same prompts."""
        rng = np.random.default_rng(self.seed)
        prompts = rng.integers(0, vocab_size, (self.num_prompts, self.input_len))
        params = SamplingParams(max_tokens=self.output_len, temperature=0.0, ignore_eos=True)
        return [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts.tolist()]

    def arrivals_s(self) -> np.ndarray:
        """Returns when each is sent, in seconds after the start: [num_prompts], ascending."""
        if math.isinf(self.request_rate):
            return np.zeros(self.num_prompts)
        rng = np.random.default_rng([self.seed, 1])
        return np.cumsum(rng.exponential(1 / self.request_rate, self.num_prompts))


WORKLOAD_FLAGS = (
    Flag(field="input_len", kind=WHOLE, help="tokens of each prompt"),
    Flag(field="output_len", kind=WHOLE, help="tokens of each completion"),
    Flag(field="seed", kind=WHOLE, help="of the random prompts"),
)


def benchmark_parser(description: str) -> Parser:
    """Returns a parser with MODEL, the engine's flags and --output."""
    parser = Parser(prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}", description=description)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="smollm2-135m",
        help="a pulled name, a GGUF file or a Hugging Face folder (default: smollm2-135m)",
    )
    add_flags(parser, "engine", EngineConfig, ENGINE_FLAGS)
    parser.add_argument(
        "--compile-cache",
        type=FOLDER,
        metavar=FOLDER.metavar,
        default=cache_folder() / "compiled",
        help="keeps compiled programs (default: pallasite/compiled in the user's cache folder)",
    )
    parser.add_argument(
        "--output", type=FILE, metavar="FILE", help="write the figures as JSON (default: do not)"
    )
    return parser


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Returns the engine that the flags ask for. Raises ConfigError where they contradict."""
    return read_flags(args, EngineConfig, ENGINE_FLAGS, compile_cache=args.compile_cache)


def vocab_size(model: str) -> int:
    """Returns the number of token ids that a model knows."""
    return open_checkpoint(locate(model)).config.vocab_size


def say(message: str) -> None:
    """Shows what goes on, on standard error, so that figures stay alone."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> int:
    """Runs a benchmark; 2 where a flag, a file or the model cannot work, with the reason.

    SIGTERM ends it as SIGINT does, so that it takes the processes it started with it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except ConfigError as error:
        say(f"benchmarks: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
