"""Paged attention on a TPU: what goes into the kernels, and what comes out of them.

Requests with one query and all others have a kernel each. Both run over as many requests as there
are, so that one compiled program serves any mix.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention import tpu_decode, tpu_prefill, tpu_write
from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.paged_attention.rows import join_rows
from pallasite.pallas_kernels.paged_attention.tpu_blocks import (
    decode_blocks,
    prefill_blocks,
    vmem_limit,
)
from pallasite.pallas_kernels.paged_attention.tpu_pages import NewRows
from pallasite.pallas_kernels.paged_attention.tpu_parts import multiplied_as
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES, Products, Scoring
from pallasite.pallas_kernels.storage import encode, quantize_rows
from pallasite.pallas_kernels.target import Target

_LOG2_E = math.log2(math.e)


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
    if cache.values.dtype == jnp.uint16:
        raise ValueError(f"got a cache of uint16 for {config.target.name}; it must hold bfloat16")
    _check_page_table(ragged.page_table, config.target)
    num_tokens, num_heads, head_width = q.shape
    num_kv_heads = kv_new.shape[1]
    scoring = Scoring(
        products=Products.of(cache.values.dtype, config.target),
        cap=None if config.soft_cap is None else config.soft_cap * _LOG2_E,
        has_window=any(window is not None for window in config.windows),
    )
    factor = config.scale * _LOG2_E if config.soft_cap is None else config.scale / config.soft_cap
    width = config.target.cache_row(head_width)[1]
    q = (q.astype(jnp.float32) * factor).reshape(num_tokens, num_kv_heads, -1, head_width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width - head_width)))
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1) * _LOG2_E
    call = _Call(q, sinks, layer, _window(config, layer), ragged, config, scoring)
    new = _new_rows(kv_new, cache.values.dtype, config.target.cache_row(head_width))
    is_ragged = num_tokens > ragged.kv_lens.shape[0]
    if is_ragged:
        cache = _write(call, new, cache)
    decoded, cache = _decode(call, new, cache)
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None, None, None]
    out = _prefill(call, cache) if is_ragged else jnp.zeros_like(decoded)
    # What no request's token is was not written, and may be NaN.
    out = jnp.where(token < ragged.query_starts[-1], out, 0.0)
    num_rows = decoded.shape[0]
    decoded = jnp.where(token[:num_rows] < ragged.num_decode, decoded, out[:num_rows])
    out = jnp.concatenate([decoded, out[num_rows:]])
    # Where a key and its value share a row, so do what queries and weights make of them.
    value_start = width // 2 if cache.shares_rows else 0
    out = out[..., value_start : value_start + head_width]
    return out.reshape(num_tokens, num_heads, head_width), cache


def _check_page_table(page_table: Int[Array, "B M"], target: Target) -> None:
    num_rows, num_columns = page_table.shape
    assert target.smem_bytes is not None
    # What else is looked up there is a few words for each row and page.
    most = target.smem_bytes * 15 // 16 // 4
    if page_table.size > most:
        raise ValueError(
            f"got {num_rows} rows of requests with {num_columns} pages each for {target.name},"
            f" whose scalar memory holds {most} page ids; lower the number of requests in a batch"
            " or the context length"
        )


class _Call(NamedTuple):
    """What all kernels of one call are given.

    Attributes:
        q: scaled for `scoring`, as wide as the cache's rows.
        sinks: in units of log2(e).
        layer: which one.
        window: how many positions it sees.
        ragged: as the op is given it.
        config: as the op is given it.
        scoring: what is static about scores.
    """

    q: Float[Array, "T K G W"]
    sinks: Float[Array, "K G"] | None
    layer: Int[Array, ""]
    window: Int[Array, ""]
    ragged: Ragged
    config: AttentionConfig
    scoring: Scoring

    @property
    def pages_a_row(self) -> int:
        return self.ragged.page_table.shape[1]

    @property
    def vmem_limit(self) -> int:
        return vmem_limit(self.config.target)

    def q_lens(self) -> Int[Array, "B"]:
        """How many queries each request has that is not one of those with one."""
        row = jnp.arange(self.ragged.kv_lens.shape[0], dtype=jnp.int32)
        is_ragged = (row >= self.ragged.num_decode) & (row < self.ragged.num_requests)
        lens = self.ragged.query_starts[1:] - self.ragged.query_starts[:-1]
        return jnp.where(is_ragged, lens, 0)


def _decode(
    call: _Call, new: NewRows, cache: PagedCache
) -> tuple[Float[Array, "B K G W"], PagedCache]:
    """Attends the first tokens, as many as there are rows: no other has a query alone."""
    group, num_rows = call.q.shape[2], call.ragged.kv_lens.shape[0]
    surplus = (0, -group % 8)
    out, cache = tpu_decode.decode(
        jnp.pad(call.q[:num_rows], ((0, 0), (0, 0), surplus, (0, 0))),
        jax.tree.map(lambda a: a[:num_rows], new),
        None if call.sinks is None else jnp.pad(call.sinks, ((0, 0), surplus)),
        cache,
        tpu_decode.Scalars(
            layer=call.layer[None],
            window=call.window[None],
            num_decode=call.ragged.num_decode[None],
            kv_lens=call.ragged.kv_lens,
            page_table=call.ragged.page_table.reshape(-1),
        ),
        call.scoring,
        decode_blocks(cache, call.pages_a_row, group, call.config.target),
        call.vmem_limit,
        call.config.interpret,
    )
    return out[:, :, :group], cache


def _write(call: _Call, new: NewRows, cache: PagedCache) -> PagedCache:
    ragged, page, q_lens = call.ragged, cache.page_size, call.q_lens()
    first = (ragged.kv_lens - q_lens) // page
    counts = jnp.where(q_lens > 0, -(-ragged.kv_lens // page) - first, 0)
    most = call.q.shape[0] // page + 2 * ragged.kv_lens.shape[0]
    requests, numbers, total = _count_out(counts, most)
    return tpu_write.write(
        new,
        cache,
        tpu_write.Scalars(
            layer=call.layer[None],
            kv_lens=ragged.kv_lens,
            query_starts=ragged.query_starts,
            page_table=ragged.page_table.reshape(-1),
            num_pages=total[None],
            page_requests=requests,
            page_numbers=numbers,
        ),
        call.vmem_limit,
        call.config.interpret,
    )


def _prefill(call: _Call, cache: PagedCache) -> Float[Array, "T K G W"]:
    num_tokens, num_kv_heads, group, width = call.q.shape
    ragged, q_lens = call.ragged, call.q_lens()
    blocks = prefill_blocks(cache, call.pages_a_row, num_tokens, group, call.config.target)
    num_tiles = -(-num_tokens // blocks.tokens)
    first = ragged.query_starts[:-1] // blocks.tokens
    counts = jnp.where(q_lens > 0, (ragged.query_starts[1:] - 1) // blocks.tokens - first + 1, 0)
    requests, numbers, total = _count_out(counts, num_tiles + ragged.kv_lens.shape[0])
    surplus = num_tiles * blocks.tokens - num_tokens
    q = call.q.astype(multiplied_as(cache.values.dtype))
    q = jnp.pad(q, ((0, surplus), (0, 0), (0, 0), (0, 0)))
    q = jnp.transpose(q, (1, 0, 2, 3)).reshape(num_kv_heads, -1, width)
    out = tpu_prefill.prefill(
        q,
        None if call.sinks is None else jnp.tile(call.sinks, (1, blocks.tokens)),
        cache,
        tpu_prefill.Scalars(
            layer=call.layer[None],
            window=call.window[None],
            kv_lens=ragged.kv_lens,
            query_starts=ragged.query_starts,
            page_table=ragged.page_table.reshape(-1),
            num_pairs=total[None],
            pair_requests=requests,
            # Where there is no pair, the one step that is none's still has a tile.
            pair_tiles=jnp.minimum(first[requests] + numbers, num_tiles - 1),
        ),
        call.scoring,
        blocks,
        group,
        call.vmem_limit,
        call.config.interpret,
    )
    out = out.reshape(num_kv_heads, -1, group, width)[:, :num_tokens]
    return jnp.transpose(out, (1, 0, 2, 3))


def _count_out(
    counts: Int[Array, "B"], most: int
) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, ""]]:
    """Lists `counts[b]` items of each request b, in order: its request, its number, and how many.

    What is beyond them in the lists is some request's.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(most, dtype=jnp.int32)
    request = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, counts.shape[0] - 1)
    return request, item - (ends - counts)[request], ends[-1]


def _new_rows(kv_new: Float[Array, "T K 2 H"], held_as: jnp.dtype, row: tuple[int, int]) -> NewRows:
    num_tokens, num_kv_heads = kv_new.shape[:2]
    scales = None
    if held_as.itemsize > 1:
        held = encode(kv_new, held_as)
    else:
        held, scales = quantize_rows(kv_new, held_as)
        scales = scales.reshape(num_tokens, num_kv_heads * 2, 1)
        scales = jnp.broadcast_to(scales, (*scales.shape[:2], LANES))
    rows = join_rows(held, row).astype(jnp.float32)
    return NewRows(rows.reshape(num_tokens, num_kv_heads * row[0], row[1]), scales)


def _window(config: AttentionConfig, layer: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the layer's window, one that hides nothing where it has none."""
    hides_nothing = jnp.iinfo(jnp.int32).max
    windows = [hides_nothing if window is None else window for window in config.windows]
    return jnp.asarray(windows or [hides_nothing], jnp.int32)[layer if windows else 0]
