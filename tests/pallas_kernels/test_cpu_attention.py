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
