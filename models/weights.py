"""What a weight is: one declaration gives its shape, dtype, logical axes and source.

A model is made of abstract weights, whose values are `jax.ShapeDtypeStruct`s, so that a model of
any size can be planned and compiled without memory; the loader makes the same tree with arrays.
"""

from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pallasite.models.forms import BaseForm
from pallasite.models.sharding import sharding
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import Target

ModelT = TypeVar("ModelT", bound=nnx.Module)


def compute_dtype(form: BaseForm) -> jnp.dtype:
    """Returns what the inputs of matrix products, and the cache, are rounded to."""
    return jnp.dtype({"f32": jnp.float32, "bf16": jnp.bfloat16}[form])


class Weight(nnx.Param):
    """A parameter with the metadata `axes` (logical names), `source` (see `Declare`)."""


class Declare:
    """Declares the weights of one model in one form for one target."""

    def __init__(self, form: BaseForm, target: Target) -> None:
        self._dtype = compute_dtype(form)
        self._stacked_dtype = storage_dtype(self._dtype, target)

    def matrix(self, shape: tuple[int, ...], axes: tuple[str, ...], source: str) -> Weight:
        """Declares a weight of a matrix product, `[..., out, in]`, or an embedding.

        `source` is its Hugging Face name. Where that has `{layer}`, the weight stacks all layers
        along its first axis, which is then the logical axis "layers".
        """
        # Only what is sliced layer by layer has to be held as bits where bfloat16 is.
        dtype = self._stacked_dtype if "{layer}" in source else self._dtype
        return _declare(shape, axes, source, dtype)

    def vector(self, shape: tuple[int, ...], axes: tuple[str, ...], source: str) -> Weight:
        """Declares a norm's scale or a bias: always f32, since it costs nothing."""
        return _declare(shape, axes, source, jnp.dtype(jnp.float32))


def named_weights(model: nnx.Module) -> Iterator[tuple[str, Weight]]:
    """Yields every weight with its dotted path, in the order of `jax.tree.leaves(model)`."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, Weight))
    for path, weight in leaves[0]:
        yield ".".join(str(getattr(key, "name", key)) for key in path), weight


def placed(model: ModelT, mesh: Mesh) -> ModelT:
    """Returns an abstract model with each weight's placement on the mesh filled in."""
    weights = [weight for _, weight in named_weights(model)]
    structs = [
        jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding(mesh, w.get_metadata("axes")))
        for w in weights
    ]
    return jax.tree.unflatten(jax.tree.structure(model), structs)


def num_bytes(model: nnx.Module) -> int:
    """Returns the bytes of all weights, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _declare(
    shape: tuple[int, ...], axes: tuple[str, ...], source: str, dtype: jnp.dtype
) -> Weight:
    if len(shape) != len(axes):
        raise ValueError(f"got {len(axes)} axes for the shape {shape} of {source}")
    return Weight(
        jax.ShapeDtypeStruct(shape, dtype), axes=axes, source=source, eager_sharding=False
    )
