"""Products with the matrices of a model's layers, to be compiled for any target."""

import jax
import jax.numpy as jnp

from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
from pallasite.pallas_kernels.target import Target

NUM_LAYERS = 4
KINDS = {
    "bf16": jnp.bfloat16,
    "int8": jnp.int8,
    "w8a8": jnp.int8,
    "int4": jnp.uint8,
    "fp8": jnp.float8_e4m3fn,
}


def layers(
    target: Target,
    *,
    kind: str = "int4",
    group: int | None = 32,
    num_tokens: int = 16,
    num_inputs: int = 4096,
    num_rows: int = 14336,
    is_stacked: bool = True,
) -> Case:
    """The sum of products of one input with a matrix of each layer, in a loop as a model's.

    The matrices are Llama 3 8B's `up_proj`. They are read where they are stacked, or sliced first.
    """
    num_groups = 1 if group is None else num_inputs // group
    width = num_inputs // 2 if kind == "int4" else num_inputs
    shape = (NUM_LAYERS, num_rows, num_groups)
    weights = {"values": jax.ShapeDtypeStruct((NUM_LAYERS, num_rows, width), KINDS[kind])}
    if kind != "bf16":
        weights["scales"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if kind == "int4":
        weights["minimums"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def function(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        def layer(index: jax.Array, total: jax.Array) -> jax.Array:
            matrix = QuantizedMatrix(
                **weights, quantizes_inputs=kind == "w8a8", layer=index, target=target
            )
            product = quantized_matmul(
                x, matrix if is_stacked else matrix.alone(), jnp.dtype(jnp.bfloat16)
            )
            return total + product

        return jax.lax.fori_loop(
            0, NUM_LAYERS, layer, jnp.zeros((num_tokens, num_rows), jnp.float32)
        )

    x = jax.ShapeDtypeStruct((num_tokens, num_inputs), jnp.float32)
    return Case(function, (x, weights))


def of_all_kinds(target: Target) -> Case:
    """A loop over layers with a product for each of a TPU's kernels and kinds of groups."""
    # No two arrays have one size, so that a copy tells what it is of.
    kinds = (("int4", 32, 8), ("int8", 128, 24), ("w8a8", 128, 48), ("int4", 128, 240))
    shape = {"num_inputs": 2048, "num_rows": 1280}
    parts = [
        layers(target, kind=kind, group=group, num_tokens=num_tokens, **shape)
        for kind, group, num_tokens in kinds
    ]

    def function(*arguments: tuple[jax.Array, dict[str, jax.Array]]) -> list[jax.Array]:
        return [part.function(*own) for part, own in zip(parts, arguments, strict=True)]

    return Case(function, tuple(part.arguments for part in parts))
