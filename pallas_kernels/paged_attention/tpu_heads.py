"""What the decode kernel does with a block of pages: scores, weights and sums of all heads.

The heads are one straight piece of code, a few of them at a time. It knows no requests: which rows
are seen is told.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallasite.pallas_kernels.paged_attention.tpu_pages import PageBuffers, row_scales
from pallasite.pallas_kernels.paged_attention.tpu_products import (
    HIDDEN,
    LANES,
    NONE_YET,
    Scoring,
)

SCORES_AHEAD, WEIGHTS_AHEAD = 2, 2
"""How many heads later a head's scores become weights, and its weights are summed up."""


class HeadsScratch(NamedTuple):
    """Shapes: q as products take it, [K, rows, W], and its units [K, g, 128]; scores [heads, g, S];
    the online softmax, [K, g, 128 or W]."""

    q: Any
    q_unit: Any
    scores: Any
    maximum: Any
    total: Any
    weighted: Any

    @classmethod
    def shapes(
        cls, q: tuple[int, ...], scoring: Scoring, num_heads: int, num_columns: int
    ) -> "HeadsScratch":
        """Returns what to ask for as scratch for queries [K, g, W], `num_heads` at a time."""
        num_kv_heads, group_rows, width = q
        products = scoring.products

        def floats(*shape: int) -> Any:
            return pltpu.VMEM(shape, jnp.float32)

        rows = products.rows(group_rows)
        return cls(
            q=pltpu.VMEM((num_kv_heads, rows, width), products.multiplied_as),
            q_unit=floats(num_kv_heads, group_rows, LANES) if products.num_parts > 1 else None,
            scores=floats(num_heads, group_rows, num_columns),
            maximum=floats(num_kv_heads, group_rows, LANES),
            total=floats(num_kv_heads, group_rows, LANES),
            weighted=floats(num_kv_heads, group_rows, width),
        )


