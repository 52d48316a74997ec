"""How large the inputs of a model's matrices are on a text: what smoothing is made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallasite.models.decoder import Decoder, embed, layer_weights, places
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.layers import Stream, values_of
from pallasite.models.lora import batch_adapters
from pallasite.models.place import Place
from pallasite.models.weights import Matrix
from pallasite.pallas_kernels.paged_attention import PagedCache, Ragged
from pallasite.pallas_kernels.target import Target

InputSizes = dict[str, np.ndarray]
"""The root mean square of each input channel, f32 `[L, in]`, by the matrix's `pattern_name`."""


@dataclass(frozen=True, kw_only=True)
class _Observing(Place):
    """A place that keeps the sum of squares of what goes into each matrix, `[in]`."""

    squares: dict[str, Array] = field(default_factory=dict)

    def linear(
        self, x: Stream, matrix: Matrix, onto: Float[Array, "T out"] | None = None
    ) -> Float[Array, "T out"]:
        """See `Place`."""
        x = values_of(x)
        self._observe(x, matrix)
        return super().linear(x, matrix, onto)

    def fine_linear(self, x: Stream, matrix: Matrix) -> Float[Array, "T out"]:
        """See `Place`."""
        x = values_of(x)
        self._observe(x, matrix)
        return super().fine_linear(x, matrix)

    def fuses(self, *matrices: Matrix) -> bool:
        """See `Place`. Every matrix's inputs are to be seen."""
        return False

    def _observe(self, x: Float[Array, "T in"], matrix: Matrix) -> None:
        is_token = jnp.arange(x.shape[0], dtype=jnp.int32) < self.ragged.query_starts[-1]
        squares = jnp.where(is_token[:, None], jnp.square(x.astype(jnp.float32)), 0.0)
        self.squares[matrix.source.pattern_name] = jnp.sum(squares, axis=0)


def measure_inputs(
    model: Decoder, mesh: Mesh, target: Target, texts: Sequence[Sequence[int]]
) -> InputSizes:
    """Runs texts through a loaded model and returns how large the inputs of its matrices are.

    Each text is run on its own, from its first token.

    Args:
        mesh: of one device, which has the model.
        texts: token ids, one at least of each.
    """
    assert mesh.size == 1
    # A batch of one token a row would be read as decode steps alone.
    longest = max(2, *map(len, texts))
    num_pages = -(-longest // target.page_size)
    spec = CacheSpec(partition=model.partition, target=target, form="f32", num_pages=num_pages)
    cache, run = spec.allocate(mesh), _program(mesh)
    sums: dict[str, np.ndarray] = {}
    for text in texts:
        token_ids = np.zeros(longest, np.int32)
        token_ids[: len(text)] = text
        ragged = _alone(len(text), longest, num_pages)
        found = run(model, cache, jnp.asarray(token_ids), ragged)
        for name, squares in found.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(squares, np.float64)
    num_tokens = sum(map(len, texts))
    return {name: np.sqrt(total / num_tokens).astype(np.float32) for name, total in sums.items()}


def _alone(num_tokens: int, width: int, num_pages: int) -> Ragged:
    """One request that has the whole cache, and padding up to `width` tokens."""
    return Ragged(
        positions=jnp.arange(width, dtype=jnp.int32),
        kv_lens=jnp.asarray([num_tokens], jnp.int32),
        query_starts=jnp.asarray([0, num_tokens], jnp.int32),
        page_table=jnp.arange(num_pages, dtype=jnp.int32)[None],
        num_requests=jnp.asarray(1, jnp.int32),
        num_decode=jnp.asarray(0, jnp.int32),
    )


def _program(mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    whole = PartitionSpec()
    step = jax.shard_map(_run, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.jit(step)


def _run(
    model: Decoder, cache: PagedCache, token_ids: Int[Array, "T"], ragged: Ragged
) -> dict[str, Float[Array, "L in"]]:
    none = batch_adapters({}, jnp.full_like(ragged.kv_lens, -1), ragged, len(token_ids))
    place = places(model, ragged, none, _Observing)

    def layer(
        carry: tuple[Array, PagedCache], index: Int[Array, ""]
    ) -> tuple[tuple[Array, PagedCache], dict[str, Array]]:
        at = place(index)
        return layer_weights(model, index).block(*carry, at), at.squares

    indices = jnp.arange(model.config.num_layers, dtype=jnp.int32)
    return jax.lax.scan(layer, (embed(model, token_ids), cache), indices)[1]
