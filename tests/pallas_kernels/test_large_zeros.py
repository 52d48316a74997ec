"""Zeros, whatever the memory held before, and in large pages where the system has them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallasite.pallas_kernels.cpu import best_instructions
from pallasite.pallas_kernels.large_zeros import large_zeros
from pallasite.pallas_kernels.target import CPU, cpu_target

TARGETS = [CPU, cpu_target(best_instructions())]


def placed(*names, num_devices=1):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec(*names))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 1 << 20), (0, 4)])
def test_all_are_zero_and_where_they_must_be(shape, dtype, target):
    for _ in range(2):
        x = large_zeros(shape, dtype, placed(), target)
        assert (x.shape, x.dtype) == (shape, dtype)
        assert x.sharding == placed()
        assert not np.asarray(x).any()
        # What comes next may get the same memory.
        ones = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
        assert np.asarray(ones).all()
        del x, ones


@pytest.mark.parametrize("target", TARGETS)
def test_each_device_has_its_part_alone(target):
    sharding = placed(None, "data", num_devices=2)
    x = large_zeros((3, 8), jnp.float32, sharding, target)
    assert x.sharding == sharding
    assert [part.data.shape for part in x.addressable_shards] == [(3, 4)] * 2
    assert not np.asarray(x).any()


def large_page_bytes():
    kilobytes = re.findall(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps").read_text())
    return 1024 * sum(map(int, kilobytes))


def has_large_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not best_instructions(), reason="this installation has no bodies for the CPU")
@pytest.mark.skipif(not has_large_pages(), reason="this system has no large pages to give")
def test_memory_is_in_large_pages():
    before = large_page_bytes()
    x = large_zeros((64 << 20,), jnp.float32, placed(), TARGETS[1])
    x.block_until_ready()
    # A system that is short of them may give fewer.
    assert large_page_bytes() - before > x.nbytes // 2
