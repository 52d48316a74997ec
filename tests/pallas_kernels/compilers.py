"""Which tests need a compiler that not every machine can have."""

import platform

import pytest

needs_tpu_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="libtpu, the TPU's compiler, has no wheel for this machine",
)
"""Where the extra `tpu` can be installed it must be: without it the test fails, and says so."""