class Heads(NamedTuple):
    """The online softmax of one request's heads.

    Attributes:
        scoring: what is static about scores.
        scratch: where it is.
        buffers: where cached rows are.
    """

    scoring: Scoring
    scratch: HeadsScratch
    buffers: PageBuffers

    def start(self, q: Any, sinks: Any) -> None:
        """Starts with the queries [1, K, g, W] and the sinks [K, g, 128] of two references."""
        scratch = self.scratch
        for head in range(scratch.q.shape[0]):
            queries = q[0, head]
            largest = jnp.max(jnp.abs(queries), axis=1, keepdims=True)
            parts, unit = self.scoring.products.split(queries, largest)
            scratch.q[head] = parts
            if scratch.q_unit is not None:
                scratch.q_unit[head] = jnp.broadcast_to(unit, scratch.q_unit.shape[1:])
        if sinks is None:
            scratch.maximum[...] = jnp.full(scratch.maximum.shape, NONE_YET, jnp.float32)
            scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)
        else:
            scratch.maximum[...] = sinks[...]
            scratch.total[...] = jnp.ones(scratch.total.shape, jnp.float32)
        scratch.weighted[...] = jnp.zeros(scratch.weighted.shape, jnp.float32)

    def result(self) -> Float[Array, "K g W"]:
        return self.scratch.weighted[...] / self.scratch.total[:, :, :1]

    def attend(self, slot: Array, pages: Any, seen: Bool[Array, "g S"] | None) -> None:
        """Takes in some pages of a slot; None says that all their rows are seen."""
        num_heads, at_once = self.scratch.q.shape[0], self.scratch.scores.shape[0]
        if num_heads == at_once:
            self._attend_some([_Head(head, slot, pages) for head in range(num_heads)], seen)
            return

        def attend_heads(index: Array, _: None) -> None:
            first = index * at_once
            heads = [_Head(first + head, slot, pages) for head in range(at_once)]
            self._attend_some(heads, seen)

        jax.lax.fori_loop(0, num_heads // at_once, attend_heads, None)

    def _attend_some(self, heads: list["_Head"], seen: Bool[Array, "g S"] | None) -> None:
        # While the matrix unit works on one head, another's weights are made of scores that wait
        # in VMEM.
        scratch = self.scratch
        columns = pl.ds(0, heads[0].pages.size * self.buffers.page)
        signs, made, done = [], [], []
        for step in range(len(heads) + SCORES_AHEAD + WEIGHTS_AHEAD):
            if step < len(heads):
                scores = self._score(heads[step])
                scratch.scores[step, :, columns] = scores
                signs.append(_sign_of_being(scores))
            index = step - SCORES_AHEAD
            if 0 <= index < len(heads):
                scores = scratch.scores[index, :, columns]
                if seen is not None:
                    scores = jnp.where(seen, scores, HIDDEN)
                # The last heads have none to wait for.
                sign = signs[min(index + SCORES_AHEAD, len(heads) - 1)]
                made.append(self._weigh(heads[index], scores, sign))
            index -= WEIGHTS_AHEAD
            if index >= 0:
                done.append(self._sum_up(heads[index], made[index]))
        # After all loads, which could not be moved before a store.
        for head, weights, weighted in zip(heads, made, done, strict=True):
            shape = scratch.maximum.shape[1:]
            scratch.maximum[head.number] = jnp.broadcast_to(weights.maximum, shape)
            scratch.total[head.number] = jnp.broadcast_to(weights.total, shape)
            scratch.weighted[head.number] = weighted

    def _score(self, head: "_Head") -> Float[Array, "g S"]:
        scratch, products = self.scratch, self.scoring.products
        group_rows = scratch.weighted.shape[1]
        keys = self.buffers.rows(head.slot, head.pages, head.number, 0)
        scores = products.multiply(scratch.q[head.number], keys, group_rows, over_columns=True)
        if scratch.q_unit is not None:
            scores *= scratch.q_unit[head.number][:, :1]
        if self.buffers.scales is not None:
            scores *= row_scales(self.buffers, head.slot, head.pages, head.number, 0)
        return self.scoring.scores(scores)

    def _weigh(
        self, head: "_Head", scores: Float[Array, "g S"], sign: Float[Array, "g 1"]
    ) -> "_Weights":
        scratch = self.scratch
        before = scratch.maximum[head.number][:, :1]
        maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        maximum = jnp.maximum(maximum, sign)
        shrink = jnp.exp2(before - maximum)
        weights = jnp.exp2(scores - maximum)
        total = scratch.total[head.number][:, :1] * shrink
        total += jnp.sum(weights, axis=1, keepdims=True)
        largest = jnp.ones((1, 1), jnp.float32)
        if self.buffers.scales is not None:
            scales = row_scales(self.buffers, head.slot, head.pages, head.number, 1)
            weights *= scales
            largest = jnp.max(scales, axis=1, keepdims=True)
        parts, unit = self.scoring.products.split(weights, largest)
        return _Weights(maximum, total, shrink, parts, unit)

    def _sum_up(self, head: "_Head", weights: "_Weights") -> Float[Array, "g W"]:
        scratch, products = self.scratch, self.scoring.products
        values = self.buffers.rows(head.slot, head.pages, head.number, self.buffers.value_row)
        group_rows = scratch.weighted.shape[1]
        added = products.multiply(weights.parts, values, group_rows, over_columns=False)
        if products.num_parts > 1:
            added *= weights.unit
        return scratch.weighted[head.number] * weights.shrink + added


class _Head(NamedTuple):
    """A key head, and the pages that it attends to."""

    number: int | Array
    slot: Array
    pages: Any


class _Weights(NamedTuple):
    """What a head's softmax has become, before its values are summed up.

    Shapes: maximum, total and shrink [g, 1]; parts [rows, S] and their unit [1, 1], as products
    take them.
    """

    maximum: Array
    total: Array
    shrink: Array
    parts: Array
    unit: Array


def _sign_of_being(scores: Float[Array, "g S"]) -> Float[Array, "g 1"]:
    """Returns what changes no maximum, HIDDEN or less, but has to wait for the first scores.

    The compiler puts off what nothing waits for. Weights that wait for scores of a later head have
    these made ahead, so that the matrix unit is not idle while weights are made.
    """
    some = scores[:, :LANES]
    return jnp.where(some > 0.0, 2 * HIDDEN, HIDDEN)[:, :1]
