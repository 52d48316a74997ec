"""Grouped-query attention over the paged cache, as most families have it (Ainslie et al. 2023)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Place
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache

Heads = tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]


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

    def project(self, h: Float[Array, "T D"], at: Place) -> Heads:
        """Returns queries, keys and values, before rope."""
        return (
            self.heads(at.linear(h, self.q)),
            self.heads(at.fine_linear(h, self.k)),
            self.heads(at.fine_linear(h, self.v)),
        )

    def heads(self, x: Float[Array, "T NH"]) -> Float[Array, "T N H"]:
        """Cuts rows into heads, as many as this device has."""
        return x.reshape(x.shape[0], -1, self.config.head_width)

    def __call__(
        self, h: Float[Array, "T D"], cache: PagedCache, at: Place
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """Returns what attention adds to the residual stream, and the updated cache."""
        with jax.named_scope("attention"):
            q, k, v = self.project(h, at)
            mixed, cache = at.attend(at.rotate(q), at.rotate(k), v, cache)
            return at.linear(mixed, self.o), cache
