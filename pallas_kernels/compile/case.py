"""What to compile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh


@dataclass(frozen=True)
class Case:
    """A function and the shapes of its arguments.

    Attributes:
        function: takes `arguments`; may be jitted already.
        arguments: trees of `jax.ShapeDtypeStruct`, one for each positional argument. On a mesh
            their shardings are of `mesh`; those without one are whole on each device.
        donated: the positions of arguments whose memory outputs may take.
        mesh: axes and sizes of the devices; None for one device. While the function is traced it
            is the mesh of the context, which a `shard_map` in it takes where it names none.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    mesh: AbstractMesh | None = None
