"""The counts of Pallasite's and of JAX's TPU attention kernels, for the units that are compared.

All but those of one block are of the region "grid": the work of a step. A unit of decode is a
request of some cached tokens among many others: its steps of the grid, the start of its softmax,
the issue of the copies that fetch its pages, the products, the cache's write where the kernel has
one, and its result. What a call does once, before the grid, for its first request and for its last
one, is left out.
"""

from benchmarks.kernel_work import Count, Number


def decode(num_tokens: int, page: int, block_pages: int, piece_pages: int, tile: int) -> Count:
    """Returns the count of Pallasite's decode for a request of so many cached tokens.

    `tile` is the rows of a page that move at once.
    """
    num_pages, block_tokens = -(-num_tokens // page), block_pages * page
    num_blocks = -(-num_pages // block_pages)
    last_pages = num_pages - (num_blocks - 1) * block_pages
    is_cut = last_pages < block_pages
    is_masked = num_tokens % block_tokens > 0
    is_large = 2 * last_pages > block_pages
    num_pieces = -(-last_pages // piece_pages)
    return Count(
        times={
            "if": 1,
            "run": 1,
            "start_first": 0,
            "take_block": num_blocks,
            "fetch_next": 1,
            "fetch_whole_block": (num_blocks - is_cut) / num_blocks,
            "fetch_some": is_cut / num_blocks,
            "fetch_some/fetch_page": last_pages,
            "wait_for_some": is_cut / num_blocks,
            "wait_for_page": last_pages,
            "finish_block": 1 / num_blocks,
            # Behind the new row, to the end of its page.
            "clear_tile": page // tile - ((num_tokens - 1) % page // tile + 1),
            "clear_page": (block_pages if is_large else num_pieces * piece_pages) - last_pages,
            "attend_whole": (num_blocks - is_masked) / num_blocks,
            "attend_most": (is_masked and is_large) / num_blocks,
            "attend_pieces": (not is_large) / num_blocks,
            "attend_piece": num_pieces,
            "wait_for_rows": 0,
        },
        # Of few copies the compiler makes no branch.
        may_lack=frozenset({"fetch_whole_block"} if block_pages < 8 else ()),
    )


def prefill_block(scale: Number) -> Count:
    """Returns the count of Pallasite's prefill for a block that all queries of a tile see.

    It is of the region take_block: the next block's fetch is in it.
    """
    return Count(
        times={
            "start_next": 1,
            "start_next_pair": 0,
            "start_next/fetch_some": 0,
            "wait_for_some": 0,
            "attend_clear": 1,
            "attend_masked": 0,
        },
        scale=scale,
    )


def write_page(page: int, tile: int) -> Count:
    """Returns the count of Pallasite's write for a page of new rows."""
    return Count(
        times={
            "if": 1,
            "run": 1,
            "start_first": 0,
            "start_next": 1,
            "wait_for_tile": page // tile,
            "lay_out_tile": page // tile,
            "write_page": 1,
            "write_tile": page // tile,
            "wait_for_all": 0,
        },
        may_lack=frozenset({"start_next"}),
    )


def ragged_decode(num_tokens: int, block_tokens: int, num_queries: int) -> Count:
    """Returns the count of JAX's ragged_paged_attention, `num_queries` requests in a grid step."""
    return Count(
        times={
            "if": 1,
            "prefetch_first_kv_blk": 0,
            "compute_with_cur_q_blk": num_queries,
            "compute_with_kv_blk_in_cur_seq": -(-num_tokens // block_tokens),
            "prefetch_next_kv_blk": 1,
        },
        scale=1 / num_queries,
    )


def ragged_prefill_block(scale: Number) -> Count:
    """Returns the count of one block of JAX's ragged_paged_attention.

    It is of the region compute_with_kv_blk_in_cur_seq.
    """
    return Count(times={"prefetch_next_kv_blk": 1}, scale=scale)


def paged_decode(num_tokens: int, block_tokens: int, num_kv_heads: int) -> Count:
    """Returns the count of JAX's paged_attention, a key head in each grid step."""
    num_blocks = -(-num_tokens // block_tokens)
    return Count(
        times={
            "if": 1,
            "body": num_blocks,
            "flash_attention": 1,
            # What comes next: after a head's last block another head, after all a request.
            "flash_attention/if": 1 / num_blocks,
            "advance_h": 1 / num_blocks,
            "advance_b": 1 / num_kv_heads,
            "advance_to_next_non_zero_length": 0,
            "prefetch_first_block": 0,
            "prefetch_next_block": 1,
            "init": 1 / num_blocks,
        },
        scale=num_kv_heads,
        may_lack=frozenset({"advance_h"}),
    )
