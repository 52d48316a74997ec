"""Where keys and values lie in a cache's rows, on every target and for every width of heads."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallasite.pallas_kernels.paged_attention.rows import join_rows, split_rows
from pallasite.pallas_kernels.target import CPU, H100, V6E

DTYPES = [np.float32, ml_dtypes.bfloat16, np.uint16, np.int8, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("target", [CPU, H100, V6E], ids=lambda target: target.name)
def test_rows_as_the_cache_says(target, head_width, dtype, rng):
    T, K = 5, 3
    kv = rng.integers(1, 100, (T, K, 2, head_width)).astype(dtype)
    R, W = row = target.cache_row(head_width)
    rows = np.asarray(join_rows(jnp.asarray(kv), row))
    expected = np.zeros((T, K, R, W), dtype)
    if R == 1:
        expected[:, :, 0, :head_width] = kv[:, :, 0]
        expected[:, :, 0, W // 2 : W // 2 + head_width] = kv[:, :, 1]
    else:
        expected[..., :head_width] = kv
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, expected)
    of_tokens = jnp.asarray(np.moveaxis(rows, 0, 2))  # [K, R, S, W]
    for index, ours in enumerate(split_rows(of_tokens, head_width)):
        np.testing.assert_array_equal(np.asarray(ours), np.moveaxis(kv[:, :, index], 0, 1))
