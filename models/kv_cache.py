"""The paged cache on its devices. Which page is whose is the engine's matter."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallasite.models.partition import Partition
from pallasite.models.sharding import sharding
from pallasite.pallas_kernels.paged_attention import PagedCache
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import Target

AXES = ("layers", "pages", "kv_heads", "kv", "page", "head")

CacheForm = Literal["f32", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The shape `[L, P, K, 2, page, H]` of the cache of one model, and what it holds.

    Attributes:
        partition: the model's layout; K are the key heads that all devices hold together.
        form: what the values are rounded to; int8 has a scale for each row of H.
        num_pages: P, over all data shards.
    """

    partition: Partition
    target: Target
    form: CacheForm
    num_pages: int

    @property
    def shape(self) -> tuple[int, ...]:
        model = self.partition.config
        page = (2, self.target.page_size, model.head_width)
        return (model.num_layers, self.num_pages, self.partition.num_kv_heads, *page)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and the devices that share it."""
        model = self.partition.config
        num_rows = model.num_layers * self.partition.num_kv_heads * 2 * self.target.page_size
        row_bytes = {
            "f32": 4 * model.head_width,
            "bf16": 2 * model.head_width,
            "int8": model.head_width + 4,
        }
        return num_rows * row_bytes[self.form]

    @property
    def num_bytes(self) -> int:
        """Bytes over all devices."""
        return self.num_pages * self.page_bytes

    def abstract(self, mesh: Mesh) -> PagedCache:
        """Returns the cache's shapes, dtypes and placements, for compiling without memory."""

        def struct(num_dims: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            placement = sharding(mesh, AXES[:num_dims])
            return jax.ShapeDtypeStruct(self.shape[:num_dims], dtype, sharding=placement)

        if self.form == "int8":
            values = struct(6, jnp.dtype(jnp.int8))
            return PagedCache(values=values, scales=struct(5, jnp.dtype(jnp.float32)))
        dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[self.form]
        return PagedCache(values=struct(6, storage_dtype(dtype, self.target)))

    def allocate(self, mesh: Mesh) -> PagedCache:
        """Returns an empty cache, each device holding its part only."""
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
            self.abstract(mesh),
        )
