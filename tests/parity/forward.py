"""Logits of a whole text through our model, by any schedule of chunks. It knows no engine."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.decoder import Decoder, forward, unembed
from pallasite.models.forms import BaseForm
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.loader import load_weights
from pallasite.models.registry import make_model
from pallasite.models.sharding import make_mesh
from pallasite.models.weights import compute_dtype, placed
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import CPU

NUM_ROWS = 2
"""B of every program: the text's row and one of padding."""

MAX_LEN = 256


class Forward:
    """A loaded model, its cache and two programs: a decode step, and `size` tokens of prefill."""

    def __init__(self, path: Path, form: BaseForm, size: int) -> None:
        self._size = size
        checkpoint = open_checkpoint(path)
        mesh = make_mesh(jax.devices("cpu")[:1])
        self.config = checkpoint.config
        self._model = load_weights(
            placed(make_model(self.config, form, CPU), mesh), checkpoint, mesh
        )
        num_columns = MAX_LEN // CPU.page_size
        spec = CacheSpec(
            model=self.config,
            target=CPU,
            dtype=compute_dtype(form),
            num_pages=NUM_ROWS * num_columns,
        )
        self._cache = spec.allocate(mesh)
        # The text's pages lie anywhere but in order.
        pages = np.random.default_rng(0).permutation(spec.num_pages).astype(np.int32)
        self._page_table = jnp.asarray(pages.reshape(NUM_ROWS, num_columns))

    def logits(self, token_ids: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
        """Returns f32 [T, V], the text being fed in chunks; one of a single token is a decode."""
        assert sum(chunks) == len(token_ids) <= MAX_LEN
        assert max(chunks) <= self._size
        parts = []
        start = 0
        for count in chunks:
            T = NUM_ROWS if count == 1 else self._size
            ids, positions = np.zeros((2, T), np.int32)
            ids[:count] = token_ids[start : start + count]
            positions[:count] = np.arange(start, start + count)
            start += count
            ragged = Ragged(
                positions=jnp.asarray(positions),
                kv_lens=jnp.asarray([start, 0], jnp.int32),
                query_starts=jnp.asarray([0, count, count], jnp.int32),
                page_table=self._page_table,
                num_requests=jnp.asarray(1, jnp.int32),
                num_decode=jnp.asarray(int(count == 1), jnp.int32),
            )
            logits, self._cache = _step(self._model, self._cache, jnp.asarray(ids), ragged)
            parts.append(np.asarray(logits)[:count])
        return np.concatenate(parts)


def _run(
    model: Decoder, cache: jax.Array, token_ids: jax.Array, ragged: Ragged
) -> tuple[jax.Array, jax.Array]:
    hidden, cache = forward(model, cache, token_ids, ragged)
    return unembed(model, hidden), cache


_step = jax.jit(_run, donate_argnums=1)
