"""Makes the goldens: logits of transformers on torch, in f32, by code that is not ours.

    python -m tests.parity.make_goldens MODEL OUTPUT

MODEL is a pulled SmolLM2-135M-Instruct; the gguf package reads it and dequantizes its weights.
Small goldens go to goldens/, the whole logits of every text to the folder OUTPUT, where compare.py
reads them. Runs where the `parity` extra is installed; nothing of ours runs here but the tiny
models' configs and random weights.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from pallasite.models.config import ModelConfig
from pallasite.models.pull import locate
from tests.parity import make_family_goldens
from tests.parity.texts import SHORT, SHORT_LEN, TEXTS
from tests.parity.tiny_models import TINY_MODELS, checksum

GOLDENS = Path(__file__).parent / "goldens"
NUM_TOP = 20
"""How many of the largest logits are kept at each position of a short text."""

STRIDE = 769
"""Beside them, every so many-th logit, so that small ones count too."""

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main(model: str, output: Path) -> None:
    torch.set_grad_enabled(False)
    GOLDENS.mkdir(exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    for name, tiny in TINY_MODELS.items():
        tensors, token_ids = tiny.tensors(), tiny.token_ids()
        logits = run(make_llama(llama_config(tiny.config), tensors), token_ids)
        np.savez_compressed(
            GOLDENS / f"tiny-{name}.npz",
            token_ids=token_ids,
            logits=logits,
            checksum=np.array(checksum(tensors)),
        )
        print(f"tiny model {name}: logits {logits.shape}, std {logits.std():.2f}")
    make_family_goldens.main()
    make_smollm2(locate(model), output)


def make_smollm2(path: Path, output: Path) -> None:
    reader = gguf.GGUFReader(path)
    config = gguf_config(reader)
    llama = make_llama(config, gguf_tensors(reader, config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    golden: dict[str, np.ndarray] = {}
    num_positions = 0
    for name, text in TEXTS.items():
        token_ids = np.array(tokenizer(text)["input_ids"], np.int32)
        logits = run(llama, token_ids)
        np.savez(output / f"{name}.npz", token_ids=token_ids, logits=logits)
        logprobs = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
        rows = np.arange(len(token_ids) - 1)
        golden[f"{name}.token_ids"] = token_ids
        scored = logprobs[rows, token_ids[1:]]
        golden[f"{name}.logprobs"] = scored.astype(np.float32)
        golden[f"{name}.top"] = logits[:-1].argmax(axis=-1).astype(np.int32)
        second, first = np.sort(logits[:-1], axis=-1)[:, -2:].T
        golden[f"{name}.lead"] = first - second
        num_positions += len(rows)
        if name in SHORT:
            short = logits[:SHORT_LEN]
            top = np.argsort(-short, axis=-1, kind="stable")[:, :NUM_TOP]
            golden[f"{name}.top_ids"] = top.astype(np.int32)
            golden[f"{name}.top_logits"] = np.take_along_axis(short, top, axis=-1)
            golden[f"{name}.strided_logits"] = short[:, ::STRIDE]
        print(f"{name}: {len(token_ids)} tokens, mean log-probability {scored.mean():.3f}")
    np.savez_compressed(GOLDENS / "smollm2.npz", **golden)
    print(f"{num_positions} scored positions in {len(TEXTS)} texts")


def llama_config(config: ModelConfig) -> transformers.LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context_len,
        }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        hidden_size=config.model_width,
        intermediate_size=config.ffn_width,
        num_attention_heads=config.num_query_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.context_len,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=config.ties_embedding,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids),
    )


def gguf_config(reader: gguf.GGUFReader) -> transformers.LlamaConfig:
    def value(name: str) -> float:
        field = reader.fields[f"llama.{name}"]
        return field.parts[field.data[0]][0].item()

    num_heads, width = value("attention.head_count"), value("embedding_length")
    names = {tensor.name for tensor in reader.tensors}
    assert "rope_freqs.weight" not in names
    return transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        num_hidden_layers=value("block_count"),
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_attention_heads=num_heads,
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=width // num_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in names,
    )


def gguf_tensors(
    reader: gguf.GGUFReader, config: transformers.LlamaConfig
) -> dict[str, np.ndarray]:
    """Returns f32 tensors by Hugging Face name, each head's rows in Hugging Face's order."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *layer, name, _ = tensor.name.split(".")
        if name in heads:
            # Stored as pairs [heads, H/2, 2]; transformers rotates halves [heads, 2, H/2].
            pairs = values.reshape(heads[name], config.head_dim // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{HF_NAMES[name]}.weight"] = values
    return tensors


def make_llama(
    config: transformers.LlamaConfig, tensors: dict[str, np.ndarray]
) -> transformers.LlamaForCausalLM:
    config._attn_implementation = "eager"
    llama = transformers.LlamaForCausalLM(config).float().eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    missing, surplus = llama.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert missing == tied, missing
    assert not surplus, surplus
    llama.tie_weights()
    return llama


def run(llama: transformers.LlamaForCausalLM, token_ids: np.ndarray) -> np.ndarray:
    """Returns f32 [T, V]."""
    output = llama(torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False)
    return output.logits[0].numpy()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
