"""The TPU's kernels of paged attention as programs: that they compile for every chip, in place.

What they compute is tested with all bodies, in test_paged_attention.py. Compiling needs libtpu, the
extra `tpu`, and no TPU.
"""

from collections import Counter

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallasite.pallas_kernels.compile import compile_for
from pallasite.pallas_kernels.paged_attention import PagedCache, paged_attention, tpu_blocks
from pallasite.pallas_kernels.paged_attention.block_table import ENTRIES, Entry, Shape
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks
from pallasite.pallas_kernels.target import TARGETS, V6E, find_target
from tests.pallas_kernels import attention_programs
from tests.pallas_kernels.attention_cases import BFLOAT16, INT8, Body, Case, Setting
from tests.pallas_kernels.compilers import needs_tpu_compiler

CHIPS = [name for name, target in TARGETS.items() if target.platform == "tpu"]
HELD_AS = ("float32", "bfloat16", "int8", "float8_e4m3fn")
SMALL = {"num_heads": 4, "num_kv_heads": 1, "num_tokens": 256, "num_rows": 16, "num_pages": 4096}


def is_held(chip, held_as):
    """An fp8 cache is refused on chips that do not multiply fp8."""
    return held_as != "float8_e4m3fn" or find_target(chip).multiplies_fp8


def compiled(chip, mode="compile", **options):
    return compile_for(f"{attention_programs.__name__}:step", chip, SMALL | options, mode)


def check_in_place(report, chip, **options):
    """The kernels are there, and the cache is neither copied nor given back elsewhere."""
    names = [kernel.name for kernel in report.kernels]
    assert names == [f"paged_attention_{name}" for name in ("write", "decode", "prefill")]
    cache = attention_programs.cache_bytes(
        attention_programs.step(find_target(chip), **(SMALL | options))
    )
    assert report.memory.aliased == cache
    assert report.memory.temporaries < cache // 16
    assert report.num_copies(cache // 64) == 0


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("chip", "held_as"),
    [(chip, held_as) for chip in CHIPS for held_as in HELD_AS if is_held(chip, held_as)],
)
def test_every_kind_of_cache_compiles_for_every_chip(chip, held_as):
    options = {"held_as": held_as, "variant": "all"}
    check_in_place(compiled(chip, **options), chip, **options)


@needs_tpu_compiler
@pytest.mark.parametrize(
    "heads",
    [
        {"num_heads": 8, "head_width": 256},
        {"num_heads": 9, "num_kv_heads": 3, "head_width": 64},
        {"num_heads": 16, "num_kv_heads": 16, "head_width": 128, "num_pages": 1024},
        {"num_heads": 71, "head_width": 64, "held_as": "int8", "num_pages": 16384},
        {"num_heads": 4, "num_kv_heads": 2, "head_width": 16},
    ],
    ids=str,
)
def test_heads_of_any_number_and_width_compile(heads):
    check_in_place(compiled("tpu:v6e", **heads), "tpu:v6e", **heads)


@needs_tpu_compiler
def test_a_bucket_for_decoding_alone_has_one_kernel():
    report = compiled("tpu:v6e", "lower", num_tokens=16)
    assert [kernel.name for kernel in report.kernels] == ["paged_attention_decode"]


@needs_tpu_compiler
def test_a_loop_over_layers_on_a_mesh_keeps_the_cache_in_place():
    options = SMALL | {"num_heads": 32, "num_kv_heads": 8, "held_as": "int8"}
    report = compile_for(f"{attention_programs.__name__}:layers", "tpu:v6e", options, "compile")
    cache = attention_programs.cache_bytes(attention_programs.step(V6E, **options))
    assert report.memory.aliased == cache // 4
    assert report.memory.temporaries < cache // 256
    assert report.num_copies(cache // 256) == 0


@needs_tpu_compiler
def test_page_tables_that_the_chip_cannot_hold_are_refused_and_smaller_ones_compile():
    case = attention_programs.step(V6E, **SMALL | {"num_rows": 256, "max_len": 131072})
    with pytest.raises(ValueError, match="256 rows of requests with 1024 pages each for tpu:v6e"):
        jax.eval_shape(case.function, *case.arguments)
    compiled("tpu:v6e", num_rows=240, max_len=131072)


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("chip", "shape"),
    dict.fromkeys((entry.chip, entry.shape) for entry in ENTRIES),
    ids=lambda value: value if isinstance(value, str) else value.cache,
)
def test_entries_of_the_table_are_taken_and_compile_for_their_chip(chip, shape):
    target = find_target(chip)
    options = {
        "num_heads": shape.key_heads * shape.group,
        "num_kv_heads": shape.key_heads,
        "head_width": shape.row[1] if shape.row[0] == 2 else shape.row[1] // 2,
        "held_as": shape.cache,
        "num_pages": 1024,
    }
    assert shape.page == target.page_size
    case = attention_programs.step(target, **SMALL | options)
    cache, pages_a_row = case.arguments[2], case.arguments[4]["page_table"].shape[1]
    num_tokens = SMALL["num_tokens"]
    taken = {
        tpu_blocks.decode_blocks(cache, pages_a_row, shape.group, target),
        tpu_blocks.prefill_blocks(cache, pages_a_row, num_tokens, shape.group, target),
    }
    assert {
        entry.blocks for entry in ENTRIES if (entry.chip, entry.shape) == (chip, shape)
    } <= taken
    compiled(chip, **options)


