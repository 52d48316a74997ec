"""The adapters' arrays on a mesh: what an engine has room for, and how one is filled in."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from pallasite.models.decoder import Decoder
from pallasite.models.lora import Adapters, LowRank, adapter_key
from pallasite.models.sharding import sharding
from pallasite.models.weights import Matrix, declared_weights
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import Target


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Room for `num_slots` adapters of up to `rank` for each matrix of a model's layers."""

    model: Decoder
    target: Target
    num_slots: int
    rank: int

    def matrices(self) -> Iterator[Matrix]:
        """Yields the matrices that an adapter may change: those of the layers."""
        for _, weight in declared_weights(self.model):
            if self.num_slots and isinstance(weight, Matrix) and weight.source.is_stacked:
                yield weight

    def abstract(self, mesh: Mesh) -> Adapters:
        """Returns the arrays' shapes, dtypes and placements."""
        columns = self.num_slots * self.rank
        return {
            adapter_key(matrix.source): LowRank(
                a=self._struct(mesh, matrix, ("layers", "ranks", matrix.axes[-1]), columns),
                b=self._struct(mesh, matrix, ("layers", "ranks", matrix.axes[-2]), columns),
                is_used=jax.ShapeDtypeStruct(
                    (self.num_slots,), jnp.bool_, sharding=sharding(mesh, ("ranks",))
                ),
            )
            for matrix in self.matrices()
        }

    def abstract_one(self, mesh: Mesh) -> Adapters:
        """Returns the same of one adapter alone: the arrays that `set_slot` takes."""
        one = {}
        for matrix in self.matrices():
            one[adapter_key(matrix.source)] = LowRank(
                a=self._struct(mesh, matrix, ("layers", "ranks", matrix.axes[-1]), self.rank),
                b=self._struct(mesh, matrix, ("layers", "ranks", matrix.axes[-2]), self.rank),
                is_used=jax.ShapeDtypeStruct((), jnp.bool_, sharding=sharding(mesh, ())),
            )
        return one

    def allocate(self, mesh: Mesh) -> Adapters:
        """Returns empty slots."""
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
            self.abstract(mesh),
        )

    def _struct(
        self, mesh: Mesh, matrix: Matrix, axes: tuple[str, ...], columns: int
    ) -> jax.ShapeDtypeStruct:
        partition, shape = self.model.partition, matrix.source.shape
        if matrix.source.rows is not None:
            shape = (matrix.source.rows[1] - matrix.source.rows[0], shape[1])
        own = dict(zip(matrix.axes[1:], shape, strict=True))
        sizes = {"layers": self.model.config.num_layers, "ranks": columns}
        held = tuple(
            sizes[axis] if axis in sizes else partition.axis(axis, own[axis]).size for axis in axes
        )
        dtype = storage_dtype(matrix.dtype, self.target)
        return jax.ShapeDtypeStruct(held, dtype, sharding=sharding(mesh, axes))


def set_slot(adapters: Adapters, one: Adapters, slot: Int32[Array, ""]) -> Adapters:
    """Returns the arrays with one adapter in a slot; in place where they are donated."""
    return {key: _set(adapters[key], one[key], slot) for key in adapters}


def _set(held: LowRank, one: LowRank, slot: Int32[Array, ""]) -> LowRank:
    start = slot * one.a.shape[1]
    return LowRank(
        a=jax.lax.dynamic_update_slice_in_dim(held.a, one.a, start, axis=1),
        b=jax.lax.dynamic_update_slice_in_dim(held.b, one.b, start, axis=1),
        is_used=held.is_used.at[slot].set(one.is_used),
    )


@dataclass(frozen=True)
class HostLowRank:
    """One adapter's part for one matrix, laid out for the mesh, its scale in b.

    Attributes:
        a: f32 `[L, r, in]`, r being the room's rank; zeros where the adapter has less.
        b: f32 `[L, r, out]`, transposed.
    """

    a: np.ndarray
    b: np.ndarray


def place_one(host: HostLowRank | None, like: LowRank) -> LowRank:
    """Puts one adapter's part on the mesh, or zeros where it has none; it compiles nothing."""
    return LowRank(
        a=_place(None if host is None else host.a, like.a),
        b=_place(None if host is None else host.b, like.b),
        is_used=jax.device_put(np.bool_(host is not None), like.is_used.sharding),
    )


def _place(values: np.ndarray | None, like: jax.ShapeDtypeStruct) -> jax.Array:
    if values is None:
        values = np.zeros(like.shape, like.dtype)
    elif like.dtype == jnp.uint16:
        values = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return jax.device_put(values.astype(like.dtype), like.sharding)
