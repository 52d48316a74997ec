"""The TPU kernel for requests with several queries: flash attention over pages, in ragged batches.

The flat axis of tokens is cut into tiles. A grid step is a pair of a tile and a request that has
tokens in it; what the request's queries see is fetched in blocks of pages, while the block before
is attended to, across the borders between pairs. Blocks that no query of the pair sees are not
fetched. Masked are blocks that some query sees a part of, and all where the tile has other tokens.

The new rows are in the cache already. This file knows nothing of how queries come to be in rows as
wide as the cache's.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallasite.pallas_kernels.paged_attention.contract import PagedCache
from pallasite.pallas_kernels.paged_attention.tpu_pages import (
    PageBuffers,
    PageReader,
    clear_pages,
    clear_tiles,
    narrow,
    tile_rows,
)
from pallasite.pallas_kernels.paged_attention.tpu_parts import Pair, Parts, PartsScratch, Seen
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES, Scoring
from pallasite.pallas_kernels.paged_attention.tpu_sizes import check_divides, check_positive


@dataclass(frozen=True, kw_only=True)
class PrefillBlocks:
    """How much the prefill kernel takes at once.

    Attributes:
        tokens: of the flat axis in one tile.
        pages: fetched by one block.
        rows: queries of one key head that are taken at once; it divides tokens * G.
        heads: key heads side by side in the program; it divides K.
    """

    tokens: int
    pages: int
    rows: int
    heads: int

    def __post_init__(self) -> None:
        check_positive(self)


class Scalars(NamedTuple):
    """What decides where to read, in SMEM.

    Shapes: layer [1], window [1] (how many positions the layer sees), kv_lens [B], query_starts
    [B + 1], page_table [B * M], num_pairs [1], and of each pair its request and its tile.
    """

    layer: Any
    window: Any
    kv_lens: Any
    query_starts: Any
    page_table: Any
    num_pairs: Any
    pair_requests: Any
    pair_tiles: Any


class Inputs(NamedTuple):
    """Shapes: q [K, tokens * G, W], sinks [K, tokens * G, 128], the cache's own."""

    q: Any
    sinks: Any
    cache: PagedCache


class Scratch(NamedTuple):
    """What is kept in VMEM, and in SMEM the slot [1] that the next block is in."""

    pages: PageBuffers
    parts: PartsScratch
    slot: Any


def prefill(
    q: Float[Array, "K TG W"],
    sinks: Float[Array, "K r"] | None,
    cache: PagedCache,
    scalars: Scalars,
    scoring: Scoring,
    blocks: PrefillBlocks,
    group: int,
    vmem_limit: int,
    interpret: Any,
) -> Float[Array, "K TG W"]:
    """Attends the tokens of all pairs; rows of others are not written, or zeros.

    `q` is scaled for `scoring`, has the type that products take, and T is a multiple of the tiles.
    `sinks` are in units of log2(e), once for each row of a tile.
    """
    num_kv_heads, _, width = q.shape
    tile_rows = blocks.tokens * group
    check_divides("rows", blocks.rows, tile_rows, f"tokens={blocks.tokens} by {group} heads")
    check_divides("heads", blocks.heads, num_kv_heads, "the key heads")

    of_tile = pl.BlockSpec(
        (num_kv_heads, tile_rows, width), lambda i, scalars: (0, scalars.pair_tiles[i], 0)
    )
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[..., None], (*sinks.shape, LANES))
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cache)
    scratch = Scratch(
        pages=PageBuffers.shapes(cache, blocks.pages),
        parts=PartsScratch.shapes(
            (num_kv_heads, tile_rows, width), blocks.rows, blocks.pages * cache.page_size
        ),
        slot=pltpu.SMEM((1,), jnp.int32),
    )

    def kernel(scalars: Scalars, inputs: Inputs, out: Any, scratch: Scratch) -> None:
        index = pl.program_id(0)

        # A grid has a step at least, so that its copies in and out have one.
        @pl.when(scalars.num_pairs[0] > 0)
        def run() -> None:
            _Kernel(scoring, blocks, group, scalars, inputs, out, scratch).run(index)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(scalars.num_pairs[0], 1),),
            in_specs=[
                Inputs(
                    of_tile,
                    None if sinks is None else pl.BlockSpec(sinks.shape, lambda i, _: (0, 0, 0)),
                    in_hbm,
                )
            ],
            out_specs=of_tile,
            scratch_shapes=(scratch,),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit,
            # Page ids are clipped; all else follows from shapes.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_attention_prefill",
    )(scalars, Inputs(q, sinks, cache))


