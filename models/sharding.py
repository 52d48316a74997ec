"""Where arrays live on a mesh: one table from logical axis names to mesh axes.

Weights and caches name their axes when they are declared; nothing else in the project says on
which device anything lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallasite.models.errors import ConfigError

DATA_AXIS, MODEL_AXIS = "data", "model"

RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": MODEL_AXIS,
    "width": None,
    "ffn": MODEL_AXIS,
    "query_heads": MODEL_AXIS,
    "kv_heads": MODEL_AXIS,
    "group": None,
    "tile": None,
    "ranks": None,
    "head": None,
    "kv": None,
    "page": None,
    "pages": DATA_AXIS,
    "slots": DATA_AXIS,
}
"""Logical axis to mesh axis; None keeps the axis whole on every device."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices an engine runs on, and how they share the work.

    Attributes:
        data: shards that each serve requests of their own, with all weights.
        model: devices that share the weights and key heads of each shard.
    """

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        for axis in (DATA_AXIS, MODEL_AXIS):
            if getattr(self, axis) < 1:
                raise ConfigError(
                    f"got a mesh with {axis}={getattr(self, axis)}; each axis has at least 1"
                    " device; raise it"
                )

    @property
    def num_devices(self) -> int:
        return self.data * self.model

    def __str__(self) -> str:
        return f"{DATA_AXIS}={self.data},{MODEL_AXIS}={self.model}"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device]) -> Mesh:
    """Returns a mesh `[data, model]` of the first devices.

    Raises ConfigError, with the meshes that there are devices for, where these are too few.
    """
    count = len(devices)
    if shape.num_devices > count:
        fitting = (
            str(MeshShape(data=count // model, model=model))
            for model in range(1, count + 1)
            if count % model == 0
        )
        raise ConfigError(
            f"got the mesh {shape}, which needs {shape.num_devices} devices; there"
            f" {'is' if count == 1 else 'are'} {count}: allowed are {' or '.join(fitting)}, and"
            " smaller ones; choose one of these"
        )
    chosen = np.array(devices[: shape.num_devices])
    return Mesh(chosen.reshape(shape.data, shape.model), (DATA_AXIS, MODEL_AXIS))


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of an array whose axes have these logical names; None is whole."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Returns the placement of an array whose axes have these logical names; None is whole."""
    return NamedSharding(mesh, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Sums what each device of a mesh axis has of x; within `jax.shard_map` alone."""
    # XLA keeps an all-reduce of a single device.
    return x if jax.lax.axis_size(axis) == 1 else jax.lax.psum(x, axis)
