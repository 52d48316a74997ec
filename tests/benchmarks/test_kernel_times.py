"""Kernels' times: what a step must move and compute, that what is timed runs, and its tables."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel_products, kernel_times, timing
from benchmarks.kernel_cases import Shapes
from benchmarks.kernel_page import check_page, fill_in
from benchmarks.kernel_times import Load, Missing, Speeds, Times
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.target import CPU, H100, V6E
from tests.pallas_kernels.compilers import lowered_for_gpu

SHAPES = Shapes(num_heads=4, num_kv_heads=2, head_width=16, page=16)
LOADS = (
    Load(name="decode", decode=(40, 17, 1)),
    Load(name="prompt", prefill=((20, 20),)),
    Load(name="both", decode=(33,), prefill=((5, 40),)),
)
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(kernel_times, "RUN_S", 0.0)
    monkeypatch.setattr(kernel_times, "CACHES", ("bfloat16", "int8", "float8_e4m3fn"))


def toy(**changes):
    fields = {"kernel": "toy", "load": "step", "cache": "int8", "median_s": 1e-3, "least_s": 1e-3}
    return Times(**{**fields, "num_bytes": 1, "flops": 1, **changes})


def test_what_a_step_needs():
    decode, prompt, both = LOADS
    assert [load.num_tokens for load in LOADS] == [3, 20, 6]
    assert [load.is_prompt for load in LOADS] == [False, True, False]
    assert decode.num_scores() == 58
    assert prompt.num_scores() == 20 * 21 // 2
    assert both.num_scores() == 33 + 36 + 37 + 38 + 39 + 40
    # Rows of 2 heads, keys and values, 16 wide; queries of 4 heads in and out.
    held, given = 2 * 2 * 16, (2 * 2 * 16 + 4 * 16) * 2 + 4 * 16 * 4
    assert decode.num_bytes(SHAPES) == (58 + 3) * held * 2 + 3 * given
    in_8_bits = Shapes(num_heads=4, num_kv_heads=2, head_width=16, page=16, cache="int8")
    assert decode.num_bytes(in_8_bits) == (58 + 3) * (held + 2 * 2 * 4) + 3 * given


def test_attention_is_timed_with_each_cache_that_a_target_has():
    loads = LOADS[0], LOADS[2]
    found = list(kernel_times.attention(CPU, SHAPES, loads))
    assert [(one.load, one.cache) for one in found] == [
        (load.name, cache) for load in loads for cache in ("bfloat16", "int8")
    ]
    assert all(0 < one.least_s <= one.median_s for one in found)
    # 4 heads of 16: 4 operations a number of a score.
    assert found[0].flops == 4 * 4 * 16 * 58


def test_what_fails_has_a_row_that_says_why(monkeypatch):
    def fail(target, shapes, load):
        raise AssertionError("pages do not divide\nand more")

    monkeypatch.setattr(kernel_times, "CACHES", ())
    monkeypatch.setattr(kernel_times, "_others", lambda target, load: [("JAX's", fail)])
    found = list(kernel_times.attention(H100, SHAPES, LOADS[:1]))
    assert found == [Missing(kernel="JAX's", load="decode", reason="pages do not divide")]
    (row,) = kernel_times.attention_table(found, Speeds(bytes_per_s=1.0, flops=1.0)).rows
    assert row == ("decode", "JAX's", "bfloat16", None, None, None, "pages do not divide")


def test_the_reference_runs():
    step, carry, constants = kernel_times._reference(H100, SHAPES, LOADS[2])
    out, cache = jax.jit(step)(jnp.int32(0), carry, constants)
    assert out.shape == carry[0].shape
    assert cache.values.shape == carry[1].values.shape


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (kernel_times._op, LOADS[0]),
        (kernel_times._op, LOADS[2]),
        # Each of its 16 splits must have a page.
        (kernel_times._gpu_paged, Load(name="decode", decode=(512, 3))),
        (kernel_times._gpu_mha, Load(name="prompt", prefill=((128, 128),))),
    ],
    ids=["decode", "prefill", "JAX's paged_attention", "JAX's mha"],
)
def test_kernels_of_a_gpu_are_lowered(make, load):
    shapes = Shapes(num_heads=4, num_kv_heads=2, head_width=64, page=32)
    step, *arguments = make(H100, shapes, load)
    leaves, structure = jax.tree.flatten(arguments)

    def function(*leaves):
        return step(jnp.int32(0), *jax.tree.unflatten(structure, leaves))

    assert "__gpu$xla.gpu.triton" in lowered_for_gpu(H100, jax.jit(function), *leaves)


def test_products_are_timed(monkeypatch):
    monkeypatch.setattr(kernel_products, "SHAPE", "64x128")
    monkeypatch.setattr(kernel_products, "TOKENS", (2,))
    found = list(kernel_products.quantized_products(CPU))
    assert [one.kernel for one in found] == ["XLA", "Pallasite"] * 3
    table = kernel_products.product_table(found)
    assert [row[:2] for row in table.rows] == [
        (form, "2 tokens") for form in ("int8", "w8a8", "int4:32")
    ]
    xla, op = found[:2]
    assert table.rows[0][2:4] == (xla.median_s * 1e6, op.median_s * 1e6)


def test_shares_are_of_what_takes_longest():
    reached = Speeds(bytes_per_s=1e12, flops=1e14)
    found = [toy(num_bytes=5 * 10**8, flops=10**10), toy(num_bytes=10**8, flops=8 * 10**10)]
    shares = [row[-1] for row in kernel_times.attention_table(found, reached).rows]
    assert shares == ["50%", "80%"]


def test_speeds_are_what_was_moved_and_computed_in_the_time(monkeypatch):
    monkeypatch.setattr(kernel_times, "seconds", lambda *_: [3.0, 2.0, 8.0])
    speeds = kernel_times.measured_speeds(3000, 10)
    assert speeds == Speeds(bytes_per_s=2 * 3000 / 3.0, flops=2 * 10**3 / 3.0)


def test_others_do_what_the_load_asks_for():
    names = [[name for name, _ in kernel_times._others(H100, load)] for load in LOADS]
    assert names == [["JAX paged_attention", "reference"], ["JAX mha", "cuDNN"], ["reference"]]
    assert kernel_times._others(V6E, LOADS[0]) == []


def test_the_page_has_a_place_for_each_table(tmp_path):
    page = tmp_path / "kernels.md"
    shutil.copy(PAGE, page)
    reached = Speeds(bytes_per_s=3e12, flops=5e14)
    tables = [
        kernel_times.device_table("a device", H100, reached),
        kernel_times.attention_table([toy()], reached),
        kernel_products.product_table([toy(), toy()]),
    ]
    fill_in(page, tables)
    for table in tables:
        assert table.markdown() in page.read_text()
    assert "| a device | " in page.read_text()
    with pytest.raises(ConfigError, match=r"got kernels\.md, which has no line"):
        check_page(page, ["device", "another"])


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernel_times"])
    with pytest.raises(ConfigError, match="got a CPU; kernels are timed on an accelerator"):
        kernel_times.main()
