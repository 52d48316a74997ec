"""A Llama in float64 numpy, one whole prompt at a time, from a checkpoint's own tensors.

Shares no code with the engine: no pages, no batch, no cache. Rope without scaling.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pallasite.models.config import ModelConfig


@dataclass(frozen=True)
class LlamaOracle:
    """The tensors by Hugging Face name, and the sizes.

    Attributes:
        cached: what a cache would make of keys and of values f64[T, K, H].
    """

    config: ModelConfig
    tensors: Mapping[str, np.ndarray]
    cached: Callable[[np.ndarray], np.ndarray] = lambda rows: rows

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Returns f64[T, V], the logits that follow each token."""
        config = self.config
        N, K, H = config.num_query_heads, config.num_kv_heads, config.head_width
        x = self._weight("model.embed_tokens")[list(token_ids)]
        T = len(token_ids)
        is_future = np.triu(np.ones((T, T), bool), 1)
        for layer in range(config.num_layers):
            within = f"model.layers.{layer}."
            h = self._norm(x, within + "input_layernorm")
            q = self._rope((h @ self._weight(within + "self_attn.q_proj").T).reshape(T, N, H))
            k = self._rope((h @ self._weight(within + "self_attn.k_proj").T).reshape(T, K, H))
            v = (h @ self._weight(within + "self_attn.v_proj").T).reshape(T, K, H)
            k, v = (np.repeat(self.cached(x), N // K, axis=1) for x in (k, v))
            scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
            scores[:, is_future] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = np.einsum("nts,snh->tnh", weights, v).reshape(T, N * H)
            x = x + mixed @ self._weight(within + "self_attn.o_proj").T
            h = self._norm(x, within + "post_attention_layernorm")
            gate = h @ self._weight(within + "mlp.gate_proj").T
            up = h @ self._weight(within + "mlp.up_proj").T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self._weight(within + "mlp.down_proj").T
        return self._norm(x, "model.norm") @ self._weight("lm_head").T

    def _weight(self, name: str) -> np.ndarray:
        return self.tensors[f"{name}.weight"].astype(np.float64)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.norm_epsilon)
        return x / scale * self._weight(name)

    def _rope(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        frequency = self.config.rope_theta ** (-np.arange(half) / half)
        angle = np.arange(x.shape[0])[:, None, None] * frequency
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            (
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ),
            axis=-1,
        )
