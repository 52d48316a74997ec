"""Low-rank adapters (Hu et al. 2021) beside a model's weights, many at once, never merged.

An adapter adds B A x to the product of a matrix with x, with A `[r, in]` and B `[out, r]`. Those of
all loaded adapters stand side by side, by slot, so that one program serves any mix. A batch of few
tokens gathers each token's own A and B. One of many, which would gather the same ones often, is
multiplied with all A; what is not a token's own becomes 0; and the rest is multiplied with all B. A
matrix that no adapter of the batch changes is left out at run time.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallasite.models.weights import Matrix, Source
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.storage import decode


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """All adapters' parts for one matrix of each layer.

    The fields are typed Any since the same tree also holds abstract shapes and placements.

    Attributes:
        a: `[L, S * r, in]` for S slots of rank r.
        b: `[L, S * r, out]`, transposed, the adapters' scales included.
        is_used: bool `[S]`, whether the slot's adapter changes this matrix.
    """

    a: Any
    b: Any
    is_used: Any


Adapters = dict[str, LowRank]
"""By `adapter_key`; empty where an engine takes no adapters."""


def adapter_key(source: Source) -> str:
    """Returns the name of one matrix's part of the adapters."""
    return source.name if source.rows is None else f"{source.name} from {source.rows[0]}"


@dataclass(frozen=True)
class BatchAdapters:
    """The adapters as one batch uses them.

    Attributes:
        token_slots: each token's slot, -1 for none.
        is_used: for each matrix, whether any row's adapter changes it.
    """

    adapters: Adapters
    token_slots: Int[Array, "T"]
    is_used: dict[str, Bool[Array, ""]]

    def covers(self, matrix: Matrix) -> bool:
        """Returns whether there is room for adapters of this matrix."""
        return adapter_key(matrix.source) in self.adapters

    def change(
        self, x: Float[Array, "T in"], matrix: Matrix, layer: Int[Array, ""]
    ) -> Float[Array, "T out"] | float:
        """Returns what the tokens' adapters add to a layer's product, of this device's inputs."""
        key = adapter_key(matrix.source)
        if key not in self.adapters:
            return 0.0
        low_rank = self.adapters[key]
        num_slots = low_rank.is_used.shape[0]
        multiply = _by_gathering if x.shape[0] <= 2 * num_slots else _by_masking

        def compute() -> Float[Array, "T out"]:
            a, b = (
                decode(jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False))
                for stacked in (low_rank.a, low_rank.b)
            )
            slots = (num_slots, -1)
            return multiply(
                x, a.reshape(*slots, a.shape[1]), b.reshape(*slots, b.shape[1]), self.token_slots
            )

        def nothing() -> Float[Array, "T out"]:
            return jnp.zeros((x.shape[0], low_rank.b.shape[2]), jnp.float32)

        with jax.named_scope("lora"):
            return jax.lax.cond(self.is_used[key], compute, nothing)


def batch_adapters(
    adapters: Adapters, row_slots: Int[Array, "B"], ragged: Ragged, num_tokens: int
) -> BatchAdapters:
    """Returns the adapters for a batch whose rows have these slots; -1 is none."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.sum(token[:, None] >= ragged.query_starts[None, 1:], axis=1, dtype=jnp.int32)
    # Padding belongs to no row.
    token_slots = jnp.where(token < ragged.query_starts[-1], row_slots[row], -1)
    is_used = {
        key: jnp.any((row_slots >= 0) & low_rank.is_used[row_slots])
        for key, low_rank in adapters.items()
    }
    return BatchAdapters(adapters, token_slots, is_used)


def _by_gathering(
    x: Float[Array, "T in"],
    a: Float[Array, "S r in"],
    b: Float[Array, "S r out"],
    token_slots: Int[Array, "T"],
) -> Float[Array, "T out"]:
    own = jnp.maximum(token_slots, 0)
    inner = _einsum("ti,tri->tr", x, a[own])
    inner = jnp.where(token_slots[:, None] >= 0, inner, 0.0)
    return _einsum("tr,tro->to", inner, b[own])


def _by_masking(
    x: Float[Array, "T in"],
    a: Float[Array, "S r in"],
    b: Float[Array, "S r out"],
    token_slots: Int[Array, "T"],
) -> Float[Array, "T out"]:
    inner = _einsum("ti,sri->tsr", x, a)
    slot = jnp.arange(a.shape[0], dtype=jnp.int32)
    inner = jnp.where((token_slots[:, None] == slot[None, :])[..., None], inner, 0.0)
    return _einsum("tsr,sro->to", inner, b)


def _einsum(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies as `layers.linear` does: x rounded to the weight's type, sums in f32."""
    return jnp.einsum(
        subscripts,
        x.astype(weight.dtype),
        weight,
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