class _Kernel(NamedTuple):
    """One grid step: one pair."""

    scoring: Scoring
    blocks: PrefillBlocks
    group: int
    scalars: Scalars
    inputs: Inputs
    out: Any
    scratch: Scratch

    @property
    def reader(self) -> PageReader:
        pages_a_row = self.scalars.page_table.shape[0] // self.scalars.kv_lens.shape[0]
        return PageReader(
            self.scalars.layer,
            self.scalars.page_table,
            pages_a_row,
            self.inputs.cache,
            self.scratch.pages,
        )

    @property
    def page(self) -> int:
        return self.scratch.pages.page

    def run(self, index: Array) -> None:
        scratch = self.scratch
        pair = self.pair(index)

        @pl.when(index == 0)
        def start_first() -> None:
            scratch.slot[0] = 0
            self.start(pair, jnp.int32(0), jnp.int32(0))

        self.scratch.parts.start(self.inputs.sinks)
        num_blocks = self.num_blocks(pair)
        following = self.pair(jnp.minimum(index + 1, self.scalars.num_pairs[0] - 1))

        def take_block(block: Array, slot: Array) -> Array:
            is_last = block + 1 == num_blocks

            @pl.when(~is_last)
            def start_next() -> None:
                self.start(pair, block + 1, 1 - slot)

            @pl.when(is_last & (index + 1 < self.scalars.num_pairs[0]))
            def start_next_pair() -> None:
                self.start(following, jnp.int32(0), 1 - slot)

            _, num_pages = self.block_pages(pair, block)
            self.reader.wait(num_pages, slot)
            self.attend_block(pair, block, slot)
            return 1 - slot

        scratch.slot[0] = jax.lax.fori_loop(0, num_blocks, take_block, scratch.slot[0])
        self.finish(pair, index)

    def pair(self, index: Array) -> Pair:
        scalars = self.scalars
        request, tile = scalars.pair_requests[index], scalars.pair_tiles[index]
        before = tile * self.blocks.tokens
        start, end = scalars.query_starts[request], scalars.query_starts[request + 1]
        kv_len = scalars.kv_lens[request]
        first_token = jnp.maximum(start - before, 0)
        end_token = jnp.minimum(end - before, self.blocks.tokens)
        # Token t of the flat axis has the position kv_len - (end - t).
        first_position = kv_len - (end - before)
        first_page = jnp.int32(0)
        if self.scoring.has_window:
            first_seen = first_position + first_token - scalars.window[0] + 1
            first_page = jnp.maximum(first_seen, 0) // self.page
        end_page = pl.cdiv(first_position + end_token, self.page)
        return Pair(request, first_token, end_token, first_position, kv_len, first_page, end_page)

    def num_blocks(self, pair: Pair) -> Array:
        return pl.cdiv(pair.end_page - pair.first_page, self.blocks.pages)

    def block_pages(self, pair: Pair, block: Array) -> tuple[Array, Array]:
        first = pair.first_page + block * self.blocks.pages
        return first, jnp.minimum(pair.end_page - first, self.blocks.pages)

    def start(self, pair: Pair, block: Array, slot: Array) -> None:
        first, num_pages = self.block_pages(pair, block)
        self.reader.start(pair.request, first, num_pages, slot)

    def finish(self, pair: Pair, index: Array) -> None:
        """Writes the pair's rows of the tile; those of other pairs stay, or start as zeros."""
        scratch = self.scratch.parts
        before = self.scalars.pair_tiles[jnp.maximum(index - 1, 0)]
        is_first = (index == 0) | (self.scalars.pair_tiles[index] != before)

        def finish_head(head: Array, _: None) -> None:
            total = jnp.sum(scratch.total[head], axis=1, keepdims=True)
            done = scratch.weighted[head] / jnp.where(total == 0.0, 1.0, total)
            row = jax.lax.broadcasted_iota(jnp.int32, done.shape, 0)
            is_own = (row >= pair.first_token * self.group) & (row < pair.end_token * self.group)
            others = jnp.where(is_first, 0.0, self.out[head])
            self.out[head] = jnp.where(is_own, done, others)

        jax.lax.fori_loop(0, scratch.weighted.shape[0], finish_head, None)

    def attend_block(self, pair: Pair, block: Array, slot: Array) -> None:
        first, num_pages = self.block_pages(pair, block)
        start = first * self.page
        end = start + self.blocks.pages * self.page
        is_clear = (pair.first_token == 0) & (pair.end_token == self.blocks.tokens)
        is_clear &= end <= pair.first_position + 1
        if self.scoring.has_window:
            last = pair.first_position + self.blocks.tokens - 1
            is_clear &= last - start < self.scalars.window[0]

        @pl.when(is_clear)
        def attend_clear() -> None:
            self.attend(pair, start, slot, is_masked=False)

        @pl.when(~is_clear)
        def attend_masked() -> None:
            self.clear(pair, first, num_pages, slot)
            self.attend(pair, start, slot, is_masked=True)

    def clear(self, pair: Pair, first: Array, num_pages: Array, slot: Array) -> None:
        """Sets values that are no cached tokens' to 0: 0 * NaN is NaN."""
        buffers = self.scratch.pages
        clear_pages(buffers, slot, num_pages, self.blocks.pages)
        index = pair.kv_len // self.page - first

        @pl.when((index >= 0) & (index < num_pages))
        def clear_rows() -> None:
            tile = tile_rows(self.page, buffers.values.dtype)
            row = pair.kv_len % self.page
            rows = pl.ds(pl.multiple_of(row // tile * tile, tile), tile)
            at = jax.lax.broadcasted_iota(jnp.int32, (tile, buffers.values.shape[5]), 0)
            for head in range(buffers.values.shape[2]):
                place = (slot, index, head, buffers.value_row, rows)
                held = buffers.values[place]
                values = jnp.where(at < row % tile, held.astype(jnp.float32), 0.0)
                buffers.values[place] = narrow(values, held.dtype)
            if buffers.scales is not None:
                scales = buffers.scales[slot, index]
                lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 2)
                buffers.scales[slot, index] = jnp.where(lane < row, scales, 0.0)
            clear_tiles(buffers, slot, index, row // tile + 1, tile)

    def attend(self, pair: Pair, start: Array, slot: Array, *, is_masked: bool) -> None:
        parts = Parts(
            self.scoring, self.group, self.inputs.q, self.scratch.parts, self.scratch.pages
        )
        seen = Seen(pair, start, self.scalars.window[0]) if is_masked else None
        parts.attend(slot, self.blocks.heads, seen)
