"""From a checkpoint's tensors to a model's weights on their devices, one tensor at a time.

Every declared weight is checked against the checkpoint before anything is allocated. A stacked
weight is filled in on the devices, a layer at a time, and each device gets its own part alone, so
that the host never holds more than a tensor.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.decoder import Decoder
from pallasite.models.errors import CheckpointError
from pallasite.models.host_layout import lay_out
from pallasite.models.sharding import sharding
from pallasite.models.weights import Declared, Source, Weight, declared_weights, source_of
from pallasite.pallas_kernels.storage import encode

Progress = Callable[[int, int], None]
"""Called with the tensors loaded so far and those there are."""


def load_weights(
    model: Decoder, checkpoint: Checkpoint, mesh: Mesh, progress: Progress = lambda done, of: None
) -> Decoder:
    """Returns the abstract `model` with the checkpoint's weights in it, placed on the mesh.

    Raises CheckpointError naming the first tensor that is missing, surplus, misshapen or damaged.
    """
    check_tensors(model, checkpoint)
    num_layers = model.config.num_layers
    by_tensor: dict[str, dict[str, Declared]] = {}
    for name, weight in declared_weights(model):
        by_tensor.setdefault(source_of(weight).name, {})[name] = weight
    total = sum(len(_names(weights, num_layers)) for weights in by_tensor.values())
    done = 0
    loaded: dict[str, list[jax.Array]] = {}
    for weights in by_tensor.values():
        arrays = {name: _Filling(weight, mesh) for name, weight in weights.items()}
        for layer, tensor_name in enumerate(_names(weights, num_layers)):
            tensor = checkpoint.read(tensor_name)
            for name, weight in weights.items():
                arrays[name].fill(lay_out(tensor, weight, model.partition), layer)
            del tensor
            done += 1
            progress(done, total)
        loaded |= {name: filling.arrays() for name, filling in arrays.items()}
    leaves = [array for name, _ in declared_weights(model) for array in loaded[name]]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def check_tensors(model: Decoder, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the declared and the stored tensors are not the same."""
    declared: dict[str, tuple[int, ...]] = {}
    for _, weight in declared_weights(model):
        source = source_of(weight)
        declared.update(dict.fromkeys(source.names(model.config.num_layers), source.shape))
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


def _names(weights: dict[str, Declared], num_layers: int) -> list[str]:
    """The tensors that make up weights of one source."""
    source: Source = source_of(next(iter(weights.values())))
    return source.names(num_layers)


class _Filling:
    """The arrays of one declared weight, while its layers come in."""

    def __init__(self, weight: Declared, mesh: Mesh) -> None:
        self._is_stacked = source_of(weight).is_stacked
        self._parts = dict(_parts(weight))
        self._placements = {
            name: sharding(mesh, self._own_axes(part)) for name, part in self._parts.items()
        }
        self._arrays: dict[str, jax.Array] = {}
        if self._is_stacked:
            self._arrays = {
                name: jnp.zeros(
                    part.shape, part.dtype, device=sharding(mesh, part.get_metadata("axes"))
                )
                for name, part in self._parts.items()
            }

    def fill(self, values: dict[str, np.ndarray], layer: int) -> None:
        """Takes one tensor's arrays by part: a layer's, or the whole weight."""
        for name, part in self._parts.items():
            # That values are finite is the reader's to check, piece by piece: a mask of a whole
            # tensor would be half as large again as a 16-bit one.
            value = jax.device_put(values[name], self._placements[name])
            value = _encode(value, jnp.dtype(part.dtype))
            if self._is_stacked:
                value = _fill(self._arrays[name], value, np.int32(layer))
                # Without waiting, tensors read faster than filled in would pile up.
                value.block_until_ready()
            self._arrays[name] = value

    def arrays(self) -> list[jax.Array]:
        """Returns the arrays in the order of the weight's leaves."""
        return [self._arrays[name] for name in self._parts]

    def _own_axes(self, part: Weight) -> tuple[str, ...]:
        axes = part.get_metadata("axes")
        return axes[1:] if self._is_stacked else axes


def _parts(weight: Declared) -> Iterable[tuple[str, Weight]]:
    """Yields a weight's arrays by the names that `lay_out` gives them, in the leaves' order."""
    if isinstance(weight, Weight):
        yield "values", weight
        return
    assert isinstance(weight, nnx.Module)
    leaves = jax.tree_util.tree_flatten_with_path(weight, is_leaf=lambda x: isinstance(x, Weight))
    for path, part in leaves[0]:
        yield str(getattr(path[-1], "name", path[-1])), part


@partial(jax.jit, static_argnums=1)
def _encode(value: jax.Array, held_as: jnp.dtype) -> jax.Array:
    return encode(value, held_as) if value.dtype != held_as else value


@partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, value: jax.Array, index: Int[Array, ""]) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, value, index, axis=0)
