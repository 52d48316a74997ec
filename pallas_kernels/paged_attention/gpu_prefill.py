"""Paged attention of requests with more than one query, on GPUs.

A program takes a tile of queries of one request, all query heads of a key head together, through
the request's cached tokens (Dao et al. 2022, "FlashAttention"). Which tile of which request is its
own, each program finds from the batch's starts, so one grid serves any mix of lengths.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig
from pallasite.pallas_kernels.paged_attention.gpu_block import (
    BlockReader,
    Curve,
    Inputs,
    Softmax,
)
from pallasite.pallas_kernels.target import Target
from pallasite.pallas_kernels.triton import both, load, padded, within


class _Plan(NamedTuple):
    """What is static about the kernel.

    Attributes:
        block_tokens: cached tokens of a block.
        num_rows: of a program's products, a power of two: queries by heads.
        num_heads: query heads of a program.
        num_warps: of a program.
        num_stages: how far loads run ahead of products, plus one.
    """

    block_tokens: int
    num_rows: int
    num_heads: int
    num_warps: int
    num_stages: int

    @classmethod
    def make(cls, inputs: Inputs, target: Target) -> "_Plan":
        # The fastest on an H200 of those that spill nothing, or next to nothing, by
        # `make compile-gpu`.
        num_warps = 8
        if inputs.product_dtype == jnp.float32:
            num_rows, block_tokens = 16, 32
        elif inputs.q.shape[2] > 128:
            num_rows, block_tokens = 64, 32
        elif inputs.values.dtype.itemsize == 1:
            num_rows, block_tokens, num_warps = 64, 64, 4
        elif target.vmem_bytes is None:
            # A GPU of which nothing is known may have too little shared memory for more.
            num_rows, block_tokens = 128, 64
        else:
            num_rows, block_tokens = 128, 128
        num_heads = min(inputs.heads_per_key, num_rows)
        return cls(block_tokens, num_rows, num_heads, num_warps, num_stages=2)

    @property
    def num_queries(self) -> int:
        """Query tokens of a program."""
        return self.num_rows // self.num_heads


class _Tile(NamedTuple):
    """A program's share of the batch: some tokens of one request, or of those beyond the last.

    Attributes:
        row: the request's; B for the tokens beyond the last.
        start: the first token, on the batch's axis.
        num_tokens: how many there are from there to the request's end.
        position: of the first token in its sequence.
        kv_len: the request's, 0 beyond the last.
    """

    row: jax.Array
    start: jax.Array
    num_tokens: jax.Array
    position: jax.Array
    kv_len: jax.Array


def attend_prefill(
    inputs: Inputs, out: Float[Array, "T N H"], config: AttentionConfig
) -> Float[Array, "T N H"]:
    """Returns `out` with the rows from num_decode on filled in, and zeros beyond the last token."""
    plan = _Plan.make(inputs, config.target)
    num_tokens = inputs.q.shape[0]
    num_rows, num_key_heads = inputs.kv_lens.shape[0], inputs.values.shape[2]
    # Each request has one tile that is not full at most, and so have the tokens beyond the last.
    num_tiles = num_tokens // plan.num_queries + num_rows + 1
    head_tiles = pl.cdiv(inputs.heads_per_key, plan.num_heads)
    return pl.pallas_call(
        partial(_attend, plan=plan, curve=Curve.make(config)),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid=(num_key_heads * head_tiles, num_tiles),
        input_output_aliases={len(jax.tree.leaves(inputs)): 0},
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=config.interpret,
        name="paged_attention_prefill",
    )(inputs, out)


def _attend(inputs: Inputs, before: Any, out_ref: Any, *, plan: _Plan, curve: Curve) -> None:
    """One tile of queries, for the heads of one key head; out_ref is `[T, N, H]`."""
    del before
    num_rows = inputs.kv_lens.shape[0]
    head_tiles = pl.cdiv(inputs.heads_per_key, plan.num_heads)
    head, head_tile = pl.program_id(0) // head_tiles, pl.program_id(0) % head_tiles
    # A request's last tiles see the most and take longest, so they begin first.
    tile = _find_tile(inputs, pl.num_programs(1) - 1 - pl.program_id(1), plan)

    @pl.when(tile.row <= num_rows)
    def _() -> None:
        width = inputs.q.shape[2]
        index = jnp.arange(plan.num_rows, dtype=jnp.int32)
        offset = index // plan.num_heads
        group = head_tile * plan.num_heads + index % plan.num_heads
        is_query = (offset < jnp.minimum(tile.num_tokens, plan.num_queries)) & (
            group < inputs.heads_per_key
        )
        column = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
        mask = both(is_query[:, None], within(column, width))
        query = head * inputs.heads_per_key + group
        at = ((tile.start + offset)[:, None], query[:, None], column)
        q = inputs.queries(at, mask, curve)
        reader = BlockReader(inputs, tile.row, head, plan.block_tokens)
        softmax = _attend_blocks(q, tile.position + offset, tile, reader, plan, curve)
        sinks = None if inputs.sinks is None else load(inputs.sinks.at[query], is_query)
        plgpu.store(out_ref.at[at], softmax.result(sinks), mask=mask)


def _attend_blocks(
    q: jax.Array,
    position: jax.Array,
    tile: _Tile,
    reader: BlockReader,
    plan: _Plan,
    curve: Curve,
) -> Softmax:
    """Takes queries `[R, H]` at positions `[R]` through the cached tokens that any of them sees.

    Blocks in the middle, which all of them see whole, are spared the masks.
    """
    inputs, size = reader.inputs, plan.block_tokens
    last = jnp.minimum(tile.position + plan.num_queries, tile.kv_len) - 1
    starts = inputs.first_visible(position)

    def masked_block(index: jax.Array, softmax: Softmax) -> Softmax:
        at = index * size + jnp.arange(size, dtype=jnp.int32)
        is_seen = at <= last
        visible = at[None, :] <= jnp.minimum(position, last)[:, None]
        if inputs.windows is not None:
            is_seen = is_seen & (at >= inputs.first_visible(tile.position))
            visible = visible & (at[None, :] >= starts[:, None])
        return softmax.add(q, reader.read(index * size, is_seen), visible, curve)

    def whole_block(index: jax.Array, softmax: Softmax) -> Softmax:
        return softmax.add(q, reader.read(index * size, None), None, curve)

    softmax = Softmax.start(*q.shape)
    first = inputs.first_visible(tile.position) // size
    end = pl.cdiv(last + 1, size)
    first_whole = first
    if inputs.windows is not None:
        first_whole = jnp.minimum(pl.cdiv(inputs.first_visible(last), size), end)
        softmax = jax.lax.fori_loop(first, first_whole, masked_block, softmax)
    end_whole = jnp.maximum((tile.position + 1) // size, first_whole)
    softmax = jax.lax.fori_loop(first_whole, end_whole, whole_block, softmax)
    return jax.lax.fori_loop(end_whole, end, masked_block, softmax)


def _find_tile(inputs: Inputs, index: jax.Array, plan: _Plan) -> _Tile:
    """Returns the batch's tile of this index; its row is above B where there are fewer."""
    num_tokens, num_rows = inputs.q.shape[0], inputs.kv_lens.shape[0]
    row = jnp.arange(pl.next_power_of_2(num_rows + 1), dtype=jnp.int32)
    is_request = (row >= inputs.num_decode[0]) & (row < inputs.num_requests[0])
    starts = load(inputs.query_starts.at[row], row <= num_rows)
    ends = load(inputs.query_starts.at[row + 1], row < num_rows)
    # The tokens beyond the last are a request more, which sees nothing.
    ends = jnp.where(row == num_rows, num_tokens, ends)
    lens = jnp.where(is_request | (row == num_rows), ends - starts, 0)
    num_tiles = pl.cdiv(lens, plan.num_queries)
    end_tiles = jnp.cumsum(num_tiles)
    own = jnp.sum(jnp.where(end_tiles <= index, 1, 0))
    total = jnp.sum(num_tiles)

    def pick(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(row == own, values, 0))

    skipped = (index - pick(end_tiles - num_tiles)) * plan.num_queries
    q_len = pick(lens)
    kv_len = jnp.where(own < num_rows, inputs.kv_lens[jnp.minimum(own, num_rows - 1)], 0)
    return _Tile(
        row=jnp.where(index < total, own, num_rows + 1),
        start=pick(starts) + skipped,
        num_tokens=q_len - skipped,
        position=kv_len - q_len + skipped,
        kv_len=kv_len,
    )
