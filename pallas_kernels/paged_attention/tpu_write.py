"""The TPU kernel that writes the new rows of requests with several queries.

A grid step is a page that some request's new rows lie in. The rows come token by token, for all
heads at once, and the cache holds them head by head: a load with a stride takes one head's rows of
neighbouring tokens, from wherever the request's first token lies. The rows before the new ones in
their tile are fetched from the cache, and the next page's while this one's are laid out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallasite.pallas_kernels.paged_attention.contract import PagedCache
from pallasite.pallas_kernels.paged_attention.tpu_pages import (
    NewRows,
    is_in_cache,
    narrow,
    tile_rows,
)
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES


class Scalars(NamedTuple):
    """What decides where to write, in SMEM.

    Shapes: layer [1], kv_lens [B], query_starts [B + 1], page_table [B * M], num_pages [1], and of
    each page to be written its request and its number among the request's.
    """

    layer: Any
    kv_lens: Any
    query_starts: Any
    page_table: Any
    num_pages: Any
    page_requests: Any
    page_numbers: Any


class Scratch(NamedTuple):
    """Shapes: new, of a page's tokens, twice; tile and scales, what the cache holds, [2, K, R,
    tile, W] and [2, K, 2, page]; values and scales_out, what it shall hold, [2, K, R, page, W] and
    [2, K, 2, page]; is_written [2] in SMEM; semaphores [2]."""

    new: NewRows
    tile: Any
    scales: Any
    values: Any
    scales_out: Any
    is_written: Any
    fetched: Any
    written: Any


def write(
    new: NewRows,
    cache: PagedCache,
    scalars: Scalars,
    vmem_limit: int,
    interpret: Any,
) -> PagedCache:
    """Returns the cache with the rows of all pages of `scalars` in their places.

    Rows between a request's last and the end of its tile may become
    anything that is no NaN.
    """
    num_kv_heads, num_rows, page, width = cache.values.shape[2:]
    tile = tile_rows(page, cache.values.dtype)
    # A page's rows are fetched whole, wherever their tokens start.
    new = jax.tree.map(lambda a: jnp.pad(a, ((page, page), (0, 0), (0, 0))), new)
    has_scales = cache.scales is not None
    scales = pltpu.VMEM((2, num_kv_heads, 2, page), jnp.float32) if has_scales else None
    scratch = Scratch(
        new=jax.tree.map(lambda a: pltpu.VMEM((2, page, *a.shape[1:]), jnp.float32), new),
        tile=pltpu.VMEM((2, num_kv_heads, num_rows, tile, width), cache.values.dtype),
        scales=scales,
        values=pltpu.VMEM((2, num_kv_heads, num_rows, page, width), cache.values.dtype),
        scales_out=scales,
        is_written=pltpu.SMEM((2,), jnp.int32),
        fetched=pltpu.SemaphoreType.DMA((2,)),
        written=pltpu.SemaphoreType.DMA((2,)),
    )
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), cache)

    def kernel(
        scalars: Scalars, new: NewRows, _: PagedCache, cache: PagedCache, scratch: Scratch
    ) -> None:
        index = pl.program_id(0)

        @pl.when(scalars.num_pages[0] > 0)
        def run() -> None:
            _Kernel(scalars, new, cache, scratch).run(index)

    num_before = len(scalars) + len(jax.tree.leaves(new))
    num_arrays = len(jax.tree.leaves(cache))
    (result,) = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(jnp.maximum(scalars.num_pages[0], 1),),
            in_specs=[jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), new), in_hbm],
            out_specs=(in_hbm,),
            scratch_shapes=(scratch,),
        ),
        out_shape=(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache),),
        input_output_aliases={num_before + i: i for i in range(num_arrays)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit,
            # Pages that are not there are left out; all else follows from shapes.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_attention_write",
    )(scalars, new, cache)
    return result


class _Page(NamedTuple):
    """A page to be written.

    Attributes:
        page_id: where it is in the cache.
        first_row: of the new rows in the page.
        end_row: their end.
        first_token: of the padded new rows, which row 0 of the page would be.
    """

    page_id: Array
    first_row: Array
    end_row: Array
    first_token: Array


class _Kernel(NamedTuple):
    """One grid step: one page."""

    scalars: Scalars
    new: NewRows
    cache: PagedCache
    scratch: Scratch

    @property
    def page_size(self) -> int:
        return self.scratch.values.shape[3]

    @property
    def tile(self) -> int:
        return self.scratch.tile.shape[3]

    def run(self, index: Array) -> None:
        scratch, slot = self.scratch, index % 2

        @pl.when(index == 0)
        def start_first() -> None:
            scratch.is_written[0] = 0
            scratch.is_written[1] = 0
            self.start(index, slot)

        @pl.when(index + 1 < self.scalars.num_pages[0])
        def start_next() -> None:
            self.start(index + 1, 1 - slot)

        page = self.page(index)
        for copy in self.fetches(page, slot):
            copy.wait()
        self.wait_for_written(slot)
        self.lay_out(page, slot)
        is_page = is_in_cache(self.cache, page.page_id)
        scratch.is_written[slot] = jnp.where(is_page, self.num_tiles(page), 0)

        @pl.when(is_page)
        def write_page() -> None:
            first = page.first_row // self.tile

            def write_tile(number: Array, _: None) -> None:
                self.write(page, first + number, slot).start()

            jax.lax.fori_loop(0, self.num_tiles(page), write_tile, None)
            if self.cache.scales is not None:
                self.write_scales(page, slot).start()

        @pl.when(index + 1 == self.scalars.num_pages[0])
        def wait_for_all() -> None:
            self.wait_for_written(jnp.int32(0))
            self.wait_for_written(jnp.int32(1))

    def page(self, index: Array) -> _Page:
        scalars, size = self.scalars, self.page_size
        request = scalars.page_requests[index]
        start, end = scalars.query_starts[request], scalars.query_starts[request + 1]
        kv_len = scalars.kv_lens[request]
        first_position = kv_len - (end - start)
        number = first_position // size + scalars.page_numbers[index]
        before = number * size
        pages_a_row = scalars.page_table.shape[0] // scalars.kv_lens.shape[0]
        return _Page(
            scalars.page_table[request * pages_a_row + number],
            jnp.maximum(first_position - before, 0),
            jnp.minimum(kv_len - before, size),
            start + before - first_position + size,
        )

    def num_tiles(self, page: _Page) -> Array:
        return pl.cdiv(page.end_row, self.tile) - page.first_row // self.tile

    def rows(self, number: Array) -> Any:
        return pl.ds(pl.multiple_of(number * self.tile, self.tile), self.tile)

    def start(self, index: Array, slot: Array) -> None:
        for copy in self.fetches(self.page(index), slot):
            copy.start()

    def fetches(self, page: _Page, slot: Array) -> list[Any]:
        """The copies of what a page is made of."""
        scratch, done = self.scratch, self.scratch.fetched.at[slot]
        page_id = jnp.clip(page.page_id, 0, self.cache.values.shape[1] - 1)
        at = self.scalars.layer[0], page_id
        tile = self.cache.values.at[
            (*at, slice(None), slice(None), self.rows(page.first_row // self.tile))
        ]
        tokens = pl.ds(page.first_token, self.page_size)
        copies = [
            pltpu.make_async_copy(new.at[tokens], vmem.at[slot], done)
            for new, vmem in zip(self.new, scratch.new, strict=True)
            if new is not None
        ]
        copies.append(pltpu.make_async_copy(tile, scratch.tile.at[slot], done))
        if self.cache.scales is not None:
            scales = self.cache.scales.at[at]
            copies.append(pltpu.make_async_copy(scales, scratch.scales.at[slot], done))
        return copies

    def write(self, page: _Page, number: Array, slot: Array) -> Any:
        """The copy of one tile into the cache."""
        heads = slice(None), slice(None)
        return pltpu.make_async_copy(
            self.scratch.values.at[(slot, *heads, self.rows(number))],
            self.cache.values.at[(self.scalars.layer[0], page.page_id, *heads, self.rows(number))],
            self.scratch.written.at[slot],
        )

    def write_scales(self, page: _Page, slot: Array) -> Any:
        return pltpu.make_async_copy(
            self.scratch.scales_out.at[slot],
            self.cache.scales.at[self.scalars.layer[0], page.page_id],
            self.scratch.written.at[slot],
        )

    def wait_for_written(self, slot: Array) -> None:
        """Waits until what was made in this slot before has left."""
        somewhere = _Page(*[jnp.int32(0)] * 4)

        def wait_for_tile(_: Array, __: None) -> None:
            self.write(somewhere, jnp.int32(0), slot).wait()

        num_tiles = self.scratch.is_written[slot]
        jax.lax.fori_loop(0, num_tiles, wait_for_tile, None)
        if self.cache.scales is not None:

            @pl.when(num_tiles > 0)
            def wait_for_scales() -> None:
                self.write_scales(somewhere, slot).wait()

        self.scratch.is_written[slot] = 0

    def lay_out(self, page: _Page, slot: Array) -> None:
        """Makes the page's tiles that have new rows."""
        scratch = self.scratch
        num_heads, num_rows, _, width = scratch.values.shape[1:]
        first = page.first_row // self.tile
        if scratch.scales is not None:
            scratch.scales_out[slot] = scratch.scales[slot]

        def lay_out_tile(index: Array, _: None) -> None:
            number = first + index
            rows = self.rows(number)
            row = rows.start + jax.lax.broadcasted_iota(jnp.int32, (self.tile, width), 0)
            is_new = (row >= page.first_row) & (row < page.end_row)
            for head in range(num_heads):
                for part in range(num_rows):
                    new = scratch.new.rows[slot, rows, head * num_rows + part]
                    # Only the first tile has rows that were there before.
                    held = scratch.tile[slot, head, part].astype(jnp.float32)
                    is_old = (row < page.first_row) & (index == 0)
                    laid = jnp.where(is_new, new, jnp.where(is_old, held, 0.0))
                    place = slot, head, part, rows
                    scratch.values[place] = narrow(laid, scratch.values.dtype)
            if scratch.scales is not None:
                self.lay_out_scales(page, slot, rows)

        jax.lax.fori_loop(0, self.num_tiles(page), lay_out_tile, None)

    def lay_out_scales(self, page: _Page, slot: Array, rows: Any) -> None:
        scratch = self.scratch
        row = rows.start + jax.lax.broadcasted_iota(jnp.int32, (self.tile, self.page_size), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (self.tile, self.page_size), 1)
        is_own = (row == lane) & (row >= page.first_row) & (row < page.end_row)
        is_new = jnp.any(is_own, axis=0, keepdims=True)
        for head in range(scratch.scales.shape[1]):
            for part in range(2):
                new = scratch.new.scales[slot, rows, head * 2 + part]
                new = jnp.concatenate([new] * pl.cdiv(self.page_size, LANES), axis=1)
                new = new[:, : self.page_size]
                # One row a lane: a sum of it and zeros is a turn from rows to lanes.
                turned = jnp.sum(jnp.where(is_own, new, 0.0), axis=0, keepdims=True)
                place = slot, head, pl.ds(part, 1)
                scratch.scales_out[place] = jnp.where(is_new, turned, scratch.scales_out[place])
