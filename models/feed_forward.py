"""The gated feed-forward that most families have (Shazeer 2020)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallasite.models.config import ModelConfig
from pallasite.models.layers import Stream
from pallasite.models.place import Place
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.quantized_matmul import Gate


class GatedFeedForward(nnx.Module):
    """down(activation(gate(h)) * up(h)).

    A family that packs gate and up overrides `declare_inputs`.
    """

    prefix = "model.layers.{layer}.mlp."
    activation: Gate = "silu"

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        L, D, F = config.num_layers, config.model_width, config.ffn_width
        self.declare_inputs(config, declare)
        ffn_out = ("layers", "width", "ffn")
        self.down = declare.matrix((L, D, F), ffn_out, self.prefix + "down_proj.weight")

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """Declares gate and up."""
        shape = (config.num_layers, config.ffn_width, config.model_width)
        ffn_in = ("layers", "ffn", "width")
        self.gate = declare.matrix(shape, ffn_in, self.prefix + "gate_proj.weight")
        self.up = declare.matrix(shape, ffn_in, self.prefix + "up_proj.weight")

    def __call__(
        self, h: Stream, at: Place, onto: Float[Array, "T D"] | None = None
    ) -> Float[Array, "T D"]:
        """Returns what the feed-forward adds to the residual stream, or the sum."""
        at = at.onward()
        with jax.named_scope("ffn"):
            return at.linear(at.gated(h, self.gate, self.up, self.activation), self.down, onto)
