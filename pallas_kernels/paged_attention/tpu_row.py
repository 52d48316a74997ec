"""How the decode kernel writes a request's new row: into its block in VMEM, and on to the cache.

A cached row is part of a tile that moves as a whole. The tile has been fetched with its page, so
the new row is put into it, and a copy of the tile leaves while the kernel goes on. What lies behind
the row in its page becomes zeros: it may hold anything, and 0 * NaN is NaN.
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
    PageBuffers,
    clear_tiles,
    is_in_cache,
    narrow,
    tile_rows,
)
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES


class RowScratch(NamedTuple):
    """What is on its way to the cache, of two requests.

    Shapes: values [2, K, R, tile, W], scales [2, K, 2, page] or None, is_written [2] in SMEM,
    written [2], which are semaphores.
    """

    values: Any
    scales: Any
    is_written: Any
    written: Any

    @classmethod
    def shapes(cls, cache: PagedCache) -> "RowScratch":
        """Returns what to ask for as scratch."""
        num_heads, num_rows, page, width = cache.values.shape[2:]
        tile = tile_rows(page, cache.values.dtype)
        scales = None
        if cache.scales is not None:
            scales = pltpu.VMEM((2, *cache.scales.shape[2:]), jnp.float32)
        return cls(
            values=pltpu.VMEM((2, num_heads, num_rows, tile, width), cache.values.dtype),
            scales=scales,
            is_written=pltpu.SMEM((2,), jnp.int32),
            written=pltpu.SemaphoreType.DMA((2,)),
        )


class RowWriter(NamedTuple):
    """Writes rows of one layer.

    Attributes:
        layer: [1] in SMEM.
        cache: in HBM.
        buffers: where pages have been fetched.
        scratch: what leaves.
    """

    layer: Any
    cache: PagedCache
    buffers: PageBuffers
    scratch: RowScratch

    @property
    def tile(self) -> int:
        """Rows that leave at once."""
        return self.scratch.values.shape[3]

    def start(self) -> None:
        """To be done once, before all."""
        self.scratch.is_written[0] = 0
        self.scratch.is_written[1] = 0

    def write(
        self, new: NewRows, slot: Array, index: Array, row: Array, page_id: Array, parity: Array
    ) -> None:
        """Writes a token's rows as `row` of a page; `new` is as the decode kernel's input.

        The page is the one of the slot with this index, and `page_id` in the cache, where nothing
        is written if it is none of the cache's. Requests take turns with `parity`.
        """
        self.wait(parity)
        self._insert_row(new, slot, index, row, parity)
        if self.cache.scales is not None:
            self._insert_scales(new, slot, index, row, parity)
        is_page = is_in_cache(self.cache, page_id)
        self.scratch.is_written[parity] = is_page.astype(jnp.int32)

        @pl.when(is_page)
        def write_tile() -> None:
            for copy in self._copies(page_id, row, parity):
                copy.start()

    def wait(self, parity: Array) -> None:
        """Waits until what this parity's requests wrote last has left."""

        @pl.when(self.scratch.is_written[parity] == 1)
        def wait_for_tile() -> None:
            for copy in self._copies(jnp.int32(0), jnp.int32(0), parity):
                copy.wait()
            self.scratch.is_written[parity] = 0

    def _insert_row(
        self, new: NewRows, slot: Array, index: Array, row: Array, parity: Array
    ) -> None:
        values = self.buffers.values
        num_heads, num_rows, _, width = values.shape[2:]
        rows = self._rows(row)
        at = jax.lax.broadcasted_iota(jnp.int32, (self.tile, width), 0) - row % self.tile
        for head in range(num_heads):
            for part in range(num_rows):
                place = slot, index, head, part, rows
                given = new.rows[0, pl.ds(head * num_rows + part, 1)]
                held = values[place].astype(jnp.float32)
                held = jnp.where(at < 0, held, jnp.where(at == 0, given, 0.0))
                held = narrow(held, values.dtype)
                values[place] = held
                self.scratch.values[parity, head, part] = held
        clear_tiles(self.buffers, slot, index, row // self.tile + 1, self.tile)

    def _insert_scales(
        self, new: NewRows, slot: Array, index: Array, row: Array, parity: Array
    ) -> None:
        held, page = self.buffers.scales[slot, index], self.buffers.page
        at = jax.lax.broadcasted_iota(jnp.int32, held.shape, 2) - row
        given = jnp.concatenate([new.scales[0]] * pl.cdiv(page, LANES), axis=2)[:, :, :page]
        held = jnp.where(at < 0, held, jnp.where(at == 0, given, 0.0))
        self.buffers.scales[slot, index] = held
        self.scratch.scales[parity] = held

    def _rows(self, row: Array) -> Any:
        return pl.ds(pl.multiple_of(row // self.tile * self.tile, self.tile), self.tile)

    def _copies(self, page_id: Array, row: Array, parity: Array) -> list[Any]:
        at, done = (self.layer[0], page_id), self.scratch.written.at[parity]
        heads = slice(None), slice(None)
        to = self.cache.values.at[(*at, *heads, self._rows(row))]
        copies = [pltpu.make_async_copy(self.scratch.values.at[parity], to, done)]
        if self.cache.scales is not None:
            scales = self.scratch.scales.at[parity]
            copies.append(pltpu.make_async_copy(scales, self.cache.scales.at[at], done))
        return copies
