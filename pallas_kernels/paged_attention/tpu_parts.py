"""What the prefill kernel does with a block of pages: scores, weights and sums of a tile's queries.

A part is some queries of one key head. Parts are one straight piece of code, a few heads of them at
a time. Which rows are seen is told.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pallasite.pallas_kernels.paged_attention.tpu_pages import PageBuffers, row_scales
from pallasite.pallas_kernels.paged_attention.tpu_products import (
    HIDDEN,
    LANES,
    NONE_YET,
    Scoring,
)


class PartsScratch(NamedTuple):
    """The online softmax of a tile, a row for each query head of a token.

    Shapes: maximum and total [K, r, 128], total to be added up over lanes; weighted [K, r, W];
    scores [2, rows of a part, S].
    """

    maximum: Any
    total: Any
    weighted: Any
    scores: Any

    @classmethod
    def shapes(cls, q: tuple[int, ...], num_rows: int, num_columns: int) -> "PartsScratch":
        """Returns what to ask for as scratch for queries [K, r, W], `num_rows` in a part."""

        def floats(*shape: int) -> Any:
            return pltpu.VMEM(shape, jnp.float32)

        return cls(
            maximum=floats(*q[:2], LANES),
            total=floats(*q[:2], LANES),
            weighted=floats(*q),
            scores=floats(2, num_rows, num_columns),
        )

    def start(self, sinks: Any) -> None:
        """Starts the softmax, with the sinks [K, r, 128] of a reference."""
        if sinks is None:
            self.maximum[...] = jnp.full(self.maximum.shape, NONE_YET, jnp.float32)
            self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        else:
            self.maximum[...] = sinks[...]
            lane = jax.lax.broadcasted_iota(jnp.int32, self.total.shape, 2)
            self.total[...] = jnp.where(lane == 0, 1.0, 0.0)
        self.weighted[...] = jnp.zeros(self.weighted.shape, jnp.float32)


class Pair(NamedTuple):
    """A tile and a request, and where they meet.

    Attributes:
        request: the request.
        first_token: of the pair, in the tile.
        end_token: its end, in the tile.
        first_position: of the tile's token 0, were it the request's.
        kv_len: cached tokens of the request.
        first_page: the first page that the pair sees.
        end_page: the end of them.
    """

    request: Array
    first_token: Array
    end_token: Array
    first_position: Array
    kv_len: Array
    first_page: Array
    end_page: Array


class Seen(NamedTuple):
    """What a pair's queries see of a block that starts at a position, with a window."""

    pair: Pair
    start: Array
    window: Array


class _Part(NamedTuple):
    """Some queries of one key head, and the slot of what they attend to."""

    head: Array
    rows: Any
    slot: Array


