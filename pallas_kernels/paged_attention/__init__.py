"""Attention over a paged cache: the op that models call, its contract and its choice of body.

The cache of all layers is one array `[L, P, K, 2, page, H]`: layer, page, key head, keys then
values, row within the page, head width. A page holds the keys and the values of `page` consecutive
positions of one sequence for every key head, so that it moves as one contiguous piece.

The queries of a step are ragged: the batch's requests follow one another in one flat axis of T
tokens, those with a single query first.
"""

import jax
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention import reference
from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, Ragged

__all__ = ["AttentionConfig", "Ragged", "paged_attention"]


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: jax.Array,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], jax.Array]:
    """Writes the new keys and values into the cache, then attends causally.

    `cache` is `[L, P, K, 2, page, H]`, of f32, bfloat16 or the bits of bfloat16 in uint16; the new
    rows are rounded to it. Where T equals B every request has one query and num_decode equals
    num_requests. Returns f32; tokens beyond the last request's come back finite and meaningless.
    Scores and sums are f32. The returned cache is the given one where the caller donates it.
    """
    num_heads, num_kv_heads = q.shape[1], kv_new.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"got {num_heads} query heads over {num_kv_heads} key heads; not a multiple"
        )
    if cache.shape[2:4] + cache.shape[5:] != kv_new.shape[1:]:
        raise ValueError(f"got a cache {cache.shape} for rows {kv_new.shape}; heads must match")
    return reference.paged_attention(q, kv_new, cache, layer, ragged, config)
