"""The OLMo 2 family (OLMo Team 2025): norms after attention and feed-forward, none before.

Queries and keys are normed too, over all heads together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallasite.models.attention import Attention
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder, DecoderLayers
from pallasite.models.feed_forward import GatedFeedForward
from pallasite.models.layers import RmsNorm, Stream
from pallasite.models.place import Place
from pallasite.models.sharding import MODEL_AXIS, sum_over
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache


class RowRmsNorm(RmsNorm):
    """A norm over all heads of a token, of which each device has some.

    Padding adds nothing to the sum of squares. Key heads that several devices hold are counted as
    often in the sum, and so in what it is divided by.
    """

    def __init__(
        self, config: ModelConfig, declare: Declare, name: str, axis: str, num_heads: int
    ) -> None:
        width = num_heads * config.head_width
        super().__init__(config, declare, name, axis, width)
        num_copies = declare.partition.num_copies if axis == "kv_heads" else 1
        self.num_summed = width * num_copies

    def __call__(self, x: Float[Array, "T NH"]) -> Float[Array, "T NH"]:
        squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        mean_square = sum_over(squares, MODEL_AXIS) / self.num_summed
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * self.own_scale()[None]


class RowNormAttention(Attention):
    """Attention whose queries and keys are normed as rows, before they are cut into heads."""

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """See `Attention`."""
        super().declare_inputs(config, declare)
        q_name, k_name = self.prefix + "q_norm.weight", self.prefix + "k_norm.weight"
        self.q_norm = RowRmsNorm(config, declare, q_name, "query_heads", config.num_query_heads)
        self.k_norm = RowRmsNorm(config, declare, k_name, "kv_heads", config.num_kv_heads)

    def project(self, h: Stream, at: Place) -> Float[Array, "T heads H"]:
        """See `Attention`."""
        q, k, v = self.split(at.project(h, self.q, self.k, self.v))
        return self.cut(jnp.concatenate((self.q_norm(q), self.k_norm(k), v), axis=1))


class PostNormLayers(DecoderLayers):
    """Blocks that norm what attention and feed-forward add to the residual stream."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        layer = "model.layers.{layer}."
        self.attention = RowNormAttention(config, declare)
        self.attention_norm = RmsNorm(config, declare, layer + "post_attention_layernorm.weight")
        self.ffn = GatedFeedForward(config, declare)
        self.ffn_norm = RmsNorm(config, declare, layer + "post_feedforward_layernorm.weight")

    def block(
        self, x: Float[Array, "T D"], cache: PagedCache, at: Place
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """See `DecoderLayers`."""
        mixed, cache = self.attention(x, cache, at)
        x = x + self.attention_norm(mixed)
        return x + self.ffn_norm(self.ffn(x, at)), cache


class Olmo2(Decoder):
    """An OLMo 2 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, PostNormLayers(config, declare))
