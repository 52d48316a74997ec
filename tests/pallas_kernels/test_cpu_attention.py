"""What the CPU's attention does beside the definition's cases: rows that are no numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.pallas_kernels import cpu
from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    paged_attention,
)
from pallasite.pallas_kernels.target import cpu_target

RUNNING = [name for name in cpu.INSTRUCTIONS if cpu.runs(name)]


@pytest.mark.parametrize("instructions", RUNNING)
@pytest.mark.parametrize("num_keys", [5, 800])
@pytest.mark.parametrize("held_as", [jnp.float32, jnp.uint16], ids=["f32", "bf16"])
def test_a_query_that_is_no_number_has_an_answer_that_is_none(instructions, num_keys, held_as, rng):
    """Also where its keys are cut into parts, as a lone request's are."""
    K, N, H, page = 2, 6, 64, 16
    num_pages = -(-num_keys // page)
    cache = PagedCache(values=jnp.zeros((1, num_pages, K, 2, page, H), held_as))
    batch = Ragged(
        positions=jnp.array([num_keys - 1], jnp.int32),
        kv_lens=jnp.array([num_keys], jnp.int32),
        query_starts=jnp.array([0, 1], jnp.int32),
        page_table=jnp.arange(num_pages, dtype=jnp.int32)[None],
        num_requests=jnp.int32(1),
        num_decode=jnp.int32(1),
    )
    q = rng.standard_normal((1, N, H)).astype(np.float32)
    q[0, 1, 9] = np.nan
    kv = jnp.asarray(rng.standard_normal((1, K, 2, H)).astype(np.float32))
    config = AttentionConfig(scale=0.125, target=cpu_target(instructions))
    out, _ = paged_attention(jnp.asarray(q), kv, cache, jnp.int32(0), batch, config)
    assert np.isnan(out[0, 1]).all()
    assert np.isfinite(np.delete(out[0], 1, axis=0)).all()
    assert np.abs(np.delete(out[0], 1, axis=0)).max() > 0


@pytest.mark.parametrize("instructions", RUNNING)
@pytest.mark.parametrize("num_heads", [2, 6, 8])
@pytest.mark.parametrize("H", [32, 64, 80, 128])
@pytest.mark.parametrize("held_as", [jnp.float32, jnp.uint16], ids=["f32", "bf16"])
def test_a_query_does_not_depend_on_those_beside_it(instructions, num_heads, H, held_as, rng):
    """Of up to 64 keys, which are one block for one query as for many."""
    K, page, num_keys = 2, 16, 64
    cache = PagedCache(values=jnp.zeros((1, 4, K, 2, page, H), held_as))
    q = jnp.asarray(rng.standard_normal((num_keys, num_heads, H)).astype(np.float32))
    kv = jnp.asarray(rng.standard_normal((num_keys, K, 2, H)).astype(np.float32))
    config = AttentionConfig(scale=0.125, target=cpu_target(instructions))

    def attend(cache, begin, end):
        batch = Ragged(
            positions=jnp.arange(begin, end, dtype=jnp.int32),
            kv_lens=jnp.array([end], jnp.int32),
            query_starts=jnp.array([0, end - begin], jnp.int32),
            page_table=jnp.arange(4, dtype=jnp.int32)[None],
            num_requests=jnp.int32(1),
            num_decode=jnp.int32(end - begin == 1),
        )
        return paged_attention(q[begin:end], kv[begin:end], cache, jnp.int32(0), batch, config)

    whole, cache = attend(cache, 0, num_keys)
    assert np.abs(whole).min(axis=(1, 2)).max() > 0
    for begin, end in ((0, 1), (17, 18), (40, 47), (63, 64)):
        part, _ = attend(cache, begin, end)
        np.testing.assert_array_equal(part, whole[begin:end])
