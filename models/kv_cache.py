"""The paged cache on its devices. Which page is whose is the engine's matter."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallasite.models.partition import Partition
from pallasite.models.sharding import DATA_AXIS, sharding
from pallasite.pallas_kernels.large_zeros import large_zeros
from pallasite.pallas_kernels.paged_attention import PagedCache, refused_pages
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import Target

AXES = ("layers", "pages", "kv_heads", "kv", "page", "head")

CacheForm = Literal["f32", "bf16", "int8", "fp8"]

_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The shape `[L, P, K, R, page, W]` of the cache of one model, and what it holds.

    Attributes:
        partition: the model's layout; K are the key heads that all devices hold together.
        target: says how the rows lie, R and W, and how long a page is.
        form: what the values are rounded to; int8 and fp8 have a scale for each key and value.
        num_pages: P, over all data shards.
    """

    partition: Partition
    target: Target
    form: CacheForm
    num_pages: int

    @property
    def shape(self) -> tuple[int, ...]:
        model = self.partition.config
        num_rows, width = self.target.cache_row(model.head_width)
        page = (num_rows, self.target.page_size, width)
        return (model.num_layers, self.num_pages, self.partition.num_kv_heads, *page)

    @property
    def scales_shape(self) -> tuple[int, ...] | None:
        """`[L, P, K, 2, page]`; None for floats of 16 bits and more."""
        if self.form not in ("int8", "fp8"):
            return None
        return (*self.shape[:3], 2, self.target.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and the devices that share it."""
        one = replace(self, num_pages=1)
        num_scales = 0 if one.scales_shape is None else math.prod(one.scales_shape)
        return math.prod(one.shape) * jnp.dtype(_DTYPES[self.form]).itemsize + 4 * num_scales

    @property
    def num_bytes(self) -> int:
        """Bytes over all devices."""
        return self.num_pages * self.page_bytes

    def refused_pages(self, mesh: Mesh) -> range:
        """Returns the numbers of pages of a data shard that the target's kernels do not take."""
        values = replace(self, num_pages=mesh.shape[DATA_AXIS]).abstract(mesh).values
        one = jax.ShapeDtypeStruct(values.sharding.shard_shape(values.shape), values.dtype)
        return refused_pages(PagedCache(values=one), self.target)

    def abstract(self, mesh: Mesh) -> PagedCache:
        """Returns the cache's shapes, dtypes and placements, for compiling without memory."""

        def struct(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, AXES[: len(shape)]))

        shape, dtype = self.scales_shape, storage_dtype(_DTYPES[self.form], self.target)
        scales = None if shape is None else struct(shape, jnp.dtype(jnp.float32))
        return PagedCache(values=struct(self.shape, dtype), scales=scales)

    def allocate(self, mesh: Mesh) -> PagedCache:
        """Returns an empty cache, each device holding its part only."""
        return jax.tree.map(
            lambda leaf: large_zeros(leaf.shape, leaf.dtype, leaf.sharding, self.target),
            self.abstract(mesh),
        )
