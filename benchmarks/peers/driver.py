"""What every driver offers. It runs in its engine's own environment: standard library alone.

A driver is a module with `load(room) -> Driver`; `benchmarks/peers/child.py` runs it. Token ids
come in and go out, nobody adds a special token, decoding is greedy and no end of sequence ends it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Note = Callable[[int, int], None]
"""Tells that a request, counted from 0, has so many more tokens by now."""


class UnableError(Exception):
    """An engine cannot do what is asked, for the reason that its text gives."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What an engine is loaded for.

    Attributes:
        model: the GGUF file.
        folder: where its files lie that were made when it was installed, and its caches.
        max_requests: requests at once at most.
        max_len: tokens of one request at most, its prompt's and its completion's.
        num_tokens: tokens of all requests at once at most.
        num_threads: threads that compute.
        options: flags of the engine's own.
    """

    model: str
    folder: str
    max_requests: int
    max_len: int
    num_tokens: int
    num_threads: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says of T given tokens, at each place but the first.

    Attributes:
        logprobs: T - 1, the log-probability of each token given those before it.
        top: T - 1, the likeliest token at the same places.
    """

    logprobs: Sequence[float]
    top: Sequence[int]


class Driver(Protocol):
    """A loaded engine.

    Attributes:
        settings: what it was told, and what is worth knowing about how it runs.
        versions: of its packages.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Makes room, untimed, for so many requests at once of so many tokens each."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        """Completes all prompts at once, each by `output_len` tokens, and notes each as it comes.

        Raises UnableError where the engine cannot do that.
        """
        ...

    def score(self, token_ids: Sequence[int]) -> Score:
        """Scores a text. Raises UnableError where the engine cannot."""
        ...
