"""Grouped-query attention over the paged cache, as most families have it (Ainslie et al. 2023)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallasite.models.config import ModelConfig
from pallasite.models.layers import Stream
from pallasite.models.place import Place
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache


class Attention(nnx.Module):
    """Projections to queries, keys and values, rope, attention, and the projection back.

    A family that projects otherwise overrides `declare_inputs` or `project`.
    """

    prefix = "model.layers.{layer}.self_attn."

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        L, D = config.num_layers, config.model_width
        self.config = config
        self.declare_inputs(config, declare)
        shape = (L, D, config.num_query_heads * config.head_width)
        self.o = declare.matrix(
            shape, ("layers", "width", "query_heads"), self.prefix + "o_proj.weight"
        )

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """Declares the weights that `project` uses."""
        L, D, H = config.num_layers, config.model_width, config.head_width
        query_in, kv_in = ("layers", "query_heads", "width"), ("layers", "kv_heads", "width")
        NH, KH = config.num_query_heads * H, config.num_kv_heads * H
        self.q = declare.matrix((L, NH, D), query_in, self.prefix + "q_proj.weight")
        self.k = declare.matrix((L, KH, D), kv_in, self.prefix + "k_proj.weight")
        self.v = declare.matrix((L, KH, D), kv_in, self.prefix + "v_proj.weight")

    def project(self, h: Stream, at: Place) -> Float[Array, "T heads H"]:
        """Returns each token's queries, keys and values, before rope."""
        return self.cut(at.project(h, self.q, self.k, self.v))

    def cut(self, x: Float[Array, "T NH"]) -> Float[Array, "T heads H"]:
        """Cuts rows into heads, as many as this device has."""
        return x.reshape(x.shape[0], -1, self.config.head_width)

    def split(self, x: Float[Array, "T out"]) -> list[Float[Array, "T own"]]:
        """Splits what lies side by side into queries, keys and values."""
        num_queries, num_keys = (part.product().num_rows for part in (self.q, self.k))
        return jnp.split(x, (num_queries, num_queries + num_keys), axis=1)

    def __call__(
        self, h: Stream, cache: PagedCache, at: Place, onto: Float[Array, "T D"] | None = None
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """Returns what attention adds to the residual stream, or the sum, and the new cache."""
        with jax.named_scope("attention"):
            mixed, cache = at.attend(self.project(h, at), cache)
            return at.onward().linear(mixed, self.o, onto), cache
