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
            "clear_rest": is_cut,
            "clear_page": (block_pages if is_large else num_pieces * piece_pages) - last_pages,
            "attend_whole": (num_blocks - is_masked) / num_blocks,
            "attend_most": (is_masked and is_large) / num_blocks,
            "attend_pieces": (not is_large) / num_blocks,
            "attend_piece": num_pieces,
            "wait_for_rows": 0,
        },
        may_lack=_few({"fetch_whole_block"}, block_pages),
    )


def prefill_block(scale: Number, block_pages: int) -> Count:
    """Returns the count of Pallasite's prefill for a block that all queries of a tile see.

    It is of the region take_block: the next block's fetch is in it.
    """
    return Count(
        times={
            "start_next": 1,
            "start_next_pair": 0,
            "start_next/fetch_whole_block": 1,
            "start_next/fetch_some": 0,
            "wait_for_some": 0,
            "attend_clear": 1,
            "attend_masked": 0,
        },
        scale=scale,
        may_lack=_few({"start_next/fetch_whole_block"}, block_pages),
    )


def prefill_prompt(num_tokens: int, page: int, tile_tokens: int, block_pages: int) -> Count:
    """Returns the count of Pallasite's prefill for a prompt that nothing is cached of.

    Whole tiles and pages; all of it, of the region "grid".
    """
    firsts = range(0, num_tokens, tile_tokens)
    pages = [-(-(first + tile_tokens) // page) for first in firsts]
    blocks = [-(-seen // block_pages) for seen in pages]
    num_blocks, num_tiles = sum(blocks), len(firsts)
    # The last block of a tile may have fewer pages. It is the tile's first, too, where it is alone.
    cut = [seen % block_pages for seen in pages if seen % block_pages]
    num_first_cut = sum(seen < block_pages for seen in pages)
    num_later, num_later_cut = num_blocks - num_tiles, len(cut) - num_first_cut
    num_clear = sum((first + 1) // (block_pages * page) for first in firsts)
    num_masked = num_blocks - num_clear
    later_cut = num_later_cut / max(num_later, 1)
    first_cut = num_first_cut / num_tiles
    fetched = sum(cut) / max(len(cut), 1)
    return Count(
        times={
            "if": 1,
            "run": 1,
            "start_first": 0,
            "take_block": num_blocks / num_tiles,
            "start_next": num_later / num_blocks,
            "start_next/fetch_whole_block": 1 - later_cut,
            "start_next/fetch_some": later_cut,
            "start_next_pair": num_tiles / num_blocks,
            "start_next_pair/fetch_whole_block": 1 - first_cut,
            "start_next_pair/fetch_some": first_cut,
            "fetch_some/fetch_page": fetched,
            "wait_for_some": len(cut) / num_blocks,
            "wait_for_page": fetched,
            "attend_clear": num_clear / num_blocks,
            "attend_masked": num_masked / num_blocks,
            "clear_page": (len(cut) * block_pages - sum(cut)) / num_masked,
            "clear_rows": 0,
        },
        scale=num_tiles,
        may_lack=_few(
            {"start_next/fetch_whole_block", "start_next_pair/fetch_whole_block"}, block_pages
        ),
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


def ragged_prompt(num_tokens: int, block_tokens: int, num_queries: int) -> Count:
    """Returns the count of JAX's ragged_paged_attention for a prompt that nothing is cached of.

    Each block of queries goes through all of the request's cached tokens, those after it, too.
    """
    return Count(
        times={
            "if": 1,
            "prefetch_first_kv_blk": 0,
            "compute_with_cur_q_blk": 1,
            "compute_with_kv_blk_in_cur_seq": -(-num_tokens // block_tokens),
            "prefetch_next_kv_blk": 1,
        },
        scale=num_tokens // num_queries,
    )


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


def _few(names: set[str], block_pages: int) -> frozenset[str]:
    """Of few copies the compiler makes no branch."""
    return frozenset(names if block_pages < 8 else ())
