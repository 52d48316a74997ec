"""Kernels' static figures: a region is counted as often as it runs, or the count is refused."""

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged_kernel

from benchmarks import kernel_cases, kernel_counts, kernel_tune, kernels
from benchmarks.kernel_cases import Shapes
from benchmarks.kernel_counts import Count
from benchmarks.kernel_figures import UNIT, Compiler, PrefillFigures
from benchmarks.kernel_goals import verdicts
from benchmarks.kernel_page import END, MARK, fill_in, tables
from benchmarks.kernel_work import UnknownRegionsError, find, work
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.compile import Dma, Kernel, Process, Region, Work
from pallasite.pallas_kernels.paged_attention import (
    block_table,
    tpu_decode,
    tpu_heads,
    tpu_pages,
    tpu_parts,
    tpu_prefill,
    tpu_row,
    tpu_write,
)
from pallasite.pallas_kernels.paged_attention.block_table import Entry, Shape
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks
from pallasite.pallas_kernels.target import H100, V6E
from tests.pallas_kernels.compilers import needs_tpu_compiler

OURS = (tpu_decode, tpu_heads, tpu_pages, tpu_parts, tpu_prefill, tpu_row, tpu_write)


def region(path, kind="branch", bundles=1, trips=None, parts=()):
    return Region(
        path=path,
        name=path.rpartition("/")[2].partition("#")[0],
        kind=kind,
        trips=trips,
        share=None,
        own=Work(bundles=bundles, slots={"MXU": bundles}),
        functions={},
        parts=tuple(parts),
    )


def kernel(*parts, dmas=()):
    root = replace(region("", "kernel", 0, parts=parts), own=Work(dmas=dmas))
    return Kernel(name="toy", instruction="toy.1", root=root, capacity={"MXU": 2})


TOY = kernel(
    region("grid", "loop", 10, parts=[
        region("grid/fetch", bundles=100, parts=[region("grid/fetch/page", "loop", 1000, trips=8)]),
        region("grid/fetch#2", bundles=7),
        region("grid/some", bundles=5, parts=[region("grid/some/page", "loop", 3)]),
    ])
)  # fmt: skip


def test_a_region_counts_as_often_as_its_longest_name_says():
    count = Count(times={"grid": 2, "fetch": 0.5, "some": 1, "page": 4, "some/page": 6})
    assert work(TOY, "", count).bundles == 2 * (10 + 0.5 * (100 + 4 * 1000 + 7) + 5 + 6 * 3)
    assert work(TOY, "grid", replace(count, times=dict(count.times) | {"grid": 0})).bundles == (
        10 + 0.5 * (100 + 4 * 1000 + 7) + 5 + 6 * 3
    )


def test_what_the_program_says_needs_no_count_and_what_is_skipped_has_none():
    count = Count(times={"fetch": 1, "some": 0}, scale=1 / 4)
    assert work(TOY, "grid", count).bundles == (10 + 100 + 8 * 1000 + 7) / 4


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ({"fetch": 1}, "grid/some"),
        ({"fetch": 1, "some": 1}, "grid/some/page"),
        ({"fetch": 1, "some": 0, "gone": 1}, "gone"),
        ({"fetch": 1, "some": 0, "some/fetch": 1}, "some/fetch"),
    ],
)
def test_a_kernel_that_has_changed_is_refused(times, named):
    with pytest.raises(UnknownRegionsError, match=named):
        work(TOY, "grid", Count(times=times))


def test_what_a_count_may_lack_need_not_be_there():
    count = Count(times={"fetch": 1, "some": 0, "gone": 1}, may_lack=frozenset({"gone"}))
    assert work(TOY, "grid", count).bundles == 10 + 100 + 8 * 1000 + 7


def test_a_region_of_no_or_two_places_is_refused():
    assert find(TOY.root, "some/page").path == "grid/some/page"
    for name in ("page", "fetch", "gone"):
        with pytest.raises(UnknownRegionsError, match=f"'{name}'"):
            find(TOY.root, name)


def test_a_copy_of_unknown_size_that_is_never_made_is_left_out():
    unknown = replace(
        region("grid/late"), own=Work(dmas=(Dma(kind="hbm_to_vmem", num_bytes=None, count=1),))
    )
    known = Work(dmas=(Dma(kind="hbm_to_vmem", num_bytes=64, count=3),))
    made = kernel(replace(region("grid", "loop", parts=[unknown]), own=known))
    assert work(made, "grid", Count(times={"late": 0})).dma_bytes == 192


