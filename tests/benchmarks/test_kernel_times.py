"""Kernels' times: what a step must move and compute, and that everything that is timed runs."""

import pytest

from benchmarks import kernel_times
from benchmarks.kernel_cases import Shapes
from benchmarks.kernel_times import Ceilings, Load, Times
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.target import CPU, H100

SHAPES = Shapes(num_heads=4, num_kv_heads=2, head_width=16, page=16)
LOADS = (
    Load(name="decode", decode=(40, 17, 1)),
    Load(name="prompt", prefill=((20, 20),)),
    Load(name="both", decode=(33,), prefill=((5, 40),)),
)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(kernel_times, "ROUNDS", 2)
    monkeypatch.setattr(kernel_times, "RUN_S", 0.0)
    monkeypatch.setattr(kernel_times, "CACHES", ("bfloat16", "int8"))


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


def test_attention_is_timed():
    found = list(kernel_times.attention(CPU, SHAPES, LOADS))
    assert [(one.load, one.cache) for one in found] == [
        (load.name, cache) for load in LOADS for cache in ("bfloat16", "int8")
    ]
    for one in found:
        assert 0 < one.least_s <= one.median_s
        assert one.flops > 0
    # 4 heads of 16: 4 operations a number of a score.
    assert found[0].flops == 4 * 4 * 16 * 58


def test_products_are_timed(monkeypatch):
    monkeypatch.setattr(kernel_times, "PRODUCT_SHAPE", "64x128")
    monkeypatch.setattr(kernel_times, "PRODUCT_TOKENS", (2,))
    found = list(kernel_times.quantized_products(CPU))
    assert [one.kernel for one in found] == ["XLA", "Pallasite"] * 3
    table = kernel_times.product_table(found)
    assert [row[:2] for row in table.rows] == [
        (form, "2 tokens") for form in ("int8", "w8a8", "int4:32")
    ]
    xla, op = found[:2]
    assert table.rows[0][2:4] == (xla.median_s * 1e6, op.median_s * 1e6)


def test_the_ceiling_is_what_takes_longest():
    most = Ceilings(bytes_per_s=1e12, flops=1e14)
    times = {"kernel": "toy", "load": "step", "cache": "int8", "median_s": 1e-3, "least_s": 1e-3}
    by_memory = Times(num_bytes=5 * 10**8, flops=10**10, **times)
    by_math = Times(num_bytes=10**8, flops=8 * 10**10, **times)
    shares = [row[-1] for row in kernel_times.attention_table([by_memory, by_math], most).rows]
    assert shares == ["50%", "80%"]
    measured = kernel_times.ceilings(2**16, 32)
    assert measured.bytes_per_s > 0
    assert measured.flops > 0


def test_peers_do_what_the_load_asks_for():
    names = [[name for name, _ in kernel_times._peers(H100, load)] for load in LOADS]
    assert names == [["JAX paged_attention", "XLA"], ["JAX mha", "cuDNN"], ["XLA"]]
    assert kernel_times._peers(CPU, LOADS[0]) == []


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernel_times"])
    with pytest.raises(ConfigError, match="got a CPU; kernels are timed on an accelerator"):
        kernel_times.main()
