"""Attention over a paged cache: the op that models call, its contract and its choice of body.

The cache of all layers is one array `[L, P, K, 2, page, H]`: layer, page, key head, keys then
values, row within the page, head width; an int8 one has a scale for each row beside it. A page
holds the keys and the values of `page` consecutive
positions of one sequence for every key head, so that it moves as one contiguous piece.

The queries of a step are ragged: the batch's requests follow one another in one flat axis of T
tokens, those with a single query first.
"""

from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention import reference
from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged

__all__ = ["AttentionConfig", "PagedCache", "Ragged", "paged_attention"]


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """Writes the new keys and values into the cache, then attends causally.

    The new rows are rounded to what the cache holds. Where T equals B every request has one query
    and num_decode equals num_requests. Returns f32; tokens beyond the last request's come back
    finite and meaningless. Scores and sums are f32. The returned cache is the given one where the
    caller donates it.
    """
    num_heads, num_kv_heads = q.shape[1], kv_new.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"got {num_heads} query heads over {num_kv_heads} key heads; not a multiple"
        )
    shape = cache.values.shape
    if shape[2:4] + shape[5:] != kv_new.shape[1:]:
        raise ValueError(f"got a cache {shape} for rows {kv_new.shape}; heads must match")
    if config.windows and len(config.windows) != shape[0]:
        raise ValueError(f"got {len(config.windows)} windows for {shape[0]} layers; not one each")
    return reference.paged_attention(q, kv_new, cache, layer, ragged, config)
