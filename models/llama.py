"""The Llama family: SmolLM2, Llama 3.x (Touvron et al. 2023, Grattafiori et al. 2024)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Attend, Decoder, DecoderLayers
from pallasite.models.layers import fine_linear, linear, rms_norm, rope, rope_frequencies
from pallasite.models.weights import Declare


class LlamaLayers(DecoderLayers):
    """Pre-norm blocks of grouped-query attention and a gated feed-forward."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        L, D, F = config.num_layers, config.model_width, config.ffn_width
        NH = config.num_query_heads * config.head_width
        KH = config.num_kv_heads * config.head_width
        layer = "model.layers.{layer}."
        norm = ("layers", "width")
        self.config = config
        self.attention_norm = declare.vector((L, D), norm, layer + "input_layernorm.weight")
        self.ffn_norm = declare.vector((L, D), norm, layer + "post_attention_layernorm.weight")

        query_in = ("layers", "query_heads", "width")
        kv_in = ("layers", "kv_heads", "width")
        self.q = declare.matrix((L, NH, D), query_in, layer + "self_attn.q_proj.weight")
        self.k = declare.matrix((L, KH, D), kv_in, layer + "self_attn.k_proj.weight")
        self.v = declare.matrix((L, KH, D), kv_in, layer + "self_attn.v_proj.weight")
        query_out = ("layers", "width", "query_heads")
        self.o = declare.matrix((L, D, NH), query_out, layer + "self_attn.o_proj.weight")

        ffn_in = ("layers", "ffn", "width")
        self.gate = declare.matrix((L, F, D), ffn_in, layer + "mlp.gate_proj.weight")
        self.up = declare.matrix((L, F, D), ffn_in, layer + "mlp.up_proj.weight")
        ffn_out = ("layers", "width", "ffn")
        self.down = declare.matrix((L, D, F), ffn_out, layer + "mlp.down_proj.weight")

    def block(
        self, x: Float[Array, "T D"], positions: Int[Array, "T"], cache: jax.Array, attend: Attend
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        config = self.config
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attention_norm[...], config.norm_epsilon)
            heads = (x.shape[0], -1, config.head_width)
            q = linear(h, self.q[...]).reshape(heads)
            k = fine_linear(h, self.k[...]).reshape(heads)
            v = fine_linear(h, self.v[...]).reshape(heads)
            frequencies = jnp.asarray(rope_frequencies(config)[0])
            q, k = rope(q, positions, frequencies), rope(k, positions, frequencies)
            mixed, cache = attend(q, k, v, cache)
            x = x + linear(mixed.reshape(x.shape[0], -1), self.o[...])
        with jax.named_scope("ffn"):
            h = rms_norm(x, self.ffn_norm[...], config.norm_epsilon)
            gated = jax.nn.silu(linear(h, self.gate[...])) * linear(h, self.up[...])
            return x + linear(gated, self.down[...]), cache


class Llama(Decoder):
    """A Llama model's weights."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        V, D = config.vocab_size, config.model_width
        table = ("vocab", "width")
        self.config = config
        self.embedding = declare.matrix((V, D), table, "model.embed_tokens.weight")
        self.layers = LlamaLayers(config, declare)
        self.final_norm = declare.vector((D,), ("width",), "model.norm.weight")
        self.head = (
            None if config.ties_embedding else declare.matrix((V, D), table, "lm_head.weight")
        )
