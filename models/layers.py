"""The pieces that decoder families are made of. Activations are f32; see `linear` for products."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallasite.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig
from pallasite.pallas_kernels.storage import decode


def linear(x: Float[Array, "T in"], weight: jax.Array) -> Float[Array, "T out"]:
    """Multiplies by a held weight `[out, in]`, with x rounded to the weight's type.

    Products are summed in f32, and an f32 weight means f32 products on every platform (a TPU's
    default would round them to bfloat16).
    """
    weight = decode(weight)
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def fine_linear(x: Float[Array, "T in"], weight: jax.Array) -> Float[Array, "T out"]:
    """Multiplies as `linear` does, but keeps 16 bits of x's mantissa beside a bfloat16 weight.

    What rounding takes from x is multiplied too, as T more rows of the same product. That costs
    little where the weight is narrow, or where reading it takes longer than multiplying; see
    docs/quality.md for what it buys.
    """
    if weight.dtype == jnp.float32:
        return linear(x, weight)
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    product = linear(jnp.concatenate((rounded, x - rounded)), weight)
    return product[: x.shape[0]] + product[x.shape[0] :]


def embed(token_ids: Int[Array, "T"], embedding: jax.Array) -> Float[Array, "T D"]:
    """Looks up rows of a held embedding `[V, D]`."""
    return decode(embedding[token_ids]).astype(jnp.float32)


def rms_norm(
    x: Float[Array, "*T D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*T D"]:
    """Root-mean-square norm (Zhang and Sennrich 2019)."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return x * jax.lax.rsqrt(mean_square + epsilon) * scale


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, "L pairs"]:
    """Returns, for each layer, the radians a position that each pair of dimensions turns by."""
    everywhere = _scaled(config, _frequencies(config, config.rope_theta))
    table = np.tile(everywhere, (config.num_layers, 1))
    if config.local_rope_theta is not None:
        is_local = [window is not None for window in config.windows]
        table[np.flatnonzero(is_local)] = _frequencies(config, config.local_rope_theta)
    return table.astype(np.float32)


def rope(
    x: Float[Array, "T N H"],
    positions: Int[Array, "T"],
    frequencies: Float[Array, "pairs"],
    factor: float = 1.0,
) -> Float[Array, "T N H"]:
    """Rotary position embedding (Su et al. 2021), the halves of what is turned being the pairs.

    The first 2 * pairs dimensions of a head are turned, and multiplied by `factor`.
    """
    num_rotated = 2 * frequencies.shape[0]
    turned, rest = x[..., :num_rotated], x[..., num_rotated:]
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = factor * jnp.cos(angles)[:, None, :], factor * jnp.sin(angles)[:, None, :]
    first, second = jnp.split(turned, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def rope_factor(config: ModelConfig) -> float:
    """Returns what sines and cosines are multiplied by."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, LongRope) else 1.0


def _frequencies(config: ModelConfig, theta: float) -> np.ndarray:
    exponents = np.arange(0, config.num_rotated, 2, dtype=np.float64) / config.num_rotated
    return 1.0 / theta**exponents


def _scaled(config: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
    match config.rope_scaling:
        case None:
            return frequencies
        case Llama3Rope() as scaling:
            return _scale_as_llama3(frequencies, scaling)
        case LinearRope(factor=factor):
            return frequencies / factor
        case LongRope() as scaling:
            is_long = config.context_len > scaling.original_context_len
            return frequencies / (scaling.long_factors if is_long else scaling.short_factors)


def _scale_as_llama3(frequencies: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Llama 3.1's rule: stretch long wavelengths, keep short ones, blend between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = (scaling.original_context_len / wavelengths - low) / (high - low)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)
