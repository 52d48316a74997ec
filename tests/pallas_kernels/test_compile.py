"""Compiling for chips that are not there: what reports say of small kernels."""

import importlib.metadata
import importlib.util
import sys

import pytest

from pallasite.pallas_kernels.compile import (
    CompileError,
    MissingCompilerError,
    Process,
    Report,
    compile_for,
)
from tests.pallas_kernels.compilers import needs_tpu_compiler

CASES = "tests.pallas_kernels.compile_cases"

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the GPU's compiler, of 4.4 GB: pip install 'pallasite[cuda]'",
)


@pytest.fixture(scope="module")
def ragged() -> Report:
    return compile_for(f"{CASES}:ragged", "tpu:v6e", mode="analyze")


@needs_tpu_compiler
def test_a_loop_is_found_by_the_function_that_is_its_body(ragged):
    kernel = ragged.kernel("ragged")
    assert kernel.find("rows").path == "each/rows"
    assert kernel.find("rows").trips == 16
    assert kernel.find("each").trips is None
    assert kernel.find("_exponential").path == "each/rows"
    with pytest.raises(ValueError, match="0 regions"):
        kernel.find("columns")


@needs_tpu_compiler
def test_a_dynamic_loop_without_a_count_is_an_error_that_names_it(ragged):
    with pytest.raises(ValueError, match="the loop 'each'"):
        ragged.kernel("ragged").weighted()
    with pytest.raises(ValueError, match="got trips for columns; the regions are each"):
        ragged.kernel("ragged").weighted({"columns": 2})


@needs_tpu_compiler
def test_work_is_weighted_by_trip_counts(ragged):
    kernel = ragged.kernel("ragged")
    none, five = kernel.weighted({"each": 0}), kernel.weighted({"each": 5})
    assert five.slots["EUP"] - none.slots["EUP"] == 5 * 16 * 2
    each, rows = kernel.find("each"), kernel.find("rows")
    assert five.bundles - none.bundles == 5 * (each.own.bundles + 16 * rows.own.bundles)
    assert five.num_dmas - none.num_dmas == 5
    assert five.dma_bytes == 7 * 128 * 256 * 4


@needs_tpu_compiler
def test_a_report_survives_as_json(ragged):
    assert ragged.versions["libtpu"] == importlib.metadata.version("libtpu")
    assert Report.from_json(ragged.to_json()) == ragged


@needs_tpu_compiler
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "tpu:v7x"])
def test_the_loop_over_a_grid_runs_its_kernel_as_often_as_there_are_steps(target):
    kernel = compile_for(f"{CASES}:matmul", target, mode="analyze").kernel("matmul")
    grid, body = kernel.find("grid"), kernel.find("_matmul_kernel")
    assert grid.trips == 32 + 2
    assert body.share == pytest.approx(32 / 34)
    assert kernel.find("clear").path == f"{body.path}/clear"
    # Two windows of [256, 512] and one of [256, 256], twice each, and the accumulator in f32; some
    # compilers count 76 KiB of their own.
    needed = 2 * (2 * 256 * 512 * 2 + 256 * 256 * 2) + 256 * 256 * 4
    assert needed <= kernel.vmem_bytes <= needed + 76 * 2**10
    # Each step has 256 x 512 x 256 multiplications; clear and store are at 1 of 4 steps each.
    share = {"clear": 1 / 4, "store": 1 / 4}
    assert kernel.weighted(share).slots["MXU"] == pytest.approx(32 * body.own.slots["MXU"])
    assert kernel.weighted(share).bundles < kernel.weighted().bundles


@needs_tpu_compiler
def test_registers_that_do_not_suffice_are_counted_as_spills_and_fills():
    kernel = compile_for(f"{CASES}:crowded", "tpu:v6e", mode="analyze").kernel("crowded")
    own = kernel.find("crowd").own
    # Of 128 vectors that live at once the 64 registers hold half, at most.
    assert own.spills >= 64
    assert own.fills >= own.spills


@needs_tpu_compiler
def test_more_vmem_than_there_is_is_an_error_with_the_compilers_words():
    words = r"(?s)memory space vmem.* exceeded scoped vmem limit by"
    with pytest.raises(CompileError, match=words) as raised:
        compile_for(f"{CASES}:matmul", "tpu:v6e", {"acc_rows": 70_000})
    assert len(str(raised.value)) < 2000


@needs_tpu_compiler
@pytest.mark.parametrize(("is_donated", "num_copies"), [(True, 0), (False, 1)])
def test_a_cache_that_is_not_donated_is_copied_once(is_donated, num_copies):
    report = compile_for(f"{CASES}:update", "tpu:v6e", {"is_donated": is_donated})
    num_bytes = 4096 * 1024 * 4
    assert report.memory.aliased == (num_bytes if is_donated else 0)
    assert report.memory.arguments - num_bytes < 2**20
    assert report.num_copies(num_bytes) == num_copies
    assert report.num_copies(num_bytes + 1) == 0


