"""The Qwen3 family (Yang et al. 2025): Llama's blocks with a norm over each query and key head."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallasite.models.attention import Attention
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.layers import RmsNorm, Stream
from pallasite.models.llama import PreNormLayers
from pallasite.models.place import Place
from pallasite.models.weights import Declare


class HeadNormAttention(Attention):
    """Attention whose queries and keys are normed head by head, before rope."""

    norm: type[RmsNorm] = RmsNorm

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """See `Attention`."""
        super().declare_inputs(config, declare)
        H = config.head_width
        self.q_norm = self.norm(config, declare, self.prefix + "q_norm.weight", "head", H)
        self.k_norm = self.norm(config, declare, self.prefix + "k_norm.weight", "head", H)

    def project(self, h: Stream, at: Place) -> Float[Array, "T heads H"]:
        """See `Attention`."""
        q, k, v = map(self.cut, self.split(at.project(h, self.q, self.k, self.v)))
        return jnp.concatenate((self.q_norm(q), self.k_norm(k), v), axis=1)


class Qwen3(Decoder):
    """A Qwen3 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, PreNormLayers(config, declare, HeadNormAttention))
