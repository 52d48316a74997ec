"""Where arrays live on a mesh: one table from logical axis names to mesh axes.

Weights and caches name their axes when they are declared; nothing else in the project says on
which device anything lies.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "model")

RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "model",
    "width": None,
    "ffn": "model",
    "query_heads": "model",
    "kv_heads": "model",
    "head": None,
    "kv": None,
    "page": None,
    "pages": None,
}
"""Logical axis to mesh axis; None keeps the axis whole on every device."""


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """Returns a mesh `[data=1, model=len(devices)]` of the devices."""
    return Mesh(np.array(devices).reshape(1, len(devices)), MESH_AXES)


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Returns the placement of an array whose axes have these logical names; None is whole."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] if axis else None for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