def defined(module):
    """Names of all functions of a module, inner ones too."""
    tree = ast.parse(inspect.getsource(module))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("count", "modules"),
    [
        (kernel_counts.decode(2048, 128, 16, 4, 16), OURS),
        (kernel_counts.prefill_block(1, 4), OURS),
        (kernel_counts.prefill_prompt(4096, 128, 128, 4), OURS),
        (kernel_counts.write_page(128, 16), OURS),
        (kernel_counts.ragged_decode(2048, 1024, 2), (ragged_kernel,)),
        (kernel_counts.ragged_prefill_block(1), (ragged_kernel,)),
        (kernel_counts.ragged_prompt(4096, 1024, 32), (ragged_kernel,)),
        (kernel_counts.paged_decode(2048, 2048, 8), (paged_attention_kernel,)),
    ],
    ids=(
        "decode",
        "prefill",
        "prompt",
        "write",
        "ragged decode",
        "ragged prefill",
        "ragged prompt",
        "paged",
    ),
)
def test_every_name_that_is_counted_is_a_function_of_the_kernel(count, modules):
    names = {name for path in count.times for name in path.split("/")} - {"if"}
    assert names <= set().union(*map(defined, modules))


SMALL = Shapes(num_heads=4, num_kv_heads=1, num_requests=8, num_tokens=256, max_len=4096)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("case", "target", "page"),
    [
        (kernel_cases.tpu_decode_case, V6E, 128),
        (kernel_cases.tpu_prefill_case, V6E, 128),
        (kernel_cases.tpu_write_case, V6E, 128),
        (kernel_cases.gpu_decode_case, H100, 32),
        (kernel_cases.gpu_prefill_case, H100, 32),
        (kernel_cases.gpu_write_case, H100, 32),
    ],
)
def test_a_case_gives_its_kernel_what_it_takes(case, target, page, cache):
    shapes = replace(SMALL, page=page, cache=cache)
    made = case(target, dataclasses.asdict(shapes))
    assert jax.tree.leaves(jax.eval_shape(made.function, *made.arguments))


def test_a_prompt_takes_the_blocks_that_its_tiles_see():
    """Tiles of 128 of 512 tokens see 1, 2, 3 and 4 pages; blocks have 2."""
    count = kernel_counts.prefill_prompt(512, 128, 128, 2)
    assert count.scale == 4
    assert count.times["take_block"] == 6 / 4
    # The third tile sees two pages before it; the fourth three, of which a block is whole.
    assert count.times["attend_clear"] == 2 / 6
    assert count.times["wait_for_some"] == 2 / 6
    assert count.times["start_next_pair/fetch_some"] == 1 / 4
    assert count.times["start_next/fetch_some"] == 1 / 2
    assert count.times["fetch_some/fetch_page"] == 1
    assert count.times["clear_page"] == 2 / 4


@pytest.fixture(scope="module")
def small():
    return Compiler(target=V6E, shapes=SMALL, process=Process()).decode()


@needs_tpu_compiler
def test_a_result_names_the_versions_that_each_chips_figures_were_made_with(small):
    assert small.versions["libtpu"] == importlib.metadata.version("libtpu")
    other = replace(small, chip="gpu:h100", versions={"jax": "98.7"})
    args = argparse.Namespace(heads=4, kv_heads=1, head_width=128)
    result = kernels._result([small, small, other], args)
    assert result["versions"] == {
        "pallasite": importlib.metadata.version("pallasite"),
        "tpu:v6e": small.versions,
        "gpu:h100": {"jax": "98.7"},
    }
    assert len(result["figures"]["DecodeFigures"]) == 3
    assert "versions" not in result["figures"]["DecodeFigures"][0]


@needs_tpu_compiler
def test_a_small_decode_is_compiled_and_counted(small):
    assert small.blocks == "pages 16, piece_pages 4, heads 1"
    # A long request shares its start and its write among many blocks; pieces take longer.
    assert 0 < small.bundles < small.request < small.uneven
    assert small.num_dmas >= 16
    cached = UNIT * 2 * 128 * 2
    assert cached < small.dma_bytes < 1.05 * cached
    assert small.clock_hz == pytest.approx(small.bundles / (small.dma_bytes / 1.64e12))
    assert 0 < small.use["MXU"] < 1
    assert small.compile_s > 0


