"""Faults of the TPU's kernels of paged attention that their tests must see."""

from tests.pallas_kernels.mutations import Mutation

_TESTS = ("tests/pallas_kernels/test_paged_attention.py", "-k", "copies")
_LARGER = ("tests/pallas_kernels/test_paged_attention.py", "-k", "TPU-T200 or TPU-T5")


def _fault(file: str, name: str, old: str, new: str, tests: tuple[str, ...] = _TESTS) -> Mutation:
    return Mutation(
        name=f"TPU: {name}", file=f"paged_attention/tpu_{file}.py", old=old, new=new, tests=tests
    )


TPU = (
    _fault("parts", "prefill sees the next token", "column <= last", "column <= last + 1"),
    _fault("parts", "prefill misses its own token", "column <= last", "column < last"),
    _fault(
        "parts", "the prefill's window is one wider", "last - seen.window", "last - seen.window - 1"
    ),
    _fault(
        "parts",
        "sums are not shrunk",
        "scratch.total[part.head, part.rows] * shrink",
        "scratch.total[part.head, part.rows]",
    ),
    _fault(
        "parts",
        "the prefill's values have no scales",
        "weights *= self.row_scales(part, 1)",
        "weights *= 1.0",
        _LARGER,
    ),
    _fault(
        "prefill",
        "a block that is cut is taken for whole",
        "is_clear &= end <= pair.first_position + 1",
        "is_clear &= end <= pair.first_position + 2",
        _LARGER,
    ),
    _fault(
        "prefill",
        "a block at the window's edge is taken for whole",
        "last - start < self.scalars.window[0]",
        "last - start <= self.scalars.window[0]",
        _LARGER,
    ),
    _fault(
        "prefill",
        "the prefill's last page is dropped",
        "end_page = pl.cdiv(first_position + end_token, self.page)",
        "end_page = (first_position + end_token) // self.page",
    ),
    _fault(
        "prefill",
        "the prefill's values are not cleared",
        "self.clear(pair, first, num_pages, slot)",
        "pass",
    ),
    _fault(
        "prefill",
        "a tile loses the requests before",
        "jnp.where(is_first, 0.0, self.out[head])",
        "0.0",
    ),
    _fault("decode", "decode sees the next row", "(row < end_seen)", "(row <= end_seen)"),
    _fault(
        "decode",
        "decode misses its own token",
        "seen = row < end_seen if",
        "seen = row < end_seen - 1 if",
    ),
    _fault(
        "decode",
        "the decode's window is one wider",
        "kv_lens[request] - self.scalars.window[0]",
        "kv_lens[request] - self.scalars.window[0] - 1",
    ),
    _fault(
        "decode",
        "a block that is not whole is not masked",
        "attend(pl.ds(0, self.blocks.pages), has_end=True)",
        "attend(pl.ds(0, self.blocks.pages), has_end=False)",
    ),
    _fault(
        "decode",
        "pages that were not fetched are not cleared",
        "clear_pages(self.scratch.pages, slot, num_pages, end)",
        "pass",
    ),
    _fault(
        "decode",
        "a block of the next request is dropped",
        "(request + 1 < self.scalars.num_decode[0]) | ~is_last",
        "~is_last",
    ),
    _fault("heads", "the decode's values have no scales", "weights *= scales", "weights *= 1.0"),
    _fault("heads", "the decode's sums are not shrunk", "[:, :1] * shrink\n", "[:, :1]\n"),
    _fault(
        "pages",
        "a page of another column",
        "self.page_id(request, first + index)",
        "self.page_id(request, first)",
    ),
    _fault(
        "pages",
        "a dropped page",
        "fori_loop(0, num_pages, fetch_page, None)",
        "fori_loop(1, num_pages, fetch_page, None)",
    ),
    _fault(
        "pages",
        "a copy is not waited for",
        "pltpu.make_async_copy(some, vmem.at[slot], self.buffers.fetched.at[slot]).wait()",
        "pass",
    ),
    _fault(
        "pages",
        "copies of some pages are not waited for",
        "                    copy.wait()",
        "                    pass",
    ),
    _fault("row", "a tile is overwritten on its way", "        self.wait(parity)\n", ""),
    _fault("row", "the new row is a row late", "row % self.tile\n", "row % self.tile - 1\n"),
    _fault(
        "row",
        "a page that is none is written",
        "is_page = is_in_cache(self.cache, page_id)",
        "is_page = page_id < 2**31 - 1",
    ),
    _fault(
        "write",
        "the chunk's rows are a row late",
        "start + before - first_position + size,",
        "start + before - first_position + size - 1,",
    ),
    _fault(
        "write",
        "rows before the chunk's are lost",
        "(row < page.first_row) & (index == 0)",
        "(row < 0) & (index == 0)",
    ),
    _fault(
        "write",
        "fetched rows are not waited for",
        "            copy.wait()\n        self.wait_for_written(slot)",
        "            pass\n        self.wait_for_written(slot)",
    ),
    _fault(
        "write",
        "a page is overwritten on its way",
        "        self.wait_for_written(slot)\n        self.lay_out",
        "        self.lay_out",
    ),
    _fault(
        "products",
        "the second part is lost",
        "_RATIO[self.multiplied_as.name] + low)",
        "_RATIO[self.multiplied_as.name])",
    ),
)