class Parts(NamedTuple):
    """The queries of a tile.

    Attributes:
        scoring: what is static about scores.
        group: query heads of a key head; row r of a head belongs to token r // group.
        q: the queries [K, r, W], a reference.
        scratch: their online softmax.
        buffers: where cached rows are.
    """

    scoring: Scoring
    group: int
    q: Any
    scratch: PartsScratch
    buffers: PageBuffers

    def attend(self, slot: Array, heads_at_once: int, seen: "Seen | None") -> None:
        """Takes all heads through a block; None says that all queries see all of it."""
        scratch = self.scratch
        num_heads, tile_rows, _ = scratch.weighted.shape
        num_rows = scratch.scores.shape[1]

        def attend_heads(index: Array, _: None) -> None:
            parts = [
                _Part(index * heads_at_once + head, pl.ds(row, num_rows), slot)
                for head in range(heads_at_once)
                for row in range(0, tile_rows, num_rows)
            ]
            # While the matrix unit works on one part, another's weights are made of scores that
            # wait in VMEM, and those of the part before it are summed up.
            made: list[tuple[Array, Array]] = []
            for step in range(len(parts) + 2):
                if step < len(parts):
                    scratch.scores[step % 2] = self.score(parts[step])
                if 1 <= step <= len(parts):
                    scores = scratch.scores[(step - 1) % 2]
                    if seen is not None:
                        scores = self.mask(scores, parts[step - 1], seen)
                    made.append(self.weigh(parts[step - 1], scores))
                if step >= 2:
                    self.sum_up(parts[step - 2], *made[step - 2])

        jax.lax.fori_loop(0, num_heads // heads_at_once, attend_heads, None)

    def score(self, part: _Part) -> Float[Array, "r S"]:
        """A part's scores, not masked."""
        scores = _multiply(self.q[part.head, part.rows], self.cached(part, 0), 1)
        if self.buffers.scales is not None:
            scores *= self.row_scales(part, 0)
        return self.scoring.scores(scores)

    def mask(self, scores: Float[Array, "r S"], part: _Part, seen: "Seen") -> Float[Array, "r S"]:
        """Hides what a query does not see; of other requests' queries nothing is kept."""
        pair = seen.pair
        row = part.rows.start + jax.lax.broadcasted_iota(jnp.int32, (part.rows.size, 1), 0)
        last = pair.first_position + row // self.group - seen.start
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = column <= last
        if self.scoring.has_window:
            visible &= column > last - seen.window
        return jnp.where(visible, scores, HIDDEN)

    def weigh(
        self, part: _Part, scores: Float[Array, "r S"]
    ) -> tuple[Array, Float[Array, "r 128"]]:
        """Turns scores into weights; with them comes what the sums so far are multiplied by."""
        scratch, held_as = self.scratch, self.buffers.values.dtype
        before = scratch.maximum[part.head, part.rows]
        maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        shrink = jnp.exp2(before - maximum)
        weights = jnp.exp2(scores - _repeat_lanes(maximum, scores.shape[1]))
        # Lane by lane; the lanes are added up once, at the end.
        total = scratch.total[part.head, part.rows] * shrink + _fold_lanes(weights)
        scratch.total[part.head, part.rows] = total
        scratch.maximum[part.head, part.rows] = maximum
        if self.buffers.scales is not None:
            weights *= self.row_scales(part, 1)
        return weights.astype(multiplied_as(held_as)), shrink

    def sum_up(self, part: _Part, weights: Array, shrink: Float[Array, "r 128"]) -> None:
        """Takes a part's values into the online softmax."""
        weighted = self.scratch.weighted
        added = _multiply(weights, self.cached(part, self.buffers.value_row), 0)
        before = weighted[part.head, part.rows]
        weighted[part.head, part.rows] = before * _repeat_lanes(shrink, before.shape[1]) + added

    def cached(self, part: _Part, row: int) -> Shaped[Array, "S W"]:
        """The keys or values of a block."""
        return self.buffers.rows(part.slot, slice(None), part.head, row)

    def row_scales(self, part: _Part, which: int) -> Float[Array, "1 S"]:
        """The scales of a block's keys or values."""
        pages = pl.ds(0, self.buffers.num_pages)
        return row_scales(self.buffers, part.slot, pages, part.head, which)


def multiplied_as(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type of queries and weights for a cache's type: many rows are worth widening."""
    return dtype if dtype == jnp.float32 else jnp.dtype(jnp.bfloat16)


def _multiply(a: Array, rows: Array, axis: int) -> Array:
    return jax.lax.dot_general(
        a,
        rows.astype(a.dtype),
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision="highest" if a.dtype == jnp.float32 else None,
    )


def _repeat_lanes(x: Float[Array, "r 128"], columns: int) -> Float[Array, "r n"]:
    """Returns equal columns as many as wanted, of registers that hold them."""
    return jnp.concatenate([x] * -(-columns // LANES), axis=1)[:, :columns]


def _fold_lanes(x: Float[Array, "r S"]) -> Float[Array, "r 128"]:
    """Adds up columns that lie in the same lane; what is less than a register's goes to lane 0."""
    columns = x.shape[1]
    if columns % LANES == 0:
        parts = [x[:, at : at + LANES] for at in range(0, columns, LANES)]
        return sum(parts[1:], parts[0])
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    return jnp.where(lane == 0, jnp.sum(x, axis=1, keepdims=True), 0.0)
