"""The pieces that decoder families are made of. Activations are f32; see `linear` for products."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallasite.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig
from pallasite.models.sharding import MODEL_AXIS, RULES, sum_over
from pallasite.models.weights import Declare, Matrix
from pallasite.pallas_kernels.paged_attention import Rope
from pallasite.pallas_kernels.quantized_matmul import (
    Fused,
    dequantize,
    fused_matmul,
    fuses,
    quantized_matmul,
    rows_of,
)
from pallasite.pallas_kernels.storage import decode


def linear(x: Float[Array, "T in"], matrix: Matrix) -> Float[Array, "T out"]:
    """Multiplies by a matrix `[out, in]`, with x rounded to what the matrix's products take.

    Products are summed in f32, and an f32 weight means f32 products on every platform (a TPU's
    default would round them to bfloat16). Where devices share the inputs, each has its own part of
    the sums: `total` adds them up.
    """
    return quantized_matmul(x, matrix.product(), matrix.dtype)


def fine_linear(x: Float[Array, "T in"], matrix: Matrix) -> Float[Array, "T out"]:
    """Multiplies as `linear` does, but keeps 16 bits of x's mantissa beside a bfloat16 weight.

    What rounding takes from x is multiplied too, as T more rows of the same product. That costs
    little where the weight is narrow, or where reading it takes longer than multiplying; see
    docs/quality.md for what it buys.
    """
    if matrix.dtype == jnp.float32 or matrix.form.quantizes_inputs:
        return linear(x, matrix)
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    product = linear(jnp.concatenate((rounded, x - rounded)), matrix)
    return product[: x.shape[0]] + product[x.shape[0] :]


def total(product: Float[Array, "T out"], matrix: Matrix) -> Float[Array, "T out"]:
    """Adds up what devices that share a matrix's inputs have of its products."""
    axis = RULES[matrix.axes[-1]]
    return product if axis is None else sum_over(product, axis)


def embed(token_ids: Int[Array, "T"], embedding: Matrix) -> Float[Array, "T D"]:
    """Looks up rows of an embedding `[V, D]`, whichever device has them."""
    table = embedding.product()
    num_rows = table.num_rows
    index = token_ids - jax.lax.axis_index(MODEL_AXIS) * num_rows
    is_here = (index >= 0) & (index < num_rows)
    index = jnp.where(is_here, index, 0)
    rows = rows_of(table, index)
    values = dequantize(rows) if rows.scales is not None else decode(rows.values)
    values = values.astype(jnp.float32)
    return sum_over(jnp.where(is_here[:, None], values, 0.0), MODEL_AXIS)


def unembed(
    hidden: Float[Array, "T D"], head: Matrix, vocab_size: int, count: Int[Array, ""] | None = None
) -> Float[Array, "T V"]:
    """Returns the logits of all tokens, on every device, from an output head `[V, D]`.

    Of `count` tokens where only the first ones are in use; the others' may then be anything.
    """
    product = head.product()
    if head.form.quantizes_inputs and fuses(product):
        logits = fused_matmul(hidden, [product], Fused(count=count))
    else:
        logits = fine_linear(hidden, head)
    if jax.lax.axis_size(MODEL_AXIS) > 1:
        logits = jax.lax.all_gather(logits, MODEL_AXIS, axis=1, tiled=True)
    return logits[:, :vocab_size]


def rms_norm(
    x: Float[Array, "*T D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*T D"]:
    """Root-mean-square norm (Zhang and Sennrich 2019)."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return x * jax.lax.rsqrt(mean_square + epsilon) * scale


class RmsNorm(nnx.Module):
    """A root-mean-square norm over the residual stream, or over what `width` and `axis` say."""

    def __init__(
        self,
        config: ModelConfig,
        declare: Declare,
        name: str,
        axis: str = "width",
        width: int | None = None,
    ) -> None:
        size = config.model_width if width is None else width
        is_stacked = "{layer}" in name
        shape = (config.num_layers, size) if is_stacked else (size,)
        axes = ("layers", axis) if is_stacked else (axis,)
        self.epsilon = config.norm_epsilon
        self.scale = declare.vector(shape, axes, name)
        self.layer: Int[Array, ""] | None = None

    def of_layer(self, index: Int[Array, ""]) -> "RmsNorm":
        """Returns one layer's, of norms that stack layers; its scale stays beside the others'."""
        own = jax.tree.map(lambda part: part, self)
        own.layer = index
        return own

    def own_scale(self) -> Float[Array, "D"]:
        """The scale as it is held, a layer's where there are several."""
        if self.layer is None:
            return self.scale[...]
        return jax.lax.dynamic_index_in_dim(self.scale[...], self.layer, keepdims=False)

    def factors(self) -> Float[Array, "*L D"]:
        """What the normed values are multiplied by: all layers' where a kernel can pick its own."""
        return self.scale[...]

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, self.own_scale(), self.epsilon)


@dataclass(frozen=True)
class Normed:
    """What a norm makes of a stream, not computed yet: a kernel may do so on its way."""

    x: Float[Array, "T D"]
    norm: RmsNorm


Stream = Float[Array, "T D"] | Normed


def values_of(stream: Stream) -> Float[Array, "T D"]:
    """Returns the values of a stream, through its norm if it has one."""
    return stream.norm(stream.x) if isinstance(stream, Normed) else stream


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, "L pairs"]:
    """Returns, for each layer, the radians a position that each pair of dimensions turns by."""
    everywhere = _scaled(config, _frequencies(config, config.rope_theta))
    table = np.tile(everywhere, (config.num_layers, 1))
    if config.local_rope_theta is not None:
        is_local = [window is not None for window in config.windows]
        table[np.flatnonzero(is_local)] = _frequencies(config, config.local_rope_theta)
    return table.astype(np.float32)


def rope(
    positions: Int[Array, "T"], frequencies: Float[np.ndarray, "pairs"], factor: float = 1.0
) -> Rope:
    """Returns by how much tokens at these positions are turned; all is multiplied by `factor`."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return Rope(cosines=factor * jnp.cos(angles), sines=factor * jnp.sin(angles))


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