@needs_tpu_compiler
def test_branches_and_wrapped_loops_have_the_names_of_their_functions():
    report = compile_for(f"{CASES}:branching", "tpu:v6e", mode="analyze")
    # XLA compiles equal kernels once; each call has its regions.
    assert [kernel.name for kernel in report.kernels] == ["branching", "branching"]
    for instruction in ("branching.2", "branching.3"):
        kernel = report.kernel(instruction)
        assert kernel.find("outer").trips == 6
        assert kernel.find("stepped").trips == 4
        large, small = kernel.find("large").own, kernel.find("small").own
        # 16 exponentials, of which the compiler may begin some before the branch.
        assert large.slots["EUP"] >= 8
        assert large.slots["MXU"] == 0
        assert small.slots["MXU"] >= 16
        assert small.slots["EUP"] == 0
        always = kernel.weighted({"large": 1, "small": 0})
        never = kernel.weighted({"large": 0, "small": 0})
        assert always.slots["EUP"] - never.slots["EUP"] == 6 * large.slots["EUP"]
    with pytest.raises(ValueError, match=r"2 kernels; there are branching\.2, branching\.3"):
        report.kernel("branching")


@needs_tpu_compiler
def test_a_mesh_has_a_part_of_each_argument_on_each_device():
    report = compile_for(f"{CASES}:sharded_matmul", "tpu:v6e")
    assert report.memory.arguments == (1024 * 2048 + 2048 * 512) * 2
    assert [kernel.name for kernel in report.kernels] == ["matmul"]


def test_a_case_compiles_for_the_cpu():
    report = compile_for(f"{CASES}:sums", "cpu", {"num_devices": 2})
    assert report.memory.arguments == 1024 * 1024 * 4 // 2


def test_a_report_tells_the_versions_of_the_interpreter_that_compiled(tmp_path):
    own = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    assert compile_for(f"{CASES}:sums", "cpu").versions == own
    info = tmp_path / "jaxlib-98.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxlib\nVersion: 98.7\n")
    other = tmp_path / "python"
    other.write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"\n'
    )
    other.chmod(0o755)
    report = compile_for(f"{CASES}:sums", "cpu", process=Process(python=str(other)))
    assert report.versions == own | {"jaxlib": "98.7"}


def test_what_cannot_be_made_says_why():
    with pytest.raises(CompileError, match=r"compile_cases:nothing: .*no attribute 'nothing'"):
        compile_for(f"{CASES}:nothing", "cpu")
    with pytest.raises(CompileError, match="unexpected keyword argument 'size'"):
        compile_for(f"{CASES}:sums", "cpu", {"size": 3})
    with pytest.raises(ValueError, match="got the target 'tpu:v9'"):
        compile_for(f"{CASES}:sums", "tpu:v9")
    with pytest.raises(ValueError, match="got the mode 'analyze' for cpu; known are"):
        compile_for(f"{CASES}:sums", "cpu", mode="analyze")


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(CompileError, match=r"more than 0\.1 s"):
        compile_for(f"{CASES}:sums", "cpu", process=Process(timeout_s=0.1))


@pytest.mark.parametrize("target", ["gpu:h100", "gpu:b200"])
def test_a_triton_kernel_is_lowered_without_a_gpus_compiler(target):
    report = compile_for(f"{CASES}:product", target, mode="lower")
    assert [kernel.name for kernel in report.kernels] == ["my-product"]
    assert report.memory is None


def test_a_kernel_for_tpus_is_not_lowered_for_a_gpu():
    with pytest.raises(CompileError, match="Unsupported memory space: vmem"):
        compile_for(f"{CASES}:matmul", "gpu:h100", mode="lower")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is installed"
)
def test_a_missing_compiler_is_an_error_that_names_the_extra():
    with pytest.raises(MissingCompilerError, match=r"pip install 'pallasite\[cuda\]'"):
        compile_for(f"{CASES}:product", "gpu:h100")


@needs_gpu_compiler
@pytest.mark.parametrize("target", ["gpu:h100", "gpu:b200"])
def test_a_gpu_kernel_tells_registers_and_shared_memory(target):
    report = compile_for(f"{CASES}:product", target, mode="analyze")
    assert report.memory.outputs == 1024 * 512 * 2
    use = report.kernel("my-product").gpu
    assert use.threads == 4 * 32
    assert 32 <= use.registers <= 128
    assert use.spill_stores == use.spill_loads == 0
    # A block of x and one of y.
    assert use.shared_bytes == pytest.approx(2 * 64 * 128 * 2, rel=0.01)


@needs_gpu_compiler
def test_a_gpu_kernel_that_lacks_registers_tells_its_spills():
    options = {"block": 128, "num_warps": 1}
    use = compile_for(f"{CASES}:product", "gpu:h100", options, "analyze").kernel("my-product").gpu
    assert 0 < use.spill_stores <= use.spill_loads
