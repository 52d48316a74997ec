"""The paged cache as a device array. Which page is whose is the engine's matter."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallasite.models.config import ModelConfig
from pallasite.models.sharding import sharding
from pallasite.pallas_kernels.storage import storage_dtype
from pallasite.pallas_kernels.target import Target

AXES = ("layers", "pages", "kv_heads", "kv", "page", "head")


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The shape `[L, P, K, 2, page, H]` of the cache of one model, and what it holds.

    Attributes:
        dtype: what the values are rounded to, f32 or bfloat16.
    """

    model: ModelConfig
    target: Target
    dtype: jnp.dtype
    num_pages: int

    @property
    def shape(self) -> tuple[int, ...]:
        model = self.model
        page = (2, self.target.page_size, model.head_width)
        return (model.num_layers, self.num_pages, model.num_kv_heads, *page)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        per_layer = self.model.num_kv_heads * 2 * self.target.page_size * self.model.head_width
        return self.model.num_layers * per_layer * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def abstract(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """Returns the cache's shape, dtype and placement, for compiling without memory."""
        held_as = storage_dtype(self.dtype, self.target)
        return jax.ShapeDtypeStruct(self.shape, held_as, sharding=sharding(mesh, AXES))

    def allocate(self, mesh: Mesh) -> jax.Array:
        """Returns an empty cache, each device holding its part only."""
        spec = self.abstract(mesh)
        return jnp.zeros(spec.shape, spec.dtype, device=spec.sharding)
