"""Logits of a whole text through our model, by any schedule of chunks. It knows no engine."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.forms import BaseForm, Rule
from pallasite.models.kv_cache import CacheForm, CacheSpec
from pallasite.models.sharding import MeshShape, make_mesh
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import CPU, Target
from tests.models.running import Program, load

NUM_ROWS = 2
"""B of every program: the text's row and one of padding."""

MAX_LEN = 256


class Forward:
    """A loaded model, its cache and two programs: a decode step, and `size` tokens of prefill."""

    def __init__(
        self,
        path: Path,
        form: BaseForm,
        size: int,
        *,
        cache: CacheForm | None = None,
        mesh: MeshShape | None = None,
        rules: tuple[Rule, ...] = (),
        target: Target = CPU,
    ) -> None:
        self._size = size
        checkpoint = open_checkpoint(path)
        self._devices = devices = make_mesh(mesh or MeshShape(), jax.devices("cpu"))
        model = load(checkpoint, form, target, devices, rules)
        self.config = checkpoint.config
        num_columns = MAX_LEN // target.page_size
        num_pages = NUM_ROWS * num_columns
        spec = CacheSpec(
            partition=model.partition,
            target=target,
            form=cache or form,
            num_pages=num_pages * devices.shape["data"],
        )
        self._program = Program(model, spec, devices)
        # The text's pages lie anywhere but in order.
        pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self._page_table = jnp.asarray(pages.reshape(NUM_ROWS, num_columns))

    def use(self, path: Path) -> None:
        """Takes the weights of another checkpoint, which differs in nothing else."""
        self._program.use(load(open_checkpoint(path), "f32", mesh=self._devices))

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
            parts.append(self._program.logits(jnp.asarray(ids), ragged)[:count])
        return np.concatenate(parts)
