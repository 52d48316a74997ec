"""The CPU's body of paged attention: one custom call that writes and attends, see `cpu/`.

It reads pages where they lie and writes the new rows in place: the cache that it returns is the one
that it was given. What the batch says is checked first: a page that the cache does not have is an
error of the step, which names it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.cpu import ATTEND
from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.paged_attention.rope import Rope

_LANES = 16
_HELD_AS = ("float32", "uint16", "int8")


def takes(cache: PagedCache, config: AttentionConfig) -> bool:
    """Returns whether the body runs on the target and takes a cache of this shape and type."""
    values = cache.values
    return (
        bool(config.target.instructions)
        and values.dtype.name in _HELD_AS
        and values.shape[3] == 2
        and values.shape[4] % _LANES == 0
        and values.shape[5] % _LANES == 0
    )


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """See the op in the package."""
    heads = jnp.concatenate((q, kv_new[:, :, 0], kv_new[:, :, 1]), axis=1)
    return attend(heads, None, cache, layer, ragged, config, sinks)


def turns(rope: Rope) -> bool:
    """Returns whether `attend` turns queries and keys by this much: by whole vectors of pairs."""
    return rope.cosines.shape[1] % _LANES == 0


def attend(
    heads: Float[Array, "T heads H"],
    rope: Rope | None,
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """Attends with a token's queries, keys and values side by side, the first two turned by a rope.

    Args:
        heads: N queries, K keys and K values of each token.
    """
    held = [cache.values] if cache.scales is None else [cache.values, cache.scales]
    arguments = [
        heads.astype(jnp.float32),
        *held,
        layer.astype(jnp.int32),
        ragged.positions,
        ragged.kv_lens,
        ragged.query_starts,
        ragged.page_table,
        ragged.num_requests,
    ]
    has_windows = any(window is not None for window in config.windows)
    if has_windows:
        windows = [0 if window is None else min(window, 2**31 - 1) for window in config.windows]
        arguments.append(jnp.asarray(windows, jnp.int32))
    if rope is not None:
        arguments += [rope.cosines, rope.sines]
    if sinks is not None:
        arguments.append(sinks.astype(jnp.float32))
    num_tokens, num_heads, width = heads.shape
    num_queries = num_heads - 2 * cache.values.shape[2]
    out = jax.ShapeDtypeStruct((num_tokens, num_queries, width), jnp.float32)
    call = jax.ffi.ffi_call(
        ATTEND,
        (out, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held)),
        input_output_aliases={1 + index: 1 + index for index in range(len(held))},
    )
    mixed, *written = call(
        *arguments,
        instructions=config.target.instructions,
        has_rope=rope is not None,
        has_windows=has_windows,
        has_sinks=sinks is not None,
        scale=np.float32(config.scale),
        soft_cap=np.float32(config.soft_cap or 0.0),
    )
    values, scales = written if len(written) == 2 else (written[0], None)
    return mixed, PagedCache(values=values, scales=scales)
