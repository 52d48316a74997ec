"""The static figures of quantized products: the cases, and what is made of a report."""

from dataclasses import replace

import jax
import pytest

from benchmarks.quantized import (
    NUM_LAYERS,
    Figures,
    has_kernel,
    layers,
    main,
    per_layer,
    stacked_matrix,
    table,
)
from pallasite.models.errors import ConfigError
from pallasite.pallas_kernels.compile import Report
from pallasite.pallas_kernels.compile.traffic import Instruction
from pallasite.pallas_kernels.target import V6E


def test_a_case_is_traced():
    case = layers(V6E, "int4:32", "64x128", 2, "xla")
    assert jax.eval_shape(case.function, *case.arguments).shape == (2, 128)


def test_a_kernel_is_there_for_groups_alone():
    assert has_kernel("int4:32", "4096x4096", 512)
    assert has_kernel("w8a8:128", "4096x14336", 256)
    assert not has_kernel("w8a8:128", "4096x14336", 257)
    assert not has_kernel("int8", "4096x4096", 8)
    assert not has_kernel("fp8", "4096x4096", 8)


@pytest.mark.parametrize(
    ("form", "num_bytes"),
    [
        ("int8", 64 * 128 + 64 * 4),
        ("w8a8:32", 64 * 128 + 64 * 4 * 4),
        ("int4:32", 64 * 64 + 2 * 64 * 4 * 4),
    ],
)
def test_bytes_as_stored(form, num_bytes):
    leaves = jax.tree.leaves(stacked_matrix(form, 64, 128))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == NUM_LAYERS * num_bytes


def test_figures_are_a_layers():
    def run(times, read, written, bundles):
        return Instruction(
            name="",
            opcode="fusion",
            times=times,
            bytes_read=read,
            bytes_written=written,
            bundles=bundles,
        )

    instructions = (
        run(1, 10**9, 10**9, 10**9),
        run(NUM_LAYERS, 100, 10, 7),
        run(4 * NUM_LAYERS, 1, 0, 2),
    )
    told = Report(
        function="",
        target="tpu:v6e",
        mode="analyze",
        compile_s=1,
        memory=None,
        copies=(),
        kernels=(),
        instructions=instructions,
    )
    assert per_layer(told) == (114, 15, False)
    unknown = replace(told, instructions=(*instructions, run(NUM_LAYERS, None, None, None)))
    assert per_layer(unknown) == (114, 15, True)


def test_the_clock_below_which_memory_decides():
    figures = Figures(
        form="int8",
        shape="64x128",
        num_tokens=2,
        body="xla",
        stored_bytes=1640,
        moved_bytes=3000,
        temporary_bytes=0,
        bundles=1.5,
        is_lower_bound=False,
        compile_s=1,
    )
    # v6e reads 1640 bytes in a nanosecond.
    assert figures.break_even_hz(V6E) == pytest.approx(1.5e9)
    assert table(V6E, [figures]).splitlines()[-1].split()[-1] == "1.50"
    bound = table(V6E, [replace(figures, is_lower_bound=True)])
    assert bound.splitlines()[-1].split()[-2:] == [">=", "1.50"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "nope"], "got the target 'nope'; known are"),
        (["--target", "gpu:h100"], "got --target gpu:h100; the figures are of TPUs"),
        (["--target", "v6e", "--forms", "int9"], "got the weight form 'int9'"),
        (["--target", "v6e", "--shapes", "4096"], "got --shapes '4096'; it must be rows x inputs"),
        (["--target", "v6e", "--shapes", "4096x"], "got '' in --shapes; it must be whole numbers"),
        (["--target", "v6e", "--tokens", "8,-1"], "got '-1' in --tokens; it must be whole numbers"),
        (["--target", "v6e", "--tokens", "0"], "got '0' in --tokens"),
    ],
)
def test_rubbish_gets_a_sentence(flags, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["quantized", *flags])
    with pytest.raises(ConfigError, match=f"^{message}"):
        main()
