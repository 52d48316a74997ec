"""How a TPU kernel fetches pages of the cache: blocks of them, into two buffers by turns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pallasite.pallas_kernels.paged_attention.contract import PagedCache

MAX_UNROLLED = 16
"""How many copies are started in a row without a loop, each of which is some scalar work."""


class NewRows(NamedTuple):
    """The rows of new tokens, or references to them.

    Shapes: rows [T, K * R, W], as f32 that the cache's type holds exactly; scales [T, K * 2, 128],
    equal in all columns, None where the cache has none.
    """

    rows: Any
    scales: Any


class PageBuffers(NamedTuple):
    """What pages are fetched into, with two slots each.

    Shapes: values [2, p, K, R, page, W], scales [2, p, K, 2, page] or None, fetched [2], which are
    semaphores.
    """

    values: Any
    scales: Any
    fetched: Any

    @classmethod
    def shapes(cls, cache: PagedCache, num_pages: int) -> "PageBuffers":
        """Returns what to ask for as scratch, for blocks of `num_pages`."""

        def twice(array: jax.Array) -> Any:
            return pltpu.VMEM((2, num_pages, *array.shape[2:]), array.dtype)

        return cls(
            values=twice(cache.values),
            scales=None if cache.scales is None else twice(cache.scales),
            fetched=pltpu.SemaphoreType.DMA((2,)),
        )

    @property
    def num_pages(self) -> int:
        return self.values.shape[1]

    @property
    def page(self) -> int:
        return self.values.shape[4]

    @property
    def value_row(self) -> int:
        """Which of a head's rows has the value."""
        return self.values.shape[3] - 1

    def rows(self, slot: Array, pages: Any, head: int | Array, row: int) -> Shaped[Array, "S W"]:
        """Some pages' keys or values of a head."""
        return self.values[slot, pages, head, row].reshape(-1, self.values.shape[5])


class PageReader(NamedTuple):
    """Fetches pages of one layer.

    Attributes:
        layer: [1] in SMEM.
        page_table: [B * M] in SMEM.
        pages_a_row: M.
        cache: in HBM.
        buffers: in VMEM.
    """

    layer: Any
    page_table: Any
    pages_a_row: int
    cache: PagedCache
    buffers: PageBuffers

    def page_id(self, request: Array, page: Array) -> Array:
        return self.page_table[request * self.pages_a_row + page]

    def start(self, request: Array, first: Array, num_pages: Array, slot: Array) -> None:
        """Starts to fetch some pages of a request. An id out of bounds fetches some other page."""
        most = self.buffers.num_pages
        whole = num_pages == most

        def fetch_page(index: Array, _: None) -> None:
            page_id = self.page_id(request, first + index)
            page_id = jnp.clip(page_id, 0, self.cache.values.shape[1] - 1)
            for copy in self._copies(page_id, index, slot):
                copy.start()

        @pl.when(whole)
        def fetch_whole_block() -> None:
            jax.lax.fori_loop(0, most, fetch_page, None, unroll=min(MAX_UNROLLED, most))

        @pl.when(~whole)
        def fetch_some() -> None:
            jax.lax.fori_loop(0, num_pages, fetch_page, None)

    def wait(self, num_pages: Array, slot: Array) -> None:
        """Waits for what `start` has started."""
        most = self.buffers.num_pages
        whole = num_pages == most

        @pl.when(whole)
        def wait_for_whole_block() -> None:
            for hbm, vmem in self._arrays():
                some = hbm.at[0, pl.ds(0, most)]
                pltpu.make_async_copy(some, vmem.at[slot], self.buffers.fetched.at[slot]).wait()

        @pl.when(~whole)
        def wait_for_some() -> None:
            def wait_for_page(index: Array, _: None) -> None:
                for copy in self._copies(jnp.int32(0), index, slot):
                    copy.wait()

            jax.lax.fori_loop(0, num_pages, wait_for_page, None)

    def _arrays(self) -> list[tuple[Any, Any]]:
        pairs = [(self.cache.values, self.buffers.values)]
        if self.cache.scales is not None:
            pairs.append((self.cache.scales, self.buffers.scales))
        return pairs

    def _copies(self, page_id: Array, index: Array, slot: Array) -> list[Any]:
        at = self.layer[0], page_id
        done = self.buffers.fetched.at[slot]
        return [
            pltpu.make_async_copy(hbm.at[at], vmem.at[slot, index], done)
            for hbm, vmem in self._arrays()
        ]


def is_in_cache(cache: PagedCache, page_id: Array) -> Array:
    """Returns whether the cache has such a page."""
    return (page_id >= 0) & (page_id < cache.values.shape[1])


def row_scales(
    buffers: PageBuffers, slot: Array, pages: Any, head: int | Array, which: int
) -> Float[Array, "1 S"]:
    """Returns the scales of some pages' keys (0) or values (1) of a head."""
    one = [
        buffers.scales[slot, pages.start + index, head, pl.ds(which, 1)]
        for index in range(pages.size)
    ]
    return jnp.concatenate(one, axis=1)


def clear_pages(buffers: PageBuffers, slot: Array, first: Array, end: int | Array) -> None:
    """Sets the values of pages that were not fetched to 0: 0 * NaN is NaN."""

    def clear_page(index: Array, _: None) -> None:
        values = buffers.values.at[slot, index, :, buffers.value_row]
        values[...] = jnp.zeros(values.shape, values.dtype)
        if buffers.scales is not None:
            scales = buffers.scales.at[slot, index]
            scales[...] = jnp.zeros(scales.shape, scales.dtype)

    jax.lax.fori_loop(first, end, clear_page, None)


def clear_tiles(buffers: PageBuffers, slot: Array, index: Array, first: Array, tile: int) -> None:
    """Sets the values of a page from its tile `first` on to 0."""

    def clear_tile(number: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(number * tile, tile), tile)
        values = buffers.values.at[slot, index, :, buffers.value_row, rows]
        values[...] = jnp.zeros(values.shape, values.dtype)

    jax.lax.fori_loop(first, buffers.page // tile, clear_tile, None)


def narrow(values: Array, dtype: jnp.dtype) -> Array:
    """Casts f32 that `dtype` holds exactly."""
    if dtype == jnp.int8:
        values = values.astype(jnp.int32)
    return values.astype(dtype)


def tile_rows(page: int, dtype: jnp.dtype) -> int:
    """Returns how many rows of a page move at once: a register's, or all."""
    return min(page, 32 // dtype.itemsize)
