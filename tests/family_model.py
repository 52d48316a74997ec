"""What a tiny random model of any family is: its settings, its weights and its tokens.

Every part of it does something: attention is peaked, norms' scales differ and biases are not zero,
so that an error anywhere reaches the logits. numpy makes the weights from a seed, the same
whether or not torch is there. The models themselves are in families.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pallasite.models.config import LongRope, ModelConfig
from tests.parity.tiny_models import NUM_TOKENS

Json = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class FamilyModel:
    """A tiny model.

    Attributes:
        hf: config.json's object.
        config: what the readers must make of it.
        seed: of the weights and the tokens.
        has_gguf: whether a file by llama.cpp's converter holds the whole model. It writes no
            windows of Mistral and Qwen, no pattern and no query_pre_attn_scalar of Gemma, and no
            attention factor of its own choice.
    """

    hf: Json
    config: ModelConfig
    seed: int
    has_gguf: bool = True

    @property
    def text(self) -> Json:
        """The language model's settings, which stand apart where there is a vision part too."""
        return self.hf.get("text_config", self.hf)

    @property
    def gguf_config(self) -> ModelConfig:
        """What a GGUF file must be read as: it does not tell Mistral from Llama, in float32."""
        config = self.config
        if config.family == "mistral":
            config = replace(config, family="llama")
        if isinstance(scaling := config.rope_scaling, LongRope):
            factor = float(str(np.float32(scaling.attention_factor)))
            config = replace(config, rope_scaling=replace(scaling, attention_factor=factor))
        return config

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the language model's float32 weights by name, as `models/` knows them."""
        rng = np.random.default_rng(self.seed)
        shapes = tensor_shapes(self.text)
        is_gemma = self.config.family == "gemma3"
        return {name: _lively(name, shape, is_gemma, rng) for name, shape in shapes.items()}

    def token_ids(self) -> np.ndarray:
        """Returns i32 [NUM_TOKENS]."""
        rng = np.random.default_rng([self.seed, 1])
        return rng.integers(0, self.config.vocab_size, NUM_TOKENS).astype(np.int32)


def tensor_shapes(text: Json) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight that transformers saves for these settings."""
    D, F, N = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    K, H = text["num_key_value_heads"], text.get("head_dim", D // N)
    kind = text["model_type"]
    attention = {"q_proj.weight": (N * H, D), "k_proj.weight": (K * H, D)}
    attention |= {"v_proj.weight": (K * H, D), "o_proj.weight": (D, N * H)}
    ffn = {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "qwen2":
        attention |= {"q_proj.bias": (N * H,), "k_proj.bias": (K * H,), "v_proj.bias": (K * H,)}
    elif kind == "phi3":
        attention = {"qkv_proj.weight": ((N + 2 * K) * H, D), "o_proj.weight": (D, N * H)}
        ffn = {"gate_up_proj.weight": (2 * F, D), "down_proj.weight": (D, F)}
    elif kind == "olmo2":
        attention |= {"q_norm.weight": (N * H,), "k_norm.weight": (K * H,)}
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
    elif kind in ("qwen3", "gemma3_text"):
        attention |= {"q_norm.weight": (H,), "k_norm.weight": (H,)}
    if kind == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
    layer |= {f"mlp.{name}": shape for name, shape in ffn.items()}
    layer |= {f"{name}.weight": (D,) for name in norms}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text["vocab_size"], D)}
    for index in range(text["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not text.get("tie_word_embeddings", kind == "gemma3_text"):
        shapes["lm_head.weight"] = (text["vocab_size"], D)
    return shapes


def _lively(
    name: str, shape: tuple[int, ...], is_gemma: bool, rng: np.random.Generator
) -> np.ndarray:
    """Returns weights of about the size that keeps what flows through at about 1.

    Gemma holds a norm's scale less one, and multiplies what it looks up by the root of the width.
    """
    values = rng.normal(size=shape).astype(np.float32)
    if name.endswith(".bias"):
        return values * np.float32(0.5)
    if name.endswith("norm.weight"):
        mean = 1.5 if re.search(r"\.[qk]_norm\.", name) else 1.0
        return values * np.float32(0.2) + np.float32(mean - is_gemma)
    if name == "model.embed_tokens.weight" and not is_gemma:
        return values
    gain = 1.5 if re.search(r"\.(q|k|qkv)_proj\.", name) else 1.0
    return values * np.float32(gain / np.sqrt(shape[1]))
