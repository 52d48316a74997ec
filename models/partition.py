"""How a model's axes are cut into equal parts: what is padded, and what is held more than once.

Devices hold parts of one shape. Where an axis does not divide, it is laid out anew: rows of zeros
are added to vocabularies, feed-forwards and heads, which changes no result, and key heads are held
by several devices where there are fewer of them than devices. Query heads follow their key heads:

    6 query heads over 3 key heads, on 2 devices        key  0 1 | 2 .     query  01 23 | 45 ..
    4 query heads over 1 key head, on 2 devices         key  0   | 0       query  01    | 23
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pallasite.models.config import ModelConfig
from pallasite.models.sharding import MODEL_AXIS, RULES


@dataclass(frozen=True)
class Axis:
    """How an axis is laid out.

    Attributes:
        size: the entries held, padding and copies included.
        sources: for each of them the model's own entry, -1 for padding; None where the two are the
            same.
    """

    size: int
    sources: np.ndarray | None = None

    def lay_out(self, values: np.ndarray, dim: int) -> np.ndarray:
        """Returns values whose axis `dim` is laid out so; padding is 0."""
        if self.sources is None:
            return values
        laid_out = np.take(values, np.maximum(self.sources, 0), axis=dim)
        np.moveaxis(laid_out, dim, 0)[self.sources < 0] = 0
        return laid_out


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The layout of one model over `num_parts` devices.

    Attributes:
        unit: what a part of the feed-forward is a multiple of: its weights' groups stay whole.
    """

    config: ModelConfig
    num_parts: int = 1
    unit: int = 1

    @cached_property
    def num_copies(self) -> int:
        """How many devices hold each key head.

        As many as make a device's share of the cache smallest, and then its share of the queries.
        """
        kv_heads, group = self.config.num_kv_heads, self._group
        if kv_heads % self.num_parts == 0:
            return 1

        def cost(copies: int) -> tuple[int, int, int]:
            held = -(-kv_heads * copies // self.num_parts)
            return held, held * -(-group // copies), copies

        return min(range(1, self.num_parts + 1), key=cost)

    @property
    def num_kv_heads(self) -> int:
        """Key heads held, over all devices."""
        return _rounded_up(self.config.num_kv_heads * self.num_copies, self.num_parts)

    @property
    def num_query_heads(self) -> int:
        """Query heads held, over all devices."""
        return self.num_kv_heads * self._queries_per_head

    def axis(self, name: str, size: int) -> Axis:
        """Returns the layout of a logical axis of `size` entries."""
        if RULES[name] != MODEL_AXIS:
            return Axis(size)
        if name == "kv_heads":
            return self._heads(self._kv_heads, self.config.num_kv_heads, size)
        if name == "query_heads":
            return self._heads(self._query_heads, self.config.num_query_heads, size)
        unit = self.num_parts * (self.unit if name == "ffn" and self.num_parts > 1 else 1)
        return _padded(size, _rounded_up(size, unit))

    def notes(self) -> list[str]:
        """Says what is padded and what is held more than once, a sentence each."""
        config, notes = self.config, []
        if self.num_copies > 1:
            notes.append(
                f"{self.num_copies} devices hold each of the {config.num_kv_heads} key heads, since"
                f" {self.num_parts} devices do not divide them"
            )
        for name, has, holds in (
            ("key heads", config.num_kv_heads * self.num_copies, self.num_kv_heads),
            ("query heads", config.num_query_heads, self.num_query_heads),
            ("rows of the vocabulary", config.vocab_size, self._held("vocab", config.vocab_size)),
            ("feed-forward channels", config.ffn_width, self._held("ffn", config.ffn_width)),
        ):
            if holds != has:
                notes.append(f"{has} {name} are padded to {holds} for {self.num_parts} devices")
        return notes

    def _held(self, name: str, size: int) -> int:
        return self.axis(name, size).size

    @property
    def _group(self) -> int:
        return self.config.num_query_heads // self.config.num_kv_heads

    @property
    def _queries_per_head(self) -> int:
        return -(-self._group // self.num_copies)

    @property
    def _kv_heads(self) -> list[int]:
        heads = [head // self.num_copies for head in range(self.num_kv_heads)]
        return [head if head < self.config.num_kv_heads else -1 for head in heads]

    @property
    def _query_heads(self) -> list[int]:
        """Each held key head's queries: its share of those of the model's key head."""
        heads = []
        for held, kv_head in enumerate(self._kv_heads):
            start = held % self.num_copies * self._queries_per_head
            for index in range(start, start + self._queries_per_head):
                is_used = kv_head >= 0 and index < self._group
                heads.append(kv_head * self._group + index if is_used else -1)
        return heads

    def _heads(self, held: Sequence[int], num_heads: int, size: int) -> Axis:
        """Lays out heads of size / num_heads entries each."""
        if list(held) == list(range(num_heads)):
            return Axis(size)
        width = size // num_heads
        starts = np.repeat(np.array(held) * width, width)
        within = np.tile(np.arange(width), len(held))
        return Axis(len(held) * width, np.where(starts < 0, -1, starts + within))


def group_unit(groups: Sequence[int | None], size: int, num_parts: int) -> int:
    """Returns what each part of `size` entries must be a multiple of, so that groups stay whole.

    It is 1 where that would pad the entries by more than half: other groups are needed then.
    """
    unit = math.lcm(*(group for group in groups if group is not None))
    return unit if _rounded_up(size, unit * num_parts) <= 1.5 * size else 1


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _padded(size: int, held: int) -> Axis:
    if held == size:
        return Axis(size)
    return Axis(held, np.pad(np.arange(size), (0, held - size), constant_values=-1))
