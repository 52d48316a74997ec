"""The Phi-3 family (Abdin et al. 2024), Phi-3.5 and Phi-4 too: Llama's blocks, stored packed.

Checkpoints hold q, k and v in one tensor, and gate and up in another. They are cut apart when they
are loaded, since devices that share a model each hold a part of every one.
"""

from pallasite.models.attention import Attention
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.feed_forward import GatedFeedForward
from pallasite.models.llama import PreNormLayers
from pallasite.models.weights import Declare, Matrix, Part


class PackedAttention(Attention):
    """Attention whose queries, keys and values are rows of one tensor, in this order."""

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """See `Attention`."""
        L, D, H = config.num_layers, config.model_width, config.head_width
        NH, KH = config.num_query_heads * H, config.num_kv_heads * H

        def rows(start: int, count: int, axis: str) -> Matrix:
            part = Part(start=start, num_rows=NH + 2 * KH)
            name = self.prefix + "qkv_proj.weight"
            return declare.matrix((L, count, D), ("layers", axis, "width"), name, part)

        self.q = rows(0, NH, "query_heads")
        self.k = rows(NH, KH, "kv_heads")
        self.v = rows(NH + KH, KH, "kv_heads")


class PackedFeedForward(GatedFeedForward):
    """A feed-forward whose gate and up are the halves of one tensor."""

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """See `GatedFeedForward`."""
        L, D, F = config.num_layers, config.model_width, config.ffn_width

        def half(start: int) -> Matrix:
            part = Part(start=start, num_rows=2 * F)
            name = self.prefix + "gate_up_proj.weight"
            return declare.matrix((L, F, D), ("layers", "ffn", "width"), name, part)

        self.gate, self.up = half(0), half(F)


class Phi3(Decoder):
    """A Phi-3 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        layers = PreNormLayers(config, declare, PackedAttention, PackedFeedForward)
        super().__init__(config, declare, layers)
