"""The language model of the Gemma 3 family (Gemma Team 2025).

Layers with a window and layers without alternate, as the config says, each kind with a rope of its
own. Norms stand before and after attention and feed-forward, and over each query and key head.
"""

import math

import jax
from jaxtyping import Array, Float

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder, DecoderLayers, Place
from pallasite.models.feed_forward import GatedFeedForward
from pallasite.models.layers import RmsNorm, rms_norm
from pallasite.models.qwen3 import HeadNormAttention
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache


class OffsetRmsNorm(RmsNorm):
    """A norm whose scale is held less one, so that a scale of one is a weight of zero."""

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, 1.0 + self.scale[...], self.epsilon)


class Gemma3Attention(HeadNormAttention):
    """Attention with Gemma's norms over its heads."""

    norm = OffsetRmsNorm


class GeluFeedForward(GatedFeedForward):
    """A feed-forward whose gate goes through GELU, by tanh."""

    def activation(self, x: Float[Array, "T F"]) -> Float[Array, "T F"]:
        """See `GatedFeedForward`."""
        return jax.nn.gelu(x, approximate=True)


class Gemma3Layers(DecoderLayers):
    """Blocks with norms on both sides of attention and of the feed-forward."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        layer = "model.layers.{layer}."

        def norm(name: str) -> OffsetRmsNorm:
            return OffsetRmsNorm(config, declare, f"{layer}{name}.weight")

        self.attention_norm = norm("input_layernorm")
        self.attention = Gemma3Attention(config, declare)
        self.after_attention_norm = norm("post_attention_layernorm")
        self.ffn_norm = norm("pre_feedforward_layernorm")
        self.ffn = GeluFeedForward(config, declare)
        self.after_ffn_norm = norm("post_feedforward_layernorm")

    def block(
        self, x: Float[Array, "T D"], cache: PagedCache, at: Place
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """See `DecoderLayers`."""
        mixed, cache = self.attention(self.attention_norm(x), cache, at)
        x = x + self.after_attention_norm(mixed)
        return x + self.after_ffn_norm(self.ffn(self.ffn_norm(x), at)), cache


class Gemma3(Decoder):
    """A Gemma 3 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, Gemma3Layers(config, declare), OffsetRmsNorm)
        self.embedding_scale = math.sqrt(config.model_width)
