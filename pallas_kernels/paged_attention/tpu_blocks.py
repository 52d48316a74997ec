"""How much the TPU kernels take at once: what the table says, else what fits on the chip."""

from dataclasses import replace
from typing import TypeVar

from pallasite.pallas_kernels.paged_attention.block_table import ENTRIES, Shape
from pallasite.pallas_kernels.paged_attention.contract import PagedCache
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks
from pallasite.pallas_kernels.target import Target

DECODE_TOKENS = 2048
"""Cached tokens of a decode block: enough work to hide the next block's way."""

PIECE_TOKENS = 512
"""Cached tokens of a piece of a block that is not whole: at most so many are taken in vain."""

PREFILL_TOKENS = 512
"""Cached tokens of a prefill block."""

TILE_TOKENS = 128
"""Queries of a prefill tile, at most."""

TILE_VALUES = 4096 * 128
"""Values of a prefill tile's queries over all heads, at most."""

PART_ROWS = 256
"""Queries of a key head that are taken at once, at most."""

PARTS_AT_ONCE = 8
"""Parts that stand side by side in the prefill program: its length, and so its time to compile."""

HEADS_AT_ONCE = 8
"""Key heads that stand side by side in the decode program."""

_Blocks = TypeVar("_Blocks", DecodeBlocks, PrefillBlocks)


def vmem_limit(target: Target) -> int:
    """Returns how much VMEM a kernel may take; XLA keeps things there, too."""
    if target.vmem_bytes is None:
        raise ValueError(f"got the target {target.name}, whose VMEM is not known")
    return target.vmem_bytes * 3 // 4


def decode_blocks(cache: PagedCache, pages_a_row: int, group: int, target: Target) -> DecodeBlocks:
    """Returns the decode kernel's blocks for a cache, abstract or not, on a chip."""
    blocks = _find(DecodeBlocks, cache, group, target)
    if blocks is None:
        pages = _most_pages(cache, DECODE_TOKENS, vmem_limit(target) // 2)
        heads = _divisor(cache.values.shape[2], HEADS_AT_ONCE)
        piece_pages = _divisor(pages, _power_of_two(PIECE_TOKENS // cache.page_size))
        blocks = DecodeBlocks(pages=pages, piece_pages=piece_pages, heads=heads)
    pages = _limit(blocks.pages, pages_a_row, cache)
    return replace(blocks, pages=pages, piece_pages=_divisor(pages, blocks.piece_pages))


def prefill_blocks(
    cache: PagedCache, pages_a_row: int, num_tokens: int, group: int, target: Target
) -> PrefillBlocks:
    """Returns the prefill kernel's blocks for a cache and a bucket of tokens on a chip."""
    blocks = _find(PrefillBlocks, cache, group, target)
    if blocks is None or blocks.tokens > num_tokens:
        blocks = _guess_prefill(cache, num_tokens, group, target)
    return replace(blocks, pages=_limit(blocks.pages, pages_a_row, cache))


def shape_of(cache: PagedCache, group: int) -> Shape:
    """Returns what the table has entries for."""
    _, _, num_heads, num_rows, page, width = cache.values.shape
    return Shape(
        cache=cache.values.dtype.name,
        page=page,
        key_heads=num_heads,
        group=group,
        row=(num_rows, width),
    )


def _find(kind: type[_Blocks], cache: PagedCache, group: int, target: Target) -> _Blocks | None:
    shape = shape_of(cache, group)
    for entry in ENTRIES:
        is_for = entry.chip == target.name and entry.shape == shape
        if is_for and isinstance(entry.blocks, kind):
            return entry.blocks
    return None


def _guess_prefill(cache: PagedCache, num_tokens: int, group: int, target: Target) -> PrefillBlocks:
    num_heads, _, _, width = cache.values.shape[2:]
    most = min(TILE_TOKENS, num_tokens, TILE_VALUES // (num_heads * group * width))
    tokens = max(16, _power_of_two(most))
    rows = _divisor(tokens * group, PART_ROWS, 16)
    num_parts = tokens * group // rows
    return PrefillBlocks(
        tokens=tokens,
        pages=_most_pages(cache, PREFILL_TOKENS, vmem_limit(target) // 3),
        rows=rows,
        heads=_divisor(num_heads, max(1, PARTS_AT_ONCE // num_parts)),
    )


def _most_pages(cache: PagedCache, most_tokens: int, room: int) -> int:
    """Returns how many pages each of two buffers in `room` bytes may hold."""
    num_heads, num_rows, page, width = cache.values.shape[2:]
    page_bytes = num_heads * num_rows * page * width * cache.values.dtype.itemsize
    return _power_of_two(min(most_tokens // page, room // (2 * page_bytes)))


def _limit(pages: int, pages_a_row: int, cache: PagedCache) -> int:
    """Returns no more pages than a request, and the cache, may have."""
    return min(pages, _power_of_two(min(pages_a_row, cache.values.shape[1])))


def _power_of_two(most: int) -> int:
    """Returns the largest power of two that is at most so large, and 1 at least."""
    return 1 << max(most.bit_length() - 1, 0)


def _divisor(of: int, most: int, step: int = 1) -> int:
    """Returns the largest divisor that is a multiple of `step` and no more than `most`."""
    return next(n for n in range(most // step * step, 0, -step) if of % n == 0)
