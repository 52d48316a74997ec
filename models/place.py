"""Where a block runs: a layer, the tokens of a batch, and what is multiplied and attended there.

Products, norms around them and sums with the residual stream come here together, so that a kernel
can do in one pass what it has a body for. What none has is XLA's, one operation after another.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallasite.models import layers
from pallasite.models.layers import Normed, Stream, values_of
from pallasite.models.lora import BatchAdapters
from pallasite.models.sharding import RULES
from pallasite.models.weights import Matrix
from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    Rope,
    rotary_attention,
)
from pallasite.pallas_kernels.quantized_matmul import Fused, Gate, fused_matmul, fuses

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block runs.

    Attributes:
        layer: the layer's index.
        ragged: whose the tokens are.
        rope: by how much the layer turns queries and keys.
        attention: what is static about the model's attention.
        adapters: those of the batch.
        wanted: the tokens whose results what follows attention must give, bool `[T]`; None for all.
        rows: those of this place: None before `onward`, then `wanted`.
    """

    layer: Int[Array, ""]
    ragged: Ragged
    rope: Rope
    attention: AttentionConfig
    adapters: BatchAdapters
    wanted: Bool[Array, "T"] | None = None
    rows: Bool[Array, "T"] | None = None

    def onward(self) -> "Place":
        """Returns the place of what follows attention: a token's results are its own there."""
        return replace(self, rows=self.wanted)

    def attend(
        self, heads: Float[Array, "T heads H"], cache: PagedCache
    ) -> tuple[Float[Array, "T NH"], PagedCache]:
        """Writes the new rows into the cache and mixes the values that each query sees.

        Args:
            heads: each token's queries, keys and values, before rope.
        """
        with jax.named_scope("paged_attention"):
            mixed, cache = rotary_attention(
                heads, self.rope, cache, self.layer, self.ragged, self.attention
            )
        return mixed.reshape(heads.shape[0], -1), cache

    def linear(
        self, x: Stream, matrix: Matrix, onto: Float[Array, "T out"] | None = None
    ) -> Float[Array, "T out"]:
        """Multiplies as `layers.linear` does, by the matrix and each token's adapter of it.

        The result is added to `onto`, where that is given.
        """
        if self.fuses(matrix):
            return self._multiply(x, (matrix,), residual=onto)
        x = values_of(x)
        product = layers.linear(x, matrix) + self.adapters.change(x, matrix, self.layer)
        product = layers.total(product, matrix)
        return product if onto is None else onto + product

    def fine_linear(self, x: Stream, matrix: Matrix) -> Float[Array, "T out"]:
        """Multiplies as `layers.fine_linear` does, by the matrix and each token's adapter."""
        x = values_of(x)
        product = layers.fine_linear(x, matrix) + self.adapters.change(x, matrix, self.layer)
        return layers.total(product, matrix)

    def project(self, x: Stream, q: Matrix, k: Matrix, v: Matrix) -> Float[Array, "T out"]:
        """Multiplies by three matrices; the results lie side by side. k and v are fine products."""
        if q.form.quantizes_inputs and self.fuses(q, k, v):
            return self._multiply(x, (q, k, v))
        x = values_of(x)
        parts = (self.linear(x, q), self.fine_linear(x, k), self.fine_linear(x, v))
        return jnp.concatenate(parts, axis=1)

    def gated(self, x: Stream, gate: Matrix, up: Matrix, kind: Gate) -> Float[Array, "T F"]:
        """Returns activation(gate(x)) * up(x); gelu is tanh's approximation of it."""
        if self.fuses(gate, up):
            return self._multiply(x, (gate, up), gate=kind)
        x = values_of(x)
        return _ACTIVATIONS[kind](self.linear(x, gate)) * self.linear(x, up)

    def fuses(self, *matrices: Matrix) -> bool:
        """Returns whether one call multiplies by these matrices, and does what stands beside it."""
        are_whole = all(
            RULES[matrix.axes[-1]] is None or jax.lax.axis_size(RULES[matrix.axes[-1]]) == 1
            for matrix in matrices
        )
        are_plain = not any(self.adapters.covers(matrix) for matrix in matrices)
        return are_whole and are_plain and fuses(*(matrix.product() for matrix in matrices))

    def _multiply(
        self,
        x: Stream,
        matrices: tuple[Matrix, ...],
        gate: Gate | None = None,
        residual: Float[Array, "T out"] | None = None,
    ) -> Float[Array, "T out"]:
        norm = x.norm if isinstance(x, Normed) else None
        fused = Fused(
            count=self.ragged.query_starts[-1],
            wanted=self.rows,
            norm=None if norm is None else norm.factors(),
            epsilon=0.0 if norm is None else norm.epsilon,
            gate=gate,
            residual=residual,
        )
        rows = x.x if isinstance(x, Normed) else x
        return fused_matmul(rows, [matrix.product() for matrix in matrices], fused)
