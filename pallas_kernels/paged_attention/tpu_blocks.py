"""How much the TPU kernels take at once, by what fits on the chip."""

from pallasite.pallas_kernels.paged_attention.contract import PagedCache
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks
from pallasite.pallas_kernels.target import Target


def vmem_limit(target: Target) -> int:
    assert target.vmem_bytes is not None
    return target.vmem_bytes * 3 // 4


def decode_blocks(cache: PagedCache, pages_a_row: int, target: Target) -> DecodeBlocks:
    num_heads, page = cache.values.shape[2], cache.page_size
    pages = _pages(cache, pages_a_row, 2048, vmem_limit(target) // 2)
    heads = _divisor(num_heads, 8)
    return DecodeBlocks(pages=pages, piece_pages=max(1, min(pages, 512 // page)), heads=heads)


def prefill_blocks(
    cache: PagedCache, pages_a_row: int, num_tokens: int, group: int, target: Target
) -> PrefillBlocks:
    num_heads, _, _, width = cache.values.shape[2:]
    tokens = 16
    while (
        2 * tokens <= min(128, num_tokens) and 2 * tokens * num_heads * group * width <= 4096 * 128
    ):
        tokens *= 2
    rows = _divisor(tokens * group, 256, 16)
    parts = tokens * group // rows
    return PrefillBlocks(
        tokens=tokens,
        pages=_pages(cache, pages_a_row, 512, vmem_limit(target) // 3),
        rows=rows,
        heads=_divisor(num_heads, max(1, 8 // parts)),
    )


def _pages(cache: PagedCache, pages_a_row: int, most_tokens: int, room: int) -> int:
    """Returns how many pages, a power of two, one of two buffers may hold."""
    num_heads, num_rows, page, width = cache.values.shape[2:]
    page_bytes = num_heads * num_rows * page * width * cache.values.dtype.itemsize
    most = min(most_tokens // page, pages_a_row, cache.values.shape[1], room // (2 * page_bytes))
    pages = 1
    while 2 * pages <= most:
        pages *= 2
    return pages


def _divisor(of: int, most: int, step: int = 1) -> int:
    """Returns the largest divisor that is a multiple of `step` and no more than `most`."""
    return next(n for n in range(most // step * step, 0, -step) if of % n == 0)
