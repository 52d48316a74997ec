"""The settings that the tiny models of families.py share, in Hugging Face's words and in ours."""

from pallasite.models.config import ModelConfig
from tests.family_model import Json

WINDOW = 24

_SIZES = {
    "attention_dropout": 0.0,
    "bos_token_id": 69,
    "eos_token_id": 70,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 72,
}
V4 = {"torch_dtype": "float32", "transformers_version": "4.52.4"}
V5 = {"dtype": "float32", "transformers_version": "5.23.0"}


def our_config(family: str, **fields: object) -> ModelConfig:
    """What _SIZES says, in our words, with other fields beside."""
    sizes = {
        "vocab_size": 72,
        "num_layers": 2,
        "model_width": 64,
        "ffn_width": 96,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_width": 16,
        "context_len": 256,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 69,
        "eos_token_ids": (70,),
    }
    return ModelConfig(family=family, **{**sizes, **fields})


def llama(**fields: object) -> Json:
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return _SIZES | names | {"attention_bias": False, "mlp_bias": False} | fields


def mistral(**fields: object) -> Json:
    return _SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | fields


def qwen2(**fields: object) -> Json:
    return _SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | fields


def qwen3(**fields: object) -> Json:
    names = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return _SIZES | names | {"attention_bias": False} | fields


def gemma3(**fields: object) -> Json:
    sizes = {name: value for name, value in _SIZES.items() if name != "hidden_act"}
    return {
        **sizes,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-6,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        **fields,
    }


def phi3(**fields: object) -> Json:
    names = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    return _SIZES | names | {"embd_pdrop": 0.0, "resid_pdrop": 0.0} | fields


def olmo2(**fields: object) -> Json:
    names = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    return _SIZES | names | {"attention_bias": False} | fields


def kinds(letters: str) -> list[str]:
    """Spells layer_types out: "sf" is a layer with a window and one that sees all."""
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in letters]
