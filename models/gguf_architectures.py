"""How GGUF files lay out each architecture: their tensors' names, and what is done to tensors.

Names are those of llama.cpp's converter, which also changes some tensors:

- "llama" interleaves rows of q and k within each head: HF's row i of the first half of a head and
  row i of its second half stand side by side, so that rope turns neighbours.
- "gemma3" holds each norm's scale whole, where HF's files hold it less one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LLAMA3_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

# Outside the layers.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PROJECTIONS = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_NORMS_AFTER = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        family: the registry's key.
        layer_names: GGUF's name to Hugging Face's, after `blk.N.` and `model.layers.N.`.
        settings: tensors that are no weights, and say how rope is stretched.
        is_interleaved: whether rows of q and k are.
        has_whole_norms: whether norms' scales are held whole where HF's files hold them less one.
    """

    family: str
    layer_names: Mapping[str, str]
    settings: frozenset[str] = frozenset()
    is_interleaved: bool = False
    has_whole_norms: bool = False


# By `general.architecture`.
ARCHITECTURES = {
    # Mistral's files are of this architecture too.
    "llama": Architecture(
        family="llama",
        layer_names=_PROJECTIONS | _NORMS,
        settings=frozenset({LLAMA3_FACTORS}),
        is_interleaved=True,
    ),
    "qwen2": Architecture(
        family="qwen2",
        layer_names={
            **_PROJECTIONS,
            **_NORMS,
            "attn_q.bias": "self_attn.q_proj.bias",
            "attn_k.bias": "self_attn.k_proj.bias",
            "attn_v.bias": "self_attn.v_proj.bias",
        },
    ),
    "qwen3": Architecture(family="qwen3", layer_names=_PROJECTIONS | _NORMS | _HEAD_NORMS),
    "gemma3": Architecture(
        family="gemma3",
        layer_names={
            **_PROJECTIONS,
            **_HEAD_NORMS,
            **_NORMS_AFTER,
            "attn_norm.weight": "input_layernorm.weight",
            "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        },
        has_whole_norms=True,
    ),
    "phi3": Architecture(
        family="phi3",
        layer_names={
            **_NORMS,
            "attn_qkv.weight": "self_attn.qkv_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "ffn_up.weight": "mlp.gate_up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
        settings=frozenset({SHORT_FACTORS, LONG_FACTORS}),
    ),
    "olmo2": Architecture(family="olmo2", layer_names=_PROJECTIONS | _HEAD_NORMS | _NORMS_AFTER),
}
