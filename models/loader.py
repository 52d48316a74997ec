"""From a checkpoint's tensors to a model's weights on their devices, one tensor at a time.

Every declared weight is checked against the checkpoint before anything is allocated. A stacked
weight is filled in on the device, a layer at a time, so that the host never holds more than a
tensor.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.decoder import Decoder
from pallasite.models.errors import CheckpointError
from pallasite.models.sharding import sharding
from pallasite.models.weights import Weight, named_weights
from pallasite.pallas_kernels.storage import encode

Progress = Callable[[int, int], None]
"""Called with the tensors loaded so far and those there are."""


def load_weights(
    model: Decoder, checkpoint: Checkpoint, mesh: Mesh, progress: Progress = lambda done, of: None
) -> Decoder:
    """Returns the abstract `model` with the checkpoint's weights in it, placed on the mesh.

    Raises CheckpointError naming the first tensor that is missing, surplus, misshapen or damaged.
    """
    weights = [weight for _, weight in named_weights(model)]
    check_tensors(weights, checkpoint)
    total = sum(len(_sources(weight)) for weight in weights)
    done = 0
    arrays = []
    for weight in weights:
        sources = _sources(weight)
        axes = weight.get_metadata("axes")
        if "{layer}" not in weight.get_metadata("source"):
            arrays.append(_put(checkpoint, sources[0], weight, sharding(mesh, axes)))
            progress(done + 1, total)
        else:
            stacked = jnp.zeros(weight.shape, weight.dtype, device=sharding(mesh, axes))
            part = sharding(mesh, axes[1:])
            for index, source in enumerate(sources):
                stacked = _fill(stacked, _put(checkpoint, source, weight, part), np.int32(index))
                # Without waiting, tensors that are read faster than filled in would pile up.
                stacked.block_until_ready()
                progress(done + index + 1, total)
            arrays.append(stacked)
        done += len(sources)
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def check_tensors(weights: list[Weight], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the declared and the stored tensors are not the same."""
    declared: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        shape = weight.shape[1:] if "{layer}" in weight.get_metadata("source") else weight.shape
        declared.update(dict.fromkeys(_sources(weight), tuple(shape)))
    stored = checkpoint.shapes
    for name, shape in declared.items():
        if name not in stored:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}; its config needs one of shape"
                f" {list(shape)}; get a complete checkpoint"
            )
        if tuple(stored[name]) != shape:
            raise CheckpointError(
                f"the tensor {name} has the shape {list(stored[name])}; the checkpoint's config"
                f" needs {list(shape)}; mend the one that is wrong"
            )
    for name in stored:
        if name not in declared:
            raise CheckpointError(
                f"the checkpoint has a tensor {name} that the model has no place for; its config"
                " does not fit its tensors; mend the one that is wrong"
            )


def _sources(weight: Weight) -> list[str]:
    source = weight.get_metadata("source")
    if "{layer}" not in source:
        return [source]
    return [source.format(layer=layer) for layer in range(weight.shape[0])]


def _put(
    checkpoint: Checkpoint, name: str, weight: Weight, placement: jax.sharding.NamedSharding
) -> jax.Array:
    # That values are finite is the reader's to check, piece by piece: a mask of a whole tensor
    # would be half as large again as a 16-bit one.
    value = jax.device_put(checkpoint.read(name), placement)
    return _encode(value, jnp.dtype(weight.dtype))


@partial(jax.jit, static_argnums=1)
def _encode(value: jax.Array, held_as: jnp.dtype) -> jax.Array:
    return encode(value, held_as)


@partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, value: jax.Array, index: Int[Array, ""]) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, value, index, axis=0)
