"""Compiling for chips that are not there: what reports say of small kernels."""

import importlib.util

import pytest

from pallasite.pallas_kernels.compile import Report, compile_for

CASES = "tests.pallas_kernels.compile_cases"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler, libtpu"
)


@pytest.fixture(scope="module")
def ragged() -> Report:
    return compile_for(f"{CASES}:ragged", "tpu:v6e", mode="analyze")


def test_a_loop_is_found_by_the_function_that_is_its_body(ragged):
    kernel = ragged.kernel("ragged")
    assert kernel.find("rows").path == "each/rows"
    assert kernel.find("rows").trips == 16
    assert kernel.find("each").trips is None
    assert kernel.find("_exponential").path == "each/rows"
    with pytest.raises(ValueError, match="0 regions"):
        kernel.find("columns")


def test_a_dynamic_loop_without_a_count_is_an_error_that_names_it(ragged):
    with pytest.raises(ValueError, match="the loop 'each'"):
        ragged.kernel("ragged").weighted()
    with pytest.raises(ValueError, match="got trips for columns; the regions are each"):
        ragged.kernel("ragged").weighted({"columns": 2})


def test_work_is_weighted_by_trip_counts(ragged):
    kernel = ragged.kernel("ragged")
    none, five = kernel.weighted({"each": 0}), kernel.weighted({"each": 5})
    assert five.slots["EUP"] - none.slots["EUP"] == 5 * 16 * 2
    each, rows = kernel.find("each"), kernel.find("rows")
    assert five.bundles - none.bundles == 5 * (each.own.bundles + 16 * rows.own.bundles)
    assert five.num_dmas - none.num_dmas == 5
    assert five.dma_bytes == 7 * 128 * 256 * 4


def test_a_report_survives_as_json(ragged):
    assert Report.from_json(ragged.to_json()) == ragged


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