PREFILL = PrefillFigures(
    chip="tpu:v6e",
    kernel="Pallasite",
    cache="int8",
    compile_s=21.25,
    bundles=5000,
    prompt=90000,
    use={"MXU": 0.7, "VALU": 0.6},
    fills=1,
    spills=2,
    vmem_bytes=2**20,
)


@needs_tpu_compiler
def test_goals_are_kept_or_missed(small):
    of_prefill = [verdict[1:] for verdict in verdicts([PREFILL])]
    assert of_prefill == [
        ("prefill, int8: matrix unit in use", ">= 70%", "70.0%", "kept"),
        ("prefill, int8: compile, s", "<= 20", "21.2", "missed"),
    ]
    bundles, *_ = verdicts([replace(small, request=2901.0)])
    assert bundles == (
        "tpu:v6e", "decode, bfloat16: bundles of 2,048 tokens", "<= 2,900", "2,901", "missed"
    )  # fmt: skip
    assert list(verdicts([replace(PREFILL, kernel="JAX ragged_paged_attention")])) == []


@needs_tpu_compiler
def test_tables_go_between_their_marks_alone(tmp_path, small):
    page = tmp_path / "page.md"
    marks = [MARK.format(name) for name in ("decode", "prefill")]
    page.write_text(f"Before\n\n{marks[0]}\nold\n{END}\nbetween\n{marks[1]}\n{END}\nafter\n")
    fill_in(page, tables([small, PREFILL]))
    first = page.read_text()
    lines = first.splitlines()
    assert [line for line in lines if "|" not in line] == [
        "Before", "", marks[0], END, "between", marks[1], END, "after"
    ]  # fmt: skip
    assert "old" not in first
    assert "| tpu:v6e | Pallasite | int8 |" in first
    fill_in(page, tables([small, PREFILL]))
    assert page.read_text() == first
    page.write_text("no marks\n")
    with pytest.raises(ConfigError, match="benchmarks: decode"):
        fill_in(page, tables([small]))


SHAPE = Shape(cache="int8", page=128, key_heads=8, group=4, row=(2, 128))
ENTRY = Entry(
    chip="tpu:v6e",
    shape=SHAPE,
    blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
    made="static",
    why="1,234 bundles",
)


def entries_of(path, monkeypatch):
    """What a table's file says, run as a module of its own."""
    spec = importlib.util.spec_from_file_location("tuned_table", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tuned_table", module)
    spec.loader.exec_module(module)
    return [dataclasses.asdict(entry) for entry in module.ENTRIES]


def test_a_candidate_must_be_clearly_better():
    blocks = DecodeBlocks(pages=16, piece_pages=4, heads=8)
    own, other = (kernel_tune.Tried(blocks=blocks, bundles=n) for n in (1000, 980))
    assert kernel_tune.choose([own, other]) is own
    better = kernel_tune.Tried(blocks=blocks, bundles=960)
    assert kernel_tune.choose([own, other, better]) is better
    assert not kernel_tune.Tried(blocks=blocks, bundles=960, spills=51).is_allowed
    assert not kernel_tune.Tried(blocks=blocks, bundles=None).is_allowed


def test_tuning_replaces_the_entries_of_its_chip_and_shapes_alone(tmp_path, monkeypatch):
    path = tmp_path / "block_table.py"
    path.write_text(kernel_tune.TABLE.read_text())
    others = [
        replace(ENTRY, chip="tpu:v5e"),
        replace(ENTRY, shape=replace(SHAPE, cache="bfloat16")),
        replace(ENTRY, blocks=PrefillBlocks(tokens=128, pages=4, rows=256, heads=4)),
    ]
    monkeypatch.setattr(block_table, "ENTRIES", (*others, ENTRY))
    better = replace(ENTRY, blocks=DecodeBlocks(pages=8, piece_pages=4, heads=8))
    kernel_tune.write([better], path)
    found = entries_of(path, monkeypatch)
    for entry in (*others, better):
        assert dataclasses.asdict(entry) in found
    assert len(found) == 4
    formatter = [sys.executable, "-m", "ruff", "format", "--check", str(path)]
    if importlib.util.find_spec("ruff") is not None:
        assert subprocess.run(formatter, check=False, capture_output=True).returncode == 0
