"""Tiny random Llama checkpoints, in both formats, small enough that any test may make one.

Written by the formats' own libraries, and q and k interleaved as llama.cpp's converter does, so
that our readers are held against something that is not ours. Tokens are bytes: ids 0 to 255, then
the specials, so that a whole server can run on a folder that `write_hf` made.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pallasite.models.config import Llama3Rope, ModelConfig

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TINY = ModelConfig(
    family="llama",
    vocab_size=320,
    num_layers=2,
    model_width=64,
    ffn_width=128,
    num_query_heads=4,
    num_kv_heads=2,
    head_width=16,
    context_len=512,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    eos_token_ids=(258,),
    bos_token_id=257,
)

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float32 weights by Hugging Face name: N(0, 0.02), and norms N(1, 0.02).

    Without lm_head.weight where the config ties it to the embedding.
    """
    rng = np.random.default_rng(seed)
    D, F, H = config.model_width, config.ffn_width, config.head_width
    q_rows, k_rows = config.num_query_heads * H, config.num_kv_heads * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for layer in range(config.num_layers):
        within = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (q_rows, D),
            "self_attn.k_proj": (k_rows, D),
            "self_attn.v_proj": (k_rows, D),
            "self_attn.o_proj": (D, q_rows),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in within.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.ties_embedding:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return {
        name: rng.normal(1.0 if len(shape) == 1 else 0.0, 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_hf(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    shards: int = 1,
    dtype: str = "F32",
) -> Path:
    """Writes a Hugging Face folder, byte tokenizer included, and returns it.

    `dtype` is F32, F16 or BF16. With several shards the tensors are dealt out in turn.
    """
    write_safetensors(folder, tensors, shards, dtype)
    write_json(folder / "config.json", hf_config(config))
    eos = config.eos_token_ids
    generation = {"eos_token_id": eos[0] if len(eos) == 1 else list(eos)}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer.json", byte_tokenizer())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": config.context_len,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def write_safetensors(
    folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, dtype: str = "F32"
) -> None:
    """Writes the weights of a Hugging Face folder; see `write_hf`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.astype(_DTYPES[dtype]) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            part = dict(list(stored.items())[index::shards])
            file_name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            save_file(part, folder / file_name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
        size = sum(tensor.nbytes for tensor in stored.values())
        index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index_file)


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Returns config.json's object, in the form that transformers wrote before version 5."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_width,
        "intermediate_size": config.ffn_width,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_len,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and hf_rope_scaling(scaling),
        "tie_word_embeddings": config.ties_embedding,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def hf_rope_scaling(scaling: Llama3Rope) -> dict[str, object]:
    """Returns the object that config.json holds for a scaled rope."""
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context_len,
    }


def byte_tokenizer() -> dict[str, object]:
    """Returns tokenizer.json's object: a byte-level BPE without merges, and the special tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + index, "content": token, "special": True, **special}
            for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "trim_offsets": True},
        "post_processor": None,
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }


def byte_letters() -> list[str]:
    """Returns the printable letter that GPT-2's byte-level BPE writes for each byte.

    Printable bytes of Latin-1 stand for themselves, the others for letters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def gguf_tokenizer(config: ModelConfig) -> dict[str, object]:
    """Returns the metadata of the same byte tokenizer, as a converter writes it.

    Ids above the specials' are padding tokens, named and typed as llama.cpp's converter does.
    """
    tokens = [*byte_letters(), *SPECIAL_TOKENS]
    num_padding = config.vocab_size - len(tokens)
    types = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{len(tokens) + i}]" for i in range(num_padding)],
        "tokenizer.ggml.token_type": [
            int(kind) for kind in types + [gguf.TokenType.UNUSED] * num_padding
        ],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    tokenizer: Mapping[str, object] | None = None,
) -> Path:
    """Writes a GGUF file and returns its path.

    `kind` is how matrices are stored: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0. Vectors are
    F32, as converters leave them. `tokenizer` is further metadata, such as `gguf_tokenizer` makes.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_len)
    writer.add_embedding_length(config.model_width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_query_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    ids_by_kind = zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False)
    for name, token_id in ids_by_kind:
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    add_metadata(writer, tokenizer or {})
    if config.rope_scaling is not None:
        divisors = llama3_divisors(config.rope_scaling, config.head_width, config.rope_theta)
        writer.add_tensor("rope_freqs.weight", divisors)
    heads = {"q_proj": config.num_query_heads, "k_proj": config.num_kv_heads}
    for name, tensor in tensors.items():
        for projection, num_heads in heads.items():
            if name.endswith(f"{projection}.weight"):
                tensor = interleave_rows(tensor, num_heads)
        add_tensor(writer, gguf_name(name), tensor, kind)
    finish(writer)
    return path


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, object]) -> None:
    """Adds values by key, an int as 32 bits without a sign."""
    adders = {
        **{bool: writer.add_bool, int: writer.add_uint32},
        **{str: writer.add_string, list: writer.add_array},
    }
    for key, value in metadata.items():
        adders[type(value)](key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    """Adds a tensor under GGUF's name for it; see `write_gguf`."""
    if tensor.ndim == 1 or kind == "F32":
        writer.add_tensor(name, tensor.astype(np.float32))
    elif kind == "F16":
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        number = gguf.GGMLQuantizationType[kind]
        stored = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), number)
        writer.add_tensor(name, stored, raw_dtype=number)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Returns GGUF's name for a Hugging Face one of the Llama family."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, within = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[within]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def interleave_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts each head's row i beside its row H/2 + i, as GGUF stores q and k: [N*H, D]."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def llama3_divisors(scaling: Llama3Rope, head_width: int, rope_theta: float) -> np.ndarray:
    """Returns what each rope frequency is divided by, float32 [H/2], one at a time.

    Worded by wavelengths, as Meta's released code is; ours is worded by turns.
    """
    divisors = []
    for index in range(head_width // 2):
        wavelength = 2 * np.pi * rope_theta ** (2 * index / head_width)
        low = scaling.original_context_len / scaling.low_frequency_factor
        high = scaling.original_context_len / scaling.high_frequency_factor
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(scaling.factor)
        else:
            kept = (scaling.original_context_len / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            divisors.append(1 / ((1 - kept) / scaling.factor + kept))
    return np.array(divisors, np.float32)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
