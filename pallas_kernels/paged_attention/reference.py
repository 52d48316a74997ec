"""Paged attention in jnp: the definition, and the body wherever no kernel is built.

It costs what the cached tokens cost, not what the page table could hold: blocks of pages are
gathered in loops whose trip counts are data, with the online softmax of Milakov and Gimelshein
(2018) carried across them. Requests with one query are taken together, a row each; the others
one after another, in tiles of queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.paged_attention.rows import join_rows, split_rows
from pallasite.pallas_kernels.storage import decode, encode, quantize_rows

BLOCK_TOKENS = 128
"""Cached tokens gathered at once."""

TILE_QUERIES = 64
"""Queries of one request that are attended together."""


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """See the op in the package."""
    cache = write(kv_new, cache, layer, ragged)
    num_tokens, num_heads, head_width = q.shape
    num_rows = ragged.kv_lens.shape[0]
    q = q.astype(jnp.float32) * config.scale
    num_kv_heads = cache.values.shape[2]
    q = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_width)
    reader = _BlockReader.make(cache, layer, ragged.page_table, head_width)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(q.shape[1:3])
    view = _View(_window(config, layer), config.soft_cap, sinks)
    out = _attend_decode(q[:num_rows], reader, ragged, view)
    if num_tokens > num_rows:
        out = jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0), (0, 0)))
        out = _attend_prefill(q, out, reader, ragged, view)
    return out.reshape(num_tokens, num_heads, head_width), cache


def write(
    kv_new: Float[Array, "T K 2 H"], cache: PagedCache, layer: Int[Array, ""], ragged: Ragged
) -> PagedCache:
    """Returns the cache with each live token's keys and values in its place."""
    token = jnp.arange(kv_new.shape[0], dtype=jnp.int32)
    row = jnp.sum(token[:, None] >= ragged.query_starts[None, 1:], axis=1, dtype=jnp.int32)
    num_pages = cache.values.shape[1]
    page = ragged.page_table[row, ragged.positions // cache.page_size]
    # A negative id would count from the end; the one past it is dropped.
    is_written = (token < ragged.query_starts[-1]) & (page >= 0)
    page = jnp.where(is_written, page, num_pages)
    place = (layer, page, slice(None), slice(None), ragged.positions % cache.page_size)
    if cache.scales is None:
        held, scales = encode(kv_new, cache.values.dtype), None
    else:
        held, rows_scales = quantize_rows(kv_new, cache.values.dtype)
        scales = cache.scales.at[place].set(rows_scales, mode="drop")
    rows = join_rows(held, (cache.values.shape[3], cache.values.shape[5]))
    return PagedCache(values=cache.values.at[place].set(rows, mode="drop"), scales=scales)


class _BlockReader(NamedTuple):
    """Reads BLOCK_TOKENS cached tokens of a request at a time."""

    cache: PagedCache
    layer: Int[Array, ""]
    page_table: Int[Array, "B M"]
    head_width: int
    num_pages: int

    @classmethod
    def make(
        cls,
        cache: PagedCache,
        layer: Int[Array, ""],
        page_table: Int[Array, "B M"],
        head_width: int,
    ) -> "_BlockReader":
        num_pages = max(1, BLOCK_TOKENS // cache.page_size)
        surplus = -page_table.shape[1] % num_pages
        page_table = jnp.pad(page_table, ((0, 0), (0, surplus)))
        return cls(cache, layer, page_table, head_width, num_pages)

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.cache.page_size

    def pages_of_row(self, row: Int[Array, ""], block: Int[Array, ""]) -> Int[Array, "p"]:
        start = (row, block * self.num_pages)
        return jax.lax.dynamic_slice(self.page_table, start, (1, self.num_pages))[0]

    def pages_of_all(self, block: Int[Array, ""]) -> Int[Array, "B p"]:
        return jax.lax.dynamic_slice_in_dim(
            self.page_table, block * self.num_pages, self.num_pages, axis=1
        )

    def read(self, pages: Int[Array, "*B p"]) -> tuple[Array, Array]:
        """Returns keys and values `[*B, K, S, H]` of the pages' tokens, in f32.

        For an id of no page JAX reads the last page or the first one.
        """
        held = self.cache.values[self.layer, pages]
        held = jnp.moveaxis(held, -5, -3)  # [*B, K, R, p, page, W]
        rows = held.reshape(*held.shape[:-3], self.num_tokens, held.shape[-1])
        k, v = (decode(x).astype(jnp.float32) for x in split_rows(rows, self.head_width))
        if self.cache.scales is None:
            return k, v
        scales = jnp.moveaxis(self.cache.scales[self.layer, pages], -4, -2)  # [*B, K, 2, p, page]
        scales = scales.reshape(*scales.shape[:-2], self.num_tokens, 1)
        return k * scales[..., 0, :, :], v * scales[..., 1, :, :]


class _Softmax(NamedTuple):
    """The online softmax of some queries: running maximum, sum and weighted values."""

    maximum: Float[Array, "*q"]
    total: Float[Array, "*q"]
    weighted: Float[Array, "*q H"]

    @classmethod
    def start(cls, q: Float[Array, "*q H"], sinks: Float[Array, "*#q"] | None) -> "_Softmax":
        """Begins with nothing seen, or with the sinks' weight and no value."""
        first = -jnp.inf if sinks is None else sinks
        return cls(
            jnp.broadcast_to(jnp.asarray(first, jnp.float32), q.shape[:-1]),
            jnp.full(q.shape[:-1], 0.0 if sinks is None else 1.0, jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )

    def add(
        self,
        scores: Float[Array, "*q S"],
        visible: Bool[Array, "*#q S"],
        weigh: Callable[[Array], Array],
    ) -> "_Softmax":
        """Takes in one block; `weigh` turns its probabilities into weighted values."""
        scores = jnp.where(visible, scores, -jnp.inf)
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1))
        finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        shrink = jnp.exp(self.maximum - finite)
        probabilities = jnp.exp(scores - finite[..., None])
        return _Softmax(
            maximum,
            self.total * shrink + jnp.sum(probabilities, axis=-1),
            self.weighted * shrink[..., None] + weigh(probabilities),
        )

    def result(self) -> Float[Array, "*q H"]:
        return self.weighted / jnp.where(self.total == 0, 1.0, self.total)[..., None]


class _View(NamedTuple):
    """What of a sequence's scores one layer's queries see, and what beside them."""

    window: Int[Array, ""] | None
    soft_cap: float | None
    sinks: Float[Array, "K G"] | None

    def first_visible(self, positions: Int[Array, "*q"]) -> Int[Array, "*q"]:
        if self.window is None:
            return jnp.zeros_like(positions)
        return jnp.maximum(positions - self.window + 1, 0)

    def cap(self, scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
        if self.soft_cap is None:
            return scores
        return self.soft_cap * jnp.tanh(scores / self.soft_cap)


def _window(config: AttentionConfig, layer: Int[Array, ""]) -> Int[Array, ""] | None:
    """Returns the layer's window, one that hides nothing where it has none."""
    if all(window is None for window in config.windows):
        return None
    hides_nothing = jnp.iinfo(jnp.int32).max
    windows = [hides_nothing if window is None else window for window in config.windows]
    return jnp.asarray(windows, jnp.int32)[layer]


def _attend_decode(
    q: Float[Array, "B K G H"], reader: _BlockReader, ragged: Ragged, view: _View
) -> Float[Array, "B K G H"]:
    """One query a row, at the row's last position; other rows come back as zeros."""
    num_rows = q.shape[0]
    is_decode = jnp.arange(num_rows, dtype=jnp.int32) < ragged.num_decode
    kv_lens = jnp.where(is_decode, ragged.kv_lens, 0)
    starts = jnp.where(is_decode, view.first_visible(kv_lens - 1), jnp.iinfo(jnp.int32).max)

    def block(index: Int[Array, ""], softmax: _Softmax) -> _Softmax:
        k, v = reader.read(reader.pages_of_all(index))
        s = index * reader.num_tokens + jnp.arange(reader.num_tokens, dtype=jnp.int32)
        visible = (s[None] < kv_lens[:, None]) & (s[None] >= starts[:, None])
        scores = view.cap(jnp.einsum("bkgh,bksh->bkgs", q, k))
        # Rows of a page that were never written may hold anything, and 0 * NaN is NaN.
        v = jnp.where(visible[:, None, :, None], v, 0.0)
        return softmax.add(
            scores, visible[:, None, None, :], lambda p: jnp.einsum("bkgs,bksh->bkgh", p, v)
        )

    first = jnp.min(starts) // reader.num_tokens
    end = -(-jnp.max(kv_lens) // reader.num_tokens)
    empty = _Softmax.start(q, None if view.sinks is None else view.sinks[None])
    return jax.lax.fori_loop(first, end, block, empty).result()


def _attend_prefill(
    q: Float[Array, "T K G H"],
    out: Float[Array, "T K G H"],
    reader: _BlockReader,
    ragged: Ragged,
    view: _View,
) -> Float[Array, "T K G H"]:
    """Fills in the outputs of the rows from num_decode on.

    Tiles are written whole and in order, so that what a tile leaves beyond its request's end is
    overwritten by the next request's, or lies in the padding.
    """
    num_tokens, tile_len = q.shape[0], min(TILE_QUERIES, q.shape[0])
    padded = ((0, tile_len), (0, 0), (0, 0), (0, 0))
    q, out = jnp.pad(q, padded), jnp.pad(out, padded)

    def tile(row: Int[Array, ""], index: Int[Array, ""], out: Array) -> Array:
        start = ragged.query_starts[row] + index * tile_len
        q_len = ragged.query_starts[row + 1] - ragged.query_starts[row]
        kv_len = ragged.kv_lens[row]
        first_position = kv_len - q_len + index * tile_len
        positions = first_position + jnp.arange(tile_len, dtype=jnp.int32)
        # Queries beyond the request's end see what its last one sees, so that they stay finite.
        positions = jnp.minimum(positions, kv_len - 1)
        starts = view.first_visible(positions)
        queries = jax.lax.dynamic_slice_in_dim(q, start, tile_len)
        queries = jnp.transpose(queries, (1, 2, 0, 3))  # [K, G, t, H]

        def block(index: Int[Array, ""], softmax: _Softmax) -> _Softmax:
            k, v = reader.read(reader.pages_of_row(row, index))
            s = index * reader.num_tokens + jnp.arange(reader.num_tokens, dtype=jnp.int32)
            visible = (s[None] <= positions[:, None]) & (s[None] >= starts[:, None])
            scores = view.cap(jnp.einsum("kgth,ksh->kgts", queries, k))
            v = jnp.where((s < kv_len)[None, :, None], v, 0.0)
            return softmax.add(
                scores, visible[None, None], lambda p: jnp.einsum("kgts,ksh->kgth", p, v)
            )

        first = jnp.maximum(starts[0], 0) // reader.num_tokens
        end = -(-jnp.minimum(kv_len, first_position + tile_len) // reader.num_tokens)
        empty = _Softmax.start(queries, None if view.sinks is None else view.sinks[..., None])
        done = jax.lax.fori_loop(first, end, block, empty).result()
        done = jnp.transpose(done, (2, 0, 1, 3))
        return jax.lax.dynamic_update_slice_in_dim(out, done, start, axis=0)

    def request(row: Int[Array, ""], out: Array) -> Array:
        q_len = ragged.query_starts[row + 1] - ragged.query_starts[row]
        num_tiles = -(-q_len // tile_len)
        return jax.lax.fori_loop(0, num_tiles, lambda index, out: tile(row, index, out), out)

    out = jax.lax.fori_loop(ragged.num_decode, ragged.num_requests, request, out)
    return out[:num_tokens]
