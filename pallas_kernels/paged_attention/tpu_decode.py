"""The TPU kernel for requests with one query: the cache is read once, and the new rows are written.

Requests run one after another; the pages of one are fetched in blocks while the block before is
attended to, across the borders between requests. A block that is at most half full, as a request's
last one may be, is taken in pieces, as many as it needs. What lies in a buffer beyond the cached
tokens becomes zeros first: it may hold anything, and 0 * NaN is NaN.

This file knows no ragged batches, and nothing of how queries come to be in rows as wide as the
cache's.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallasite.pallas_kernels.paged_attention.contract import PagedCache
from pallasite.pallas_kernels.paged_attention.tpu_heads import Heads, HeadsScratch
from pallasite.pallas_kernels.paged_attention.tpu_pages import (
    NewRows,
    PageBuffers,
    PageReader,
    clear_pages,
)
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES, Scoring
from pallasite.pallas_kernels.paged_attention.tpu_row import RowScratch, RowWriter
from pallasite.pallas_kernels.paged_attention.tpu_sizes import check_divides, check_positive


@dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """How much the decode kernel takes at once.

    Attributes:
        pages: fetched by one block.
        piece_pages: taken at once of a block that is not whole; it divides `pages`.
        heads: key heads whose products stand side by side in the program; it divides K.
    """

    pages: int
    piece_pages: int
    heads: int

    def __post_init__(self) -> None:
        check_positive(self)
        check_divides("piece_pages", self.piece_pages, self.pages, "pages")


class Scalars(NamedTuple):
    """What decides where to read and write, in SMEM.

    Shapes: layer [1], window [1] (how many positions the layer sees), num_decode [1], kv_lens [B],
    page_table [B * M].
    """

    layer: Any
    window: Any
    num_decode: Any
    kv_lens: Any
    page_table: Any


class Inputs(NamedTuple):
    """Shapes: q [1, K, g, W]; new of one token, its scales [1, K, 2, 128]; sinks [K, g, 128]; the
    cache's own."""

    q: Any
    new: NewRows
    sinks: Any
    cache: PagedCache


class Outputs(NamedTuple):
    """Shapes: out [1, K, g, W], the cache's own."""

    out: Any
    cache: PagedCache


class Scratch(NamedTuple):
    """What is kept in VMEM, and in SMEM the slot [1] that the next block is in."""

    pages: PageBuffers
    heads: HeadsScratch
    row: RowScratch
    slot: Any


def decode(
    q: Float[Array, "B K g W"],
    new: NewRows,
    sinks: Float[Array, "K g"] | None,
    cache: PagedCache,
    scalars: Scalars,
    scoring: Scoring,
    blocks: DecodeBlocks,
    vmem_limit: int,
    interpret: Any,
) -> tuple[Float[Array, "B K g W"], PagedCache]:
    """Attends the first `scalars.num_decode` tokens, each the last of its request.

    Writes their new rows, too. `q` is scaled for `scoring`. `sinks` are in units of log2(e). Rows
    of other tokens in the result are not written.
    """

    def of_token(array: jax.Array) -> pl.BlockSpec:
        rest = array.shape[1:]
        return pl.BlockSpec((1, *rest), lambda b, _: (b,) + (0,) * len(rest))

    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[..., None], (*sinks.shape, LANES))
    if new.scales is not None:
        # As a page's scales lie, so that one goes into them as it is.
        scales = new.scales.reshape(q.shape[0], q.shape[1], 2, LANES)
        new = new._replace(scales=scales)
    inputs = Inputs(q, new, sinks, cache)
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cache)
    check_divides("heads", blocks.heads, q.shape[1], "the key heads")
    num_columns = blocks.pages * cache.page_size
    scratch = Scratch(
        pages=PageBuffers.shapes(cache, blocks.pages),
        heads=HeadsScratch.shapes(q.shape[1:], scoring, blocks.heads, num_columns),
        row=RowScratch.shapes(cache),
        slot=pltpu.SMEM((1,), jnp.int32),
    )
    num_before = len(scalars) + len(jax.tree.leaves(inputs[:3]))
    num_arrays = len(jax.tree.leaves(cache))

    def kernel(scalars: Scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
        request = pl.program_id(0)

        # A grid has a step at least, so that its copies in and out have one.
        @pl.when(scalars.num_decode[0] > 0)
        def run() -> None:
            _Kernel(scoring, blocks, scalars, inputs, outputs, scratch).run(request)

    (result,) = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(scalars.num_decode[0], 1),),
            in_specs=[
                Inputs(
                    of_token(q),
                    jax.tree.map(of_token, new),
                    None if sinks is None else pl.BlockSpec(sinks.shape, lambda b, _: (0, 0, 0)),
                    in_hbm,
                )
            ],
            out_specs=(Outputs(of_token(q), in_hbm),),
            scratch_shapes=(scratch,),
        ),
        out_shape=(
            Outputs(
                jax.ShapeDtypeStruct(q.shape, jnp.float32),
                jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),
            ),
        ),
        input_output_aliases={num_before + i: 1 + i for i in range(num_arrays)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit,
            # Page ids are clipped; all else follows from shapes.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_attention_decode",
    )(scalars, inputs)
    return result


