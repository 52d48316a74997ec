"""What is compared: loads, what is read off each, and the definitions that all engines share.

Knows no engine but by what `benchmarks/peers/process.py` offers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.peers.driver import Room
from benchmarks.peers.process import Tokens
from pallasite.models.errors import ConfigError

THREADS = 2
"""Of each engine, which has as many cores, too."""

END_TO_END = (
    "output tokens of all requests / seconds from the call until it returns, prompts included"
)
DECODE = (
    "tokens / seconds from the moment when the last request has its first token until the first"
    " request has its last: all decode, none computes a prompt"
)
FIRST = "milliseconds from the call until the first token"
PREFILL = "prompt tokens / seconds from the call until the first token, the only one"
STEP = (
    "milliseconds between two tokens of a request while all decode and none computes a prompt: that"
    " many requests / their tokens a second"
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a point.

    Attributes:
        name: within its point.
        title: for a reader.
        unit: of it.
        is_more_better: whether a larger value is the better one.
        definition: what it is, for every engine.
    """

    name: str
    title: str
    unit: str
    is_more_better: bool
    definition: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that are sent together, each with as many random tokens as any.

    Attributes:
        num_requests: sent at once.
        input_len, output_len: tokens of each prompt, and of each completion.
    """

    num_requests: int
    input_len: int
    output_len: int

    @property
    def request_len(self) -> int:
        return self.input_len + self.output_len

    def prompts(self, vocab_size: int, seed: Sequence[int]) -> list[list[int]]:
        """Returns [num_requests][input_len] token ids; another seed gives other ones."""
        rng = np.random.default_rng(seed)
        ids: list[list[int]] = rng.integers(
            0, vocab_size, (self.num_requests, self.input_len)
        ).tolist()
        return ids


@dataclass(frozen=True, kw_only=True)
class Point:
    """A load on loaded engines, and what is read off it.

    Attributes:
        name: on the command line and in results.
        title: for a reader.
        load: what is sent.
        figures: what is told of it.
        read: takes them, by name.
        num_rounds: rounds at most, where one takes long; None knows no limit.
        warm_output_len: completion tokens of the run that nobody counts; None takes as many.
    """

    name: str
    title: str
    load: Load
    figures: tuple[Figure, ...]
    read: Callable[[Load, Tokens], Mapping[str, float]]
    num_rounds: int | None = None
    warm_output_len: int | None = None


def end_to_end_rate(tokens: Tokens) -> float:
    """Returns END_TO_END."""
    return sum(map(len, tokens.times_s)) / tokens.duration_s


def decode_rate(tokens: Tokens) -> float:
    """Returns DECODE. Raises ConfigError where there is no such time."""
    start_s = max(times[0] for times in tokens.times_s)
    end_s = min(times[-1] for times in tokens.times_s)
    count = sum(start_s < time_s <= end_s for times in tokens.times_s for time_s in times)
    if not count or end_s <= start_s:
        raise ConfigError(
            "got requests that never all decode together; each must begin before another ends;"
            " raise the completions' length"
        )
    return count / (end_s - start_s)


def first_token_s(tokens: Tokens) -> float:
    """Returns the seconds until the first token."""
    return min(times[0] for times in tokens.times_s)


def _rates(load: Load, tokens: Tokens) -> Mapping[str, float]:
    return {"end_to_end": end_to_end_rate(tokens), "decode": decode_rate(tokens)}


def _first(load: Load, tokens: Tokens) -> Mapping[str, float]:
    return {"first_token": 1000 * first_token_s(tokens)}


def _prefill(load: Load, tokens: Tokens) -> Mapping[str, float]:
    return {"prefill": load.input_len / first_token_s(tokens)}


def _step(load: Load, tokens: Tokens) -> Mapping[str, float]:
    return {"step": 1000 * load.num_requests / decode_rate(tokens)}


def _batch(name: str, title: str, load: Load) -> Point:
    figures = (
        Figure(
            name="decode",
            title=f"{title}: decode",
            unit="tokens/s",
            is_more_better=True,
            definition=DECODE,
        ),
        Figure(
            name="end_to_end",
            title=f"{title}: end to end",
            unit="tokens/s",
            is_more_better=True,
            definition=END_TO_END,
        ),
    )
    return Point(name=name, title=title, load=load, figures=figures, read=_rates)


def _long(name: str, title: str, load: Load) -> Point:
    figure = Figure(name="step", title=title, unit="ms", is_more_better=False, definition=STEP)
    return Point(
        name=name,
        title=title,
        load=load,
        figures=(figure,),
        read=_step,
        num_rounds=3 if load.num_requests == 1 else 1,
        warm_output_len=2,
    )


POINTS = (
    _batch(
        "decode-1",
        "1 request, 128 in, 128 out",
        Load(num_requests=1, input_len=128, output_len=128),
    ),
    _batch(
        "batch-8", "8 at once, 128 in, 64 out", Load(num_requests=8, input_len=128, output_len=64)
    ),
    _batch(
        "batch-32",
        "32 at once, 128 in, 64 out",
        Load(num_requests=32, input_len=128, output_len=64),
    ),
    Point(
        name="first-token",
        title="first token, 139 in",
        load=Load(num_requests=1, input_len=139, output_len=1),
        figures=(
            Figure(
                name="first_token",
                title="first token, 139 in",
                unit="ms",
                is_more_better=False,
                definition=FIRST,
            ),
        ),
        read=_first,
    ),
    Point(
        name="prefill",
        title="prefill, 842 in",
        load=Load(num_requests=1, input_len=842, output_len=1),
        figures=(
            Figure(
                name="prefill",
                title="prefill, 842 in",
                unit="tokens/s",
                is_more_better=True,
                definition=PREFILL,
            ),
        ),
        read=_prefill,
    ),
    _long(
        "long-1",
        "a step at 4,096 cached, 1 request",
        Load(num_requests=1, input_len=4096, output_len=65),
    ),
    # An engine may decode 128 tokens of the first while it computes the last one's prompt in
    # pieces of 256; only what follows is a step of all eight.
    _long(
        "long-8",
        "a step at 4,096 cached, 8 requests",
        Load(num_requests=8, input_len=4096, output_len=192),
    ),
)


def room_for(loads: Sequence[Load], model: str, folder: str, options: Sequence[str] = ()) -> Room:
    """Returns an engine's room for any one of these loads."""
    return Room(
        model=model,
        folder=folder,
        max_requests=max(load.num_requests for load in loads),
        # A multiple of every page.
        max_len=-(-max(load.request_len for load in loads) // 256) * 256,
        num_tokens=max(load.num_requests * (-(-load.request_len // 256) * 256) for load in loads),
        num_threads=THREADS,
        options=tuple(options),
    )
