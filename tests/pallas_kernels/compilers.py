"""Compilers of accelerators in tests: which not every machine can have, and what needs none."""

import platform

import jax
import pytest

from pallasite.pallas_kernels.compile.gpu import abstract_mesh

needs_tpu_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="libtpu, the TPU's compiler, has no wheel for this machine",
)
"""Where the extra `tpu` can be installed it must be: without it the test fails, and says so."""


def lowered_for_gpu(target, function, *arguments, mesh=None):
    """Returns StableHLO of a jitted function for a GPU that is not there."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(target, mesh)):
        return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
