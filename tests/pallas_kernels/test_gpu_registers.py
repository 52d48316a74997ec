"""What the GPU's kernels take of a chip, where their compiler is installed."""

import importlib.util

import pytest

from tests.pallas_kernels import gpu_registers


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the GPU's compiler, of 4.4 GB: make compile-gpu does the same",
)
@pytest.mark.parametrize("chip", gpu_registers.CHIPS)
@pytest.mark.parametrize("programs", [gpu_registers.attention, gpu_registers.products])
def test_kernels_keep_to_their_limits(chip, programs):
    found = [(str(p), p.faults(p.compile())) for p in programs(chip)]
    assert [fault for fault in found if fault[1]] == []