class _Kernel(NamedTuple):
    """One grid step: one request."""

    scoring: Scoring
    blocks: DecodeBlocks
    scalars: Scalars
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch

    @property
    def page(self) -> int:
        return self.scratch.pages.page

    @property
    def cache(self) -> PagedCache:
        """The cache in HBM; the one given and the one returned are the same memory."""
        return self.outputs.cache

    @property
    def reader(self) -> PageReader:
        pages_a_row = self.scalars.page_table.shape[0] // self.scalars.kv_lens.shape[0]
        return PageReader(
            self.scalars.layer,
            self.scalars.page_table,
            pages_a_row,
            self.cache,
            self.scratch.pages,
        )

    @property
    def writer(self) -> RowWriter:
        return RowWriter(self.scalars.layer, self.cache, self.scratch.pages, self.scratch.row)

    @property
    def heads(self) -> Heads:
        return Heads(self.scoring, self.scratch.heads, self.scratch.pages)

    def run(self, request: Array) -> None:
        slot_ref = self.scratch.slot

        @pl.when(request == 0)
        def start_first() -> None:
            slot_ref[0] = 0
            self.writer.start()
            self.fetch(request, jnp.int32(0), jnp.int32(0))

        self.heads.start(self.inputs.q, self.inputs.sinks)
        num_blocks = self.num_blocks(request)

        def take_block(block: Array, slot: Array) -> Array:
            is_last = block + 1 == num_blocks

            @pl.when((request + 1 < self.scalars.num_decode[0]) | ~is_last)
            def fetch_next() -> None:
                self.fetch(
                    jnp.where(is_last, request + 1, request),
                    jnp.where(is_last, 0, block + 1),
                    1 - slot,
                )

            first, num_pages = self.block_pages(request, block)
            self.reader.wait(num_pages, slot)

            @pl.when(is_last)
            def finish_block() -> None:
                self.finish_block(request, first, num_pages, slot)

            self.attend_block(request, first, num_pages, slot)
            return 1 - slot

        slot_ref[0] = jax.lax.fori_loop(0, num_blocks, take_block, slot_ref[0])
        self.outputs.out[0] = self.heads.result()

        @pl.when(request + 1 == self.scalars.num_decode[0])
        def wait_for_rows() -> None:
            self.writer.wait(jnp.int32(0))
            self.writer.wait(jnp.int32(1))

    def first_position(self, request: Array) -> Array:
        """The first position that the request's query sees."""
        if not self.scoring.has_window:
            return jnp.int32(0)
        return jnp.maximum(self.scalars.kv_lens[request] - self.scalars.window[0], 0)

    def pages(self, request: Array) -> tuple[Array, Array]:
        """The first of the request's pages that is read, and the end of them."""
        kv_len = self.scalars.kv_lens[request]
        return self.first_position(request) // self.page, pl.cdiv(kv_len, self.page)

    def num_blocks(self, request: Array) -> Array:
        first, end = self.pages(request)
        return pl.cdiv(end - first, self.blocks.pages)

    def block_pages(self, request: Array, block: Array) -> tuple[Array, Array]:
        """The first page of a block, and how many it has."""
        first, end = self.pages(request)
        first += block * self.blocks.pages
        return first, jnp.minimum(end - first, self.blocks.pages)

    def fetch(self, request: Array, block: Array, slot: Array) -> None:
        first, num_pages = self.block_pages(request, block)
        self.reader.start(request, first, num_pages, slot)

    def finish_block(self, request: Array, first: Array, num_pages: Array, slot: Array) -> None:
        """Writes the new row, and clears what the last block has beyond it."""
        index = num_pages - 1
        row = (self.scalars.kv_lens[request] - 1) % self.page
        page_id = self.reader.page_id(request, first + index)
        self.writer.write(self.inputs.new, slot, index, row, page_id, request % 2)

        @pl.when(num_pages < self.blocks.pages)
        def clear_rest() -> None:
            piece = self.blocks.piece_pages
            end = jnp.where(
                self.is_large(num_pages), self.blocks.pages, self.num_pieces(num_pages) * piece
            )
            clear_pages(self.scratch.pages, slot, num_pages, end)

    def is_large(self, num_pages: Array) -> Array:
        """Whether a block is taken at once, not in pieces."""
        return 2 * num_pages > self.blocks.pages

    def num_pieces(self, num_pages: Array) -> Array:
        return pl.cdiv(num_pages, self.blocks.piece_pages)

    def attend_block(self, request: Array, first: Array, num_pages: Array, slot: Array) -> None:
        start, kv_len = first * self.page, self.scalars.kv_lens[request]
        first_seen, end_seen = self.first_position(request) - start, kv_len - start
        piece = self.blocks.piece_pages
        is_whole, is_large = end_seen >= self.blocks.pages * self.page, self.is_large(num_pages)

        def attend(pages: Any, *, has_end: bool) -> None:
            shape = (self.inputs.q.shape[2], pages.size * self.page)
            row = pages.start * self.page + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            seen = row >= first_seen if self.scoring.has_window else None
            if has_end:
                seen = row < end_seen if seen is None else seen & (row < end_seen)
            self.heads.attend(slot, pages, seen)

        # The same but for a mask, which costs registers.
        @pl.when(is_whole)
        def attend_whole() -> None:
            attend(pl.ds(0, self.blocks.pages), has_end=False)

        @pl.when(is_large & ~is_whole)
        def attend_most() -> None:
            attend(pl.ds(0, self.blocks.pages), has_end=True)

        @pl.when(~is_large)
        def attend_pieces() -> None:
            def attend_piece(index: Array, _: None) -> None:
                attend(pl.ds(index * piece, piece), has_end=True)

            jax.lax.fori_loop(0, self.num_pieces(num_pages), attend_piece, None)
