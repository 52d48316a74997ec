"""Attention over a paged cache: the op that models call, its contract and its choice of body.

A page of the cache holds the keys and the values of `page` consecutive positions of one sequence,
for every key head, head by head, so that it moves as one contiguous piece and each head's part of
it is whole tiles. See `PagedCache`.

The queries of a step are ragged: the batch's requests follow one another in one flat axis of T
tokens, those with a single query first. See `Ragged`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention import cpu, gpu, reference, tpu
from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.paged_attention.rope import Rope, rotate
from pallasite.pallas_kernels.target import Target

__all__ = [
    "AttentionConfig",
    "PagedCache",
    "Ragged",
    "Rope",
    "paged_attention",
    "refused_pages",
    "rotary_attention",
    "rotate",
]

_BODIES = {
    "cpu": reference.paged_attention,
    "gpu": gpu.paged_attention,
    "tpu": tpu.paged_attention,
}
"""The body for each platform. A CPU's own stands in front of the reference, where it is built."""

_HELD_AS = ("float32", "bfloat16", "uint16", "int8", "float8_e4m3fn")


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """Writes the new keys and values into the cache, then attends causally.

    The new rows are rounded to what the cache holds. `sinks` are logits of each head that take
    weight and add no value (Xiao et al. 2023, as learned by gpt-oss): neither scaled nor capped.
    Where T equals B every request has one query and num_decode equals num_requests. Returns f32;
    tokens beyond the last request's may come back as anything, NaN too. Scores and sums are f32.
    The returned cache is the given one where the caller donates it.

    Raises ValueError for shapes and types outside the contract, NotImplementedError for a target
    without a body.
    """
    _check(q, kv_new, cache, ragged, config, sinks)
    body = _BODIES.get(config.target.platform)
    if config.target.platform == "cpu" and cpu.takes(cache, config):
        body = cpu.paged_attention
    if body is None:
        raise NotImplementedError(
            f"got the target {config.target.name} for paged_attention; it has bodies for the"
            f" platforms {', '.join(_BODIES)}"
        )
    return body(q, kv_new, cache, layer, ragged, config, sinks)


def rotary_attention(
    heads: Float[Array, "T heads H"],
    rope: Rope,
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """Turns queries and keys by their positions, and attends as `paged_attention` does.

    Args:
        heads: N queries, K keys and K values of each token, side by side; K is the cache's.
    """
    num_kv_heads = cache.values.shape[2]
    num_queries = heads.shape[1] - 2 * num_kv_heads
    if config.target.platform == "cpu" and cpu.takes(cache, config) and cpu.turns(rope):
        return cpu.attend(heads, rope, cache, layer, ragged, config)
    q, k, v = jnp.split(heads, (num_queries, num_queries + num_kv_heads), axis=1)
    kv_new = jnp.stack((rotate(k, rope), v), axis=2)
    return paged_attention(rotate(q, rope), kv_new, cache, layer, ragged, config)


def refused_pages(cache: PagedCache, target: Target) -> range:
    """Returns the numbers of pages that a cache like this, of one device, must not have.

    The cache has a page at least, and may be abstract. The target's body refuses it with those.
    """
    return gpu.refused_pages(cache.values) if target.platform == "gpu" else range(0)


def _check(
    q: Array,
    kv_new: Array,
    cache: PagedCache,
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Array | None,
) -> None:
    (num_tokens, num_heads, head_width), num_kv_heads = q.shape, kv_new.shape[1]
    for name, array in (("q", q), ("kv_new", kv_new)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"got {name} of {array.dtype}; it must be float32 or bfloat16")
    if kv_new.shape != (num_tokens, num_kv_heads, 2, head_width):
        raise ValueError(
            f"got kv_new {kv_new.shape} beside q {q.shape}; it must be [T, K, 2, H], T and H q's"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"got {num_heads} query heads over {num_kv_heads} key heads; not a multiple"
        )
    values = cache.values
    if values.dtype.name not in _HELD_AS:
        raise ValueError(f"got a cache of {values.dtype}; it must be one of {', '.join(_HELD_AS)}")
    row = config.target.cache_row(head_width)
    if values.ndim != 6 or (values.shape[2], values.shape[3], values.shape[5]) != (
        num_kv_heads,
        *row,
    ):
        raise ValueError(
            f"got a cache {values.shape} for rows {kv_new.shape}; heads must match: on"
            f" {config.target.name} it must be [L, P, {num_kv_heads}, {row[0]}, page, {row[1]}]"
        )
    is_scaled = values.dtype.itemsize == 1
    expected = (*values.shape[:3], 2, values.shape[4]) if is_scaled else None
    got = None if cache.scales is None else cache.scales.shape
    if got != expected:
        raise ValueError(f"got scales {got} for a cache of {values.dtype}; they must be {expected}")
    if config.windows and len(config.windows) != values.shape[0]:
        raise ValueError(
            f"got {len(config.windows)} windows for {values.shape[0]} layers; not one each"
        )
    if num_tokens < ragged.kv_lens.shape[0]:
        raise ValueError(
            f"got {num_tokens} tokens for {ragged.kv_lens.shape[0]} rows of requests; there must"
            " be as many at least"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"got sinks {sinks.shape} for {num_heads} query heads; one each")
