"""Writes the tiny models of families.py: as Hugging Face folders, and as llama.cpp converts them.

What the converter writes of each architecture was read off its source (conversion/ in
github.com/ggml-org/llama.cpp, 2026); tensors get the names that the gguf package has for them.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from pallasite.models.config import Llama3Rope
from tests.family_model import FamilyModel, Json
from tests.tiny_checkpoints import (
    add_metadata,
    add_tensor,
    finish,
    interleave_rows,
    llama3_divisors,
    write_json,
    write_safetensors,
)

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
}


def write_family_hf(
    folder: Path, model: FamilyModel, shards: int = 1, hf: Json | None = None
) -> Path:
    """Writes config.json, or `hf` in its place, and the weights; returns the folder.

    A model that has a vision part gets two of that part's tensors, and its names.
    """
    tensors = model.tensors()
    if "text_config" in model.hf:
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(16, np.float32)
        tensors["vision_tower.vision_model.post_layernorm.bias"] = np.ones(16, np.float32)
    write_safetensors(folder, tensors, shards)
    write_json(folder / "config.json", model.hf if hf is None else hf)
    return folder


def write_family_gguf(
    path: Path,
    model: FamilyModel,
    kind: str = "F32",
    tokenizer: Mapping[str, object] | None = None,
) -> Path:
    """Writes a GGUF file and returns its path; `kind` and `tokenizer` as in `write_gguf`.

    A model that such a file would not hold whole is refused.
    """
    assert model.has_gguf
    text = model.text
    architecture = ARCHITECTURES[text["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, text)
    _add_rope(writer, text)
    add_metadata(writer, tokenizer or {})
    names = gguf.get_tensor_name_map(architecture, text["num_hidden_layers"])
    for name, tensor in model.tensors().items():
        stored = _as_converted(name, tensor, text)
        add_tensor(writer, names.get_name(name, (".weight", ".bias")), stored, kind)
    finish(writer)
    return path


def _as_converted(name: str, tensor: np.ndarray, text: Json) -> np.ndarray:
    if text["model_type"] in ("llama", "mistral"):
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for projection, count in heads.items():
            if projection in name:
                return interleave_rows(tensor, text[count])
    if text["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    return tensor


def _add_sizes(writer: gguf.GGUFWriter, text: Json) -> None:
    kind = text["model_type"]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text.get("rms_norm_eps", 1e-6))
    if "head_dim" in text:
        writer.add_key_length(text["head_dim"])
        writer.add_value_length(text["head_dim"])
    if kind in ("llama", "mistral"):
        writer.add_vocab_size(text["vocab_size"])
    if kind in ("gemma3_text", "phi3"):
        writer.add_sliding_window(text["sliding_window"] or 0)
    writer.add_bos_token_id(text["bos_token_id"])
    writer.add_eos_token_id(text.get("eos_token_id", 70))


def _add_rope(writer: gguf.GGUFWriter, text: Json) -> None:
    kind = text["model_type"]
    is_gemma = kind == "gemma3_text"
    head_width = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6 if is_gemma else None))
    writer.add_rope_freq_base(theta)
    if is_gemma:
        writer.add_rope_freq_base_swa(text.get("rope_local_base_freq", 10000.0))
    if kind in ("llama", "mistral"):
        writer.add_rope_dimension_count(head_width)
    if kind == "phi3":
        _add_long_rope(writer, text, rope, head_width)
    elif rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "llama3":
        scaling = Llama3Rope(
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_context_len=rope["original_max_position_embeddings"],
        )
        writer.add_tensor("rope_freqs.weight", llama3_divisors(scaling, head_width, theta))


def _add_long_rope(
    writer: gguf.GGUFWriter, text: Json, rope: Mapping[str, object], head_width: int
) -> None:
    original = text["original_max_position_embeddings"]
    writer.add_rope_dimension_count(int(text.get("partial_rotary_factor", 1.0) * head_width))
    writer.add_rope_scaling_orig_ctx_len(original)
    if "long_factor" not in rope:
        return
    scale = text["max_position_embeddings"] / original
    assert scale > 1
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    for length in ("long", "short"):
        factors = np.array(rope[f"{length}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{length}.weight", factors)
