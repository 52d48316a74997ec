"""Writing a step's keys and values into the paged cache in place, on GPUs."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.storage import encode, quantize_rows
from pallasite.pallas_kernels.triton import both, load, padded, within

PROGRAM_VALUES = 2048
"""Values that a program writes at most, where a head has no more by itself."""


class _Inputs(NamedTuple):
    """What is written where, in device memory; of the kernel, refs to it.

    Attributes:
        rows: `[T, K, 2, H]`, in the cache's type.
        row_scales: `[T, K, 2]`, or None.
        layer: `[1]`.
        positions: `[T]`.
        query_starts: `[B + 1]`.
        page_table: `[B, M]`.
    """

    rows: Any
    row_scales: Any
    layer: Any
    positions: Any
    query_starts: Any
    page_table: Any


def write(
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
) -> PagedCache:
    """Returns the cache with each live token's keys and values in its place, and nothing else."""
    if cache.scales is None:
        rows, row_scales = encode(kv_new, cache.values.dtype), None
    else:
        rows, row_scales = quantize_rows(kv_new, cache.values.dtype)
    num_tokens, num_key_heads, _, width = kv_new.shape
    inputs = _Inputs(
        rows=rows,
        row_scales=row_scales,
        layer=layer.reshape(1),
        positions=ragged.positions,
        query_starts=ragged.query_starts,
        page_table=ragged.page_table,
    )
    num_inputs = len(jax.tree.leaves(inputs))
    heads = pl.next_power_of_2(num_key_heads)
    heads = max(1, min(heads, PROGRAM_VALUES // (2 * padded(width))))
    return pl.pallas_call(
        partial(_write, num_heads=heads),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache),
        grid=(pl.cdiv(num_key_heads, heads), num_tokens),
        input_output_aliases={num_inputs + i: i for i in range(len(jax.tree.leaves(cache)))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=config.interpret,
        name="paged_attention_write",
    )(inputs, cache)


def _write(inputs: _Inputs, cache: PagedCache, out: PagedCache, *, num_heads: int) -> None:
    """Writes one token's rows of some heads. `cache` and `out` are the same memory."""
    del cache
    num_key_heads, width = inputs.rows.shape[1], inputs.rows.shape[3]
    num_rows = inputs.page_table.shape[0]
    num_pages, page_size = out.values.shape[1], out.values.shape[4]
    first_head, token = pl.program_id(0) * num_heads, pl.program_id(1)
    row = jnp.arange(pl.next_power_of_2(num_rows), dtype=jnp.int32)
    ends = load(inputs.query_starts.at[row + 1], row < num_rows)
    row = jnp.sum(jnp.where((row < num_rows) & (ends <= token), 1, 0))
    is_live = row < num_rows
    # Tokens beyond the last look up the first page of the last row, in vain.
    position = jnp.where(is_live, inputs.positions[token], 0)
    page = inputs.page_table[jnp.minimum(row, num_rows - 1), position // page_size]
    slot = position % page_size

    @pl.when(is_live & (page >= 0) & (page < num_pages))
    def _() -> None:
        # Keys and values of a head are neighbours.
        index = jnp.arange(2 * num_heads, dtype=jnp.int32)
        head, which = first_head + index // 2, index % 2
        is_head = head < num_key_heads
        column = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
        mask = both(is_head[:, None], within(column, width))
        layer = inputs.layer[0]
        source = inputs.rows.at[token, head[:, None], which[:, None], column]
        place = out.values.at[layer, page, head[:, None], which[:, None], slot, column]
        plgpu.store(place, load(source, mask), mask=mask)
        if inputs.row_scales is not None:
            scales = load(inputs.row_scales.at[token, head, which], is_head)
            plgpu.store(out.scales.at[layer, page, head, which, slot], scales, mask=is_head)
