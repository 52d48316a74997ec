"""The Qwen2 family (Yang et al. 2024), Qwen2.5 too: Llama's blocks with biases on q, k and v."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallasite.models.attention import Attention
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.layers import Stream
from pallasite.models.llama import PreNormLayers
from pallasite.models.place import Place
from pallasite.models.weights import Declare


class BiasedAttention(Attention):
    """Attention whose queries, keys and values have biases."""

    def declare_inputs(self, config: ModelConfig, declare: Declare) -> None:
        """See `Attention`."""
        super().declare_inputs(config, declare)
        L, H = config.num_layers, config.head_width
        query_axes, kv_axes = ("layers", "query_heads"), ("layers", "kv_heads")
        NH, KH = config.num_query_heads * H, config.num_kv_heads * H
        self.q_bias = declare.vector((L, NH), query_axes, self.prefix + "q_proj.bias")
        self.k_bias = declare.vector((L, KH), kv_axes, self.prefix + "k_proj.bias")
        self.v_bias = declare.vector((L, KH), kv_axes, self.prefix + "v_proj.bias")

    def project(self, h: Stream, at: Place) -> Float[Array, "T heads H"]:
        """See `Attention`."""
        biases = jnp.concatenate((self.q_bias[...], self.k_bias[...], self.v_bias[...]))
        return self.cut(at.project(h, self.q, self.k, self.v) + biases[None])


class Qwen2(Decoder):
    """A Qwen2 model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        super().__init__(config, declare, PreNormLayers(config, declare, BiasedAttention))