def test_every_chip_that_was_tuned_has_entries():
    assert {entry.chip for entry in ENTRIES} == {"tpu:v5e", "tpu:v6e", "tpu:v7x"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodeBlocks(pages=0, piece_pages=1, heads=1), "pages=0 of DecodeBlocks"),
        (lambda: DecodeBlocks(pages=8, piece_pages=0, heads=1), "piece_pages=0 of DecodeBlocks"),
        (lambda: DecodeBlocks(pages=8, piece_pages=3, heads=1), "piece_pages=3 for pages, 8 in"),
        (lambda: DecodeBlocks(pages=8, piece_pages=16, heads=1), "piece_pages=16 for pages, 8 in"),
        (lambda: DecodeBlocks(pages=8, piece_pages=4, heads=-1), "heads=-1 of DecodeBlocks"),
        (lambda: PrefillBlocks(tokens=0, pages=4, rows=16, heads=1), "tokens=0 of PrefillBlocks"),
        (lambda: PrefillBlocks(tokens=16, pages=0, rows=16, heads=1), "pages=0 of PrefillBlocks"),
        (lambda: PrefillBlocks(tokens=16, pages=4, rows=0, heads=1), "rows=0 of PrefillBlocks"),
        (lambda: PrefillBlocks(tokens=16, pages=4, rows=16, heads=0), "heads=0 of PrefillBlocks"),
    ],
)
def test_block_sizes_that_leave_something_out_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^got {message}.*; it must "):
        make()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (DecodeBlocks(pages=16, piece_pages=4, heads=2), "heads=2 for the key heads, 1 in all"),
        (
            PrefillBlocks(tokens=32, pages=4, rows=48, heads=1),
            "rows=48 for tokens=32 by 4 heads, 128 in all",
        ),
        (
            PrefillBlocks(tokens=32, pages=4, rows=64, heads=3),
            "heads=3 for the key heads, 1 in all",
        ),
    ],
)
def test_an_entry_whose_sizes_do_not_divide_what_it_is_for_is_refused(blocks, message, monkeypatch):
    shape = Shape(cache="bfloat16", page=128, key_heads=1, group=4, row=(2, 128))
    entry = Entry(chip="tpu:v6e", shape=shape, blocks=blocks, made="static", why="a test")
    monkeypatch.setattr(tpu_blocks, "ENTRIES", (entry,))
    case = attention_programs.step(V6E, **SMALL)
    with pytest.raises(ValueError, match=f"^got {message}; it must divide them"):
        jax.eval_shape(case.function, *case.arguments)


def test_a_request_of_few_pages_has_pieces_that_divide_its_block(monkeypatch):
    shape = Shape(cache="bfloat16", page=128, key_heads=1, group=4, row=(2, 128))
    blocks = DecodeBlocks(pages=12, piece_pages=6, heads=1)
    entry = Entry(chip="tpu:v6e", shape=shape, blocks=blocks, made="static", why="a test")
    monkeypatch.setattr(tpu_blocks, "ENTRIES", (entry,))
    cache = PagedCache(values=jax.ShapeDtypeStruct((1, 64, 1, 2, 128, 128), "bfloat16"))
    found = {n: tpu_blocks.decode_blocks(cache, n, 4, V6E) for n in (1, 2, 8, 12, 64)}
    assert {n: (b.pages, b.piece_pages) for n, b in found.items()} == {
        1: (1, 1),
        2: (2, 2),
        8: (8, 4),
        12: (8, 4),
        64: (12, 6),
    }


class Copies:
    """Counts the bytes of copies that are started in a kernel, by their size."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        make = pltpu.make_async_copy

        class Counted:
            def __init__(own, source, target, semaphore):
                own.copy = make(source, target, semaphore)
                own.num_bytes = int(np.prod(target.shape)) * target.dtype.itemsize

            def start(own):
                jax.debug.callback(lambda: self.counts.update([own.num_bytes]))
                own.copy.start()

            def wait(own):
                own.copy.wait()

        monkeypatch.setattr(pltpu, "make_async_copy", Counted)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("held_as", [BFLOAT16, INT8])
def test_a_decode_step_reads_each_cached_page_once_and_writes_a_tile(held_as, window, monkeypatch):
    """What a program's copies move: pages that are seen, once, and the new rows' tiles."""
    copies = Copies(monkeypatch)
    setting = Setting(
        **{"T": 5, "K": 1, "G": 2, "H": 128, "page": 128, "held_as": held_as, "max_len": 1300},
        windows=() if window is None else (window, window),
    )

    def op(q, kv_new, cache, layer, ragged, config, sinks=None):
        return paged_attention(q, kv_new, cache, layer, ragged, config, sinks)

    body = Body(name="counted", op=op, target=V6E, interpret=True, settings=(setting,))
    lens = [1, 128, 129, 700, 1300]
    Case(body, setting, [(1, n) for n in lens], len(lens)).check()
    jax.effects_barrier()
    first_pages = [0 if window is None else max(n - window, 0) // 128 for n in lens]
    num_pages = sum(-(-n // 128) - first for n, first in zip(lens, first_pages, strict=True))
    size = held_as.itemsize
    page_bytes, tile_bytes = 2 * 128 * 128 * size, 2 * (32 // size) * 128 * size
    expected = {page_bytes: num_pages, tile_bytes: len(lens)}
    if held_as == INT8:
        # With a page come its scales, and with a row its page's.
        expected[2 * 128 * 4] = num_pages + len(lens)
    assert copies.counts == expected
