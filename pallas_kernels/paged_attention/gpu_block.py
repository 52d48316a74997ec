"""What the GPU kernels of paged attention share: reading blocks of the cache, and the softmax.

A block is some consecutive cached tokens of one request and one key head; its tokens are looked up
one by one in the page table, unless a page holds it whole.

Where the cache holds f32, products are f32 and exact. Where it holds 16 bits or 8, the queries and
the weights of the softmax are rounded to bfloat16 for the tensor cores; int8 and fp8 values are
exact in bfloat16, and their scales are applied in f32. Sums are f32 always.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.storage import decode
from pallasite.pallas_kernels.triton import both, load, padded, within

NEVER = -1e30
"""The top of no scores: finite, so that a difference of two of them is no NaN."""

HIDES_NOTHING = jnp.iinfo(jnp.int32).max


class Inputs(NamedTuple):
    """What attention reads, in device memory; of a kernel, refs to it.

    Attributes:
        q: `[T, N, H]`.
        values: the cache's, `[L, P, K, 2, page, H]`.
        scales: the cache's, `[L, P, K, 2, page]`, or None.
        layer: `[1]`.
        windows: `[L]`, or None where no layer has one.
        sinks: `[N]`, or None.
        kv_lens: `[B]`.
        query_starts: `[B + 1]`.
        page_table: `[B, M]`.
        num_requests: `[1]`.
        num_decode: `[1]`.
    """

    q: Any
    values: Any
    scales: Any
    layer: Any
    windows: Any
    sinks: Any
    kv_lens: Any
    query_starts: Any
    page_table: Any
    num_requests: Any
    num_decode: Any

    @classmethod
    def make(
        cls,
        q: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        ragged: Ragged,
        config: AttentionConfig,
        sinks: jax.Array | None,
    ) -> "Inputs":
        windows = None
        if any(window is not None for window in config.windows):
            windows = jnp.asarray(
                [HIDES_NOTHING if window is None else window for window in config.windows],
                jnp.int32,
            )
        return cls(
            q=q,
            values=cache.values,
            scales=cache.scales,
            layer=layer.reshape(1),
            windows=windows,
            sinks=sinks,
            kv_lens=ragged.kv_lens,
            query_starts=ragged.query_starts,
            page_table=ragged.page_table,
            num_requests=ragged.num_requests.reshape(1),
            num_decode=ragged.num_decode.reshape(1),
        )

    @property
    def heads_per_key(self) -> int:
        return self.q.shape[1] // self.values.shape[2]

    @property
    def product_dtype(self) -> jnp.dtype:
        """What is multiplied."""
        held_in_full = self.values.dtype == jnp.float32
        return jnp.dtype(jnp.float32 if held_in_full else jnp.bfloat16)

    def queries(self, at: tuple[Any, ...], mask: jax.Array | None, curve: "Curve") -> jax.Array:
        """Reads queries `[R, H]`, ready for products."""
        q = load(self.q.at[at], mask).astype(jnp.float32) * curve.factor
        return q.astype(self.product_dtype)

    def first_visible(self, position: jax.Array) -> jax.Array:
        """Returns the first position that a query at `position` sees; any shape."""
        if self.windows is None:
            return jnp.zeros_like(position)
        window = self.windows[self.layer[0]]
        return jnp.maximum(position - jnp.minimum(window, position + 1) + 1, 0)


class Block(NamedTuple):
    """Keys and values `[S, H]` of S cached tokens, in the type of products.

    Attributes:
        k_scales: `[S]`, what the keys' scores are multiplied by, or None.
        v_scales: likewise the weights of the values.
    """

    k: jax.Array
    v: jax.Array
    k_scales: jax.Array | None
    v_scales: jax.Array | None


class BlockReader(NamedTuple):
    """Reads the cached tokens of one request and one key head.

    Attributes:
        row: the request's.
        head: the key head.
        num_tokens: S, of a block.
    """

    inputs: Inputs
    row: jax.Array
    head: jax.Array
    num_tokens: int

    def read(self, start: jax.Array, visible: jax.Array | None) -> Block:
        """Reads the positions from `start` on; those not `visible` `[S]` come back as zeros.

        What was never written may be NaN, and 0 * NaN is NaN: hence zeros, and not only no weight.
        """
        inputs = self.inputs
        num_pages, _, _, page_size, width = inputs.values.shape[1:]
        position = start + jnp.arange(self.num_tokens, dtype=jnp.int32)
        if page_size % self.num_tokens == 0:
            page = inputs.page_table[self.row, start // page_size]
            page = jnp.full_like(position, jnp.clip(page, 0, num_pages - 1))
        else:
            page = load(inputs.page_table.at[self.row, position // page_size], visible)
            # Of an id that is none the contract asks only that the cache's bounds are kept.
            page = jnp.clip(page, 0, num_pages - 1)
        slot = position % page_size

        def rows(which: int) -> jax.Array:
            column = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
            at = (inputs.layer[0], page[:, None], self.head, which, slot[:, None], column)
            mask = both(None if visible is None else visible[:, None], within(column, width))
            held = load(inputs.values.at[at], mask)
            return decode(held).astype(inputs.product_dtype)

        def scales(which: int) -> jax.Array | None:
            if inputs.scales is None:
                return None
            at = (inputs.layer[0], page, self.head, which, slot)
            return load(inputs.scales.at[at], visible)

        return Block(rows(0), rows(1), scales(0), scales(1))


class Softmax(NamedTuple):
    """The online softmax of R queries (Milakov and Gimelshein 2018).

    Attributes:
        top: `[R]`, the largest score so far, which all weights are divided by; as log2.
        total: `[R]`, the sum of weights.
        weighted: `[R, H]`, the sum of values by their weights.
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array

    @classmethod
    def start(cls, num_queries: int, width: int) -> "Softmax":
        return cls(
            jnp.full((num_queries,), NEVER, jnp.float32),
            jnp.zeros((num_queries,), jnp.float32),
            jnp.zeros((num_queries, width), jnp.float32),
        )

    def add(
        self, q: jax.Array, block: Block, visible: jax.Array | None, curve: "Curve"
    ) -> "Softmax":
        """Takes in a block, of which queries `[R, H]` see what is `visible` `[R | 1, S]`.

        The queries are what `Inputs.queries` returns.
        """
        scores = dot(q, block.k, transposed=True)
        if block.k_scales is not None:
            scores = scores * block.k_scales[None, :]
        if curve.cap is not None:
            scores = jnp.tanh(scores) * curve.cap
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        top = jnp.maximum(self.top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - top[:, None])
        shrink = jnp.exp2(self.top - top)
        total = self.total * shrink + jnp.sum(weights, axis=1)
        if block.v_scales is not None:
            weights = weights * block.v_scales[None, :]
        added = dot(weights.astype(block.v.dtype), block.v)
        return Softmax(top, total, self.weighted * shrink[:, None] + added)

    def result(self, sinks: jax.Array | None) -> jax.Array:
        """Returns `[R, H]`; zeros for a query that saw nothing. Sinks `[R]` are logits."""
        total, weighted = self.total, self.weighted
        if sinks is not None:
            sinks = sinks.astype(jnp.float32) * math.log2(math.e)
            top = jnp.maximum(self.top, sinks)
            shrink = jnp.exp2(self.top - top)
            weighted = weighted * shrink[:, None]
            total = total * shrink + jnp.exp2(sinks - top)
        return weighted / jnp.where(total == 0.0, 1.0, total)[:, None]


class Curve(NamedTuple):
    """How a product of query and key becomes log2 of a weight.

    Attributes:
        factor: what queries are multiplied by, in f32 and before they are rounded.
        cap: scores are cap * tanh(product); None where they are the product.
    """

    factor: float
    cap: float | None

    @classmethod
    def make(cls, config: AttentionConfig) -> "Curve":
        log2_e = math.log2(math.e)
        if config.soft_cap is None:
            return cls(config.scale * log2_e, None)
        return cls(config.scale / config.soft_cap, config.soft_cap * log2_e)


def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """Multiplies `[R, n]` by `[n, c]`, or by the transpose of `[c, n]`; sums are f32."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
