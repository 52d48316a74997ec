"""The Llama family: SmolLM2, Llama 3.x (Touvron et al. 2023, Grattafiori et al. 2024)."""

from jaxtyping import Array, Float

from pallasite.models.attention import Attention
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder, DecoderLayers
from pallasite.models.feed_forward import GatedFeedForward
from pallasite.models.layers import Normed, RmsNorm
from pallasite.models.place import Place
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.paged_attention import PagedCache


class PreNormLayers(DecoderLayers):
    """Blocks whose attention and feed-forward take what a norm makes of the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        declare: Declare,
        attention: type[Attention] = Attention,
        ffn: type[GatedFeedForward] = GatedFeedForward,
    ) -> None:
        layer = "model.layers.{layer}."
        self.attention_norm = RmsNorm(config, declare, layer + "input_layernorm.weight")
        self.attention = attention(config, declare)
        self.ffn_norm = RmsNorm(config, declare, layer + "post_attention_layernorm.weight")
        self.ffn = ffn(config, declare)

    def block(
        self, x: Float[Array, "T D"], cache: PagedCache, at: Place
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """See `DecoderLayers`."""
        x, cache = self.attention(Normed(x, self.attention_norm), cache, at, onto=x)
        return self.ffn(Normed(x, self.ffn_norm), at, onto=x), cache


class Llama(Decoder):
    """A Llama model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, PreNormLayers(config, declare))
