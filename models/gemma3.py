"""The language model of the Gemma 3 family (Gemma Team 2025).

Layers with a window and layers without alternate, as the config says, each kind with a rope of its
own. Norms stand before and after attention and feed-forward, and over each query and key head.
"""

import math

from jaxtyping import Array, Float

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder, DecoderLayers
from pallasite.models.feed_forward import GatedFeedForward
from pallasite.models.layers import Normed, RmsNorm, rms_norm
from pallasite.models.place import Place
from pallasite.models.qwen3 import HeadNormAttention
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache


class OffsetRmsNorm(RmsNorm):
    """A norm whose scale is held less one, so that a scale of one is a weight of zero."""

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, self.factors(), self.epsilon)

    def factors(self) -> Float[Array, "D"]:
        """See `RmsNorm`."""
        return 1.0 + self.own_scale()


class Gemma3Attention(HeadNormAttention):
    """Attention with Gemma's norms over its heads."""

    norm = OffsetRmsNorm


class GeluFeedForward(GatedFeedForward):
    """A feed-forward whose gate goes through GELU, by tanh."""

    activation = "gelu"


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
        mixed, cache = self.attention(Normed(x, self.attention_norm), cache, at)
        x = x + self.after_attention_norm(mixed)
        return x + self.after_ffn_norm(self.ffn(Normed(x, self.ffn_norm), at)), cache


class Gemma3(Decoder):
    """A Gemma 3 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, Gemma3Layers(config, declare), OffsetRmsNorm)
        self.embedding_scale = math.sqrt(config.model_width)
