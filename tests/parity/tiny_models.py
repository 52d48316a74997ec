"""Tiny random Llama models that both sides of the parity tests make from the same seed.

Unlike a model at its start, they make something of every part: attention is peaked, each layer
moves the residual stream by about its own size and the norms' scales differ, so that an error
anywhere reaches the logits.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from pallasite.models.config import Llama3Rope, ModelConfig
from tests.tiny_checkpoints import TINY, random_tensors

NUM_TOKENS = 140


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A config and the seed of its weights and of the tokens that it is run on."""

    config: ModelConfig
    seed: int

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns float32 weights by Hugging Face name."""
        return {
            name: _spread(name, tensor)
            for name, tensor in random_tensors(self.config, self.seed).items()
        }

    def token_ids(self) -> np.ndarray:
        """Returns i32 [NUM_TOKENS]."""
        rng = np.random.default_rng([self.seed, 1])
        return rng.integers(0, self.config.vocab_size, NUM_TOKENS).astype(np.int32)


_BASE = replace(TINY, vocab_size=160, eos_token_ids=(158,), bos_token_id=157)

TINY_MODELS = {
    "no-groups": TinyModel(config=replace(_BASE, num_query_heads=4, num_kv_heads=4), seed=1),
    "groups-of-3-tied": TinyModel(
        config=replace(
            _BASE, model_width=66, num_query_heads=6, num_kv_heads=2, ties_embedding=True
        ),
        seed=2,
    ),
    "llama3-rope": TinyModel(
        # Of the 8 frequencies, some are kept, some blended and some stretched.
        config=replace(
            _BASE,
            rope_theta=500.0,
            rope_scaling=Llama3Rope(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_context_len=128,
            ),
        ),
        seed=3,
    ),
    "odd-sizes": TinyModel(
        config=replace(
            _BASE,
            vocab_size=131,
            num_layers=3,
            model_width=45,
            ffn_width=58,
            num_query_heads=3,
            num_kv_heads=1,
            head_width=10,
            norm_epsilon=1e-2,
            eos_token_ids=(130,),
            bos_token_id=129,
        ),
        seed=4,
    ),
}


def checksum(tensors: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the weights, so that a golden of other weights is not used."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name], np.float32).tobytes())
    return digest.hexdigest()


def _spread(name: str, tensor: np.ndarray) -> np.ndarray:
    """Spreads N(0, 0.02) to N(0, 1 / inputs), and a norm's N(1, 0.02) to N(1, 0.2)."""
    if tensor.ndim == 1:
        return 1 + 10 * (tensor - 1)
    unit = tensor * np.float32(50)
    if name == "model.embed_tokens.weight":
        return unit
    gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return unit * np.float32(gain / np.sqrt(tensor.shape[1]))
