"""From a checkpoint's tensors to a model's weights on their devices, one tensor at a time.

Every declared weight is checked against the checkpoint before anything is allocated. A stacked
weight is filled in on the devices, a layer at a time, and each device gets its own part alone, so
that the host never holds more than a tensor. Where the only device is the host's own CPU, the host
fills the memory that the device then has.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.checkpoint_bytes import BFLOAT16
from pallasite.models.decoder import Decoder
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.host_layout import Piece, lay_out
from pallasite.models.sharding import sharding, spec
from pallasite.models.weights import Declared, Matrix, Source, Weight, declared_weights, source_of
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
        arrays = {name: filling(weight, mesh) for name, weight in weights.items()}
        for layer, tensor_name in enumerate(_names(weights, num_layers)):
            tensor = checkpoint.read(tensor_name, _form(weights))
            for name, weight in weights.items():
                for piece in lay_out(tensor, weight, model.partition):
                    arrays[name].fill(piece, layer)
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


def _form(weights: dict[str, Declared]) -> Form | None:
    """The one form that the weights of one source are held in, None where there are several."""
    forms = {weight.form if isinstance(weight, Matrix) else None for weight in weights.values()}
    return forms.pop() if len(forms) == 1 else None


def filling(weight: Declared, mesh: Mesh) -> "HostFilling | DeviceFilling":
    """Returns what fills the arrays of a weight on a mesh."""
    is_host = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return HostFilling(weight, mesh) if is_host else DeviceFilling(weight, mesh)


class HostFilling:
    """The arrays of one declared weight on the host's CPU, while its layers' pieces come in."""

    def __init__(self, weight: Declared, mesh: Mesh) -> None:
        self._is_stacked = source_of(weight).is_stacked
        self._parts = dict(_parts(weight))
        self._mesh = mesh
        self._arrays = {
            name: _device_memory(part.shape, np.dtype(part.dtype))
            for name, part in self._parts.items()
        }

    def fill(self, piece: Piece, layer: int) -> None:
        """Takes some rows of a layer, or of a weight that stacks none."""
        for name, held in self._arrays.items():
            own = held[layer] if self._is_stacked else held
            values = piece.arrays[name]
            _put(values, own[piece.first_row : piece.first_row + len(values)])

    def arrays(self) -> list[jax.Array]:
        """Returns the arrays in the order of the weight's leaves; JAX takes their memory over."""
        held, self._arrays = self._arrays, {}
        return [
            jax.device_put(held[name], sharding(self._mesh, part.get_metadata("axes")))
            for name, part in self._parts.items()
        ]


class DeviceFilling:
    """The arrays of one declared weight, while its layers and their pieces come in."""

    def __init__(self, weight: Declared, mesh: Mesh) -> None:
        self._is_stacked = source_of(weight).is_stacked
        self._parts = dict(_parts(weight))
        self._mesh = mesh
        self._arrays: dict[str, jax.Array] = {}

    def fill(self, piece: Piece, layer: int) -> None:
        """Takes some rows of a layer, or of a weight that stacks none."""
        for name, part in self._parts.items():
            axes = part.get_metadata("axes")
            own_axes = axes[1:] if self._is_stacked else axes
            # That values are finite is the reader's to check, piece by piece: a mask of a whole
            # tensor would be half as large again as a 16-bit one.
            values = jax.device_put(piece.arrays[name], sharding(self._mesh, own_axes))
            values = _encode(values, jnp.dtype(part.dtype))
            if values.shape == part.shape:
                self._arrays[name] = values
                continue
            if name not in self._arrays:
                placement = sharding(self._mesh, axes)
                self._arrays[name] = jnp.zeros(part.shape, part.dtype, device=placement)
            at = (*((layer,) if self._is_stacked else ()), piece.first_row)
            fill = _filler(self._mesh, spec(axes), spec(own_axes))
            self._arrays[name] = fill(self._arrays[name], values, np.array(at, np.int32))
            # Without waiting, pieces read faster than filled in would pile up.
            self._arrays[name].block_until_ready()

    def arrays(self) -> list[jax.Array]:
        """Returns the arrays in the order of the weight's leaves."""
        return [self._arrays[name] for name in self._parts]


def _parts(weight: Declared) -> Iterable[tuple[str, Weight]]:
    """Yields a weight's arrays by the names that `lay_out` gives them, in the leaves' order."""
    if isinstance(weight, Weight):
        yield "values", weight
        return
    assert isinstance(weight, nnx.Module)
    leaves = jax.tree_util.tree_flatten_with_path(weight, is_leaf=lambda x: isinstance(x, Weight))
    for path, part in leaves[0]:
        yield str(getattr(path[-1], "name", path[-1])), part


def _device_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns zeros in pages of their own, which JAX takes over as they are, without a copy.

    The pages are large ones where Linux has them: weights are read from end to end each step, and
    looking up small pages takes a tenth of the time of a step of one row.
    """
    num_values = math.prod(shape)
    size = max(1, num_values * dtype.itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, num_values).reshape(shape)


def _put(values: np.ndarray, held: np.ndarray) -> None:
    """Writes values into held memory as `encode` rounds them, without a copy of them all."""
    is_encoded = held.dtype == np.uint16 and values.dtype != np.uint16
    np.copyto(held.view(BFLOAT16) if is_encoded else held, values, casting="same_kind")


@partial(jax.jit, static_argnums=1)
def _encode(value: jax.Array, held_as: jnp.dtype) -> jax.Array:
    return encode(value, held_as) if value.dtype != held_as else value


@cache
def _filler(
    mesh: Mesh, held: PartitionSpec, piece: PartitionSpec
) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """Returns what puts rows into an array, into each device's part of it alike."""

    def fill(part: jax.Array, rows: jax.Array, at: Int[Array, "axes"]) -> jax.Array:
        rows = rows.reshape((1,) * (part.ndim - rows.ndim) + rows.shape)
        starts = (*at, *([0] * (part.ndim - len(at))))
        return jax.lax.dynamic_update_slice(part, rows, starts)

    filled = jax.shard_map(
        fill, mesh=mesh, in_specs=(held, piece, PartitionSpec()), out_specs=held, check_vma=False
    )
    return jax.jit(filled, donate_argnums=0)
