"""What all decoder-only families share: embed, one loop over stacked layers, norm, unembed.

The loop is rolled, so that compile time does not grow with depth, and carries the whole cache,
which every layer updates in place.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallasite.models.config import ModelConfig
from pallasite.models.layers import embed, fine_linear, rms_norm
from pallasite.models.weights import Weight
from pallasite.pallas_kernels.paged_attention import AttentionConfig, Ragged, paged_attention


@runtime_checkable
class Attend(Protocol):
    """Attends in one layer: writes the new rows into the cache and mixes the visible values."""

    def __call__(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: jax.Array,
    ) -> tuple[Float[Array, "T N H"], jax.Array]: ...


class Decoder(nnx.Module):
    """The weights of a decoder.

    Attributes:
        embedding: `[V, D]`.
        layers: a family's module of stacked weights, `[L, ...]` each.
        final_norm: `[D]`.
        head: `[V, D]`, or None where the embedding serves.
    """

    config: ModelConfig
    embedding: Weight
    layers: "DecoderLayers"
    final_norm: Weight
    head: Weight | None


class DecoderLayers(nnx.Module):
    """A family's layers. Under the loop each weight is one layer's, without its first axis."""

    def block(
        self, x: Float[Array, "T D"], positions: Int[Array, "T"], cache: jax.Array, attend: Attend
    ) -> tuple[Float[Array, "T D"], jax.Array]:
        """Runs one layer on the residual stream."""
        raise NotImplementedError


def forward(
    model: Decoder, cache: jax.Array, token_ids: Int[Array, "T"], ragged: Ragged
) -> tuple[Float[Array, "T D"], jax.Array]:
    """Runs a ragged batch of tokens; returns normed hidden states and the updated cache."""
    config = model.config
    attention = AttentionConfig(scale=config.head_width**-0.5)

    def layer(index: Int[Array, ""], carry: tuple[Array, jax.Array]) -> tuple[Array, jax.Array]:
        x, cache = carry
        weights = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), model.layers
        )

        def attend(q: Array, k: Array, v: Array, cache: jax.Array) -> tuple[Array, jax.Array]:
            with jax.named_scope("paged_attention"):
                kv_new = jnp.stack((k, v), axis=2)
                return paged_attention(q, kv_new, cache, index, ragged, attention)

        return weights.block(x, ragged.positions, cache, attend)

    with jax.named_scope("embed"):
        x = embed(token_ids, model.embedding[...])
    x, cache = jax.lax.fori_loop(0, config.num_layers, layer, (x, cache))
    with jax.named_scope("final_norm"):
        return rms_norm(x, model.final_norm[...], config.norm_epsilon), cache


def unembed(model: Decoder, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Returns the logits of normed hidden states."""
    with jax.named_scope("unembed"):
        head = model.embedding if model.head is None else model.head
        return fine_linear(hidden, head[...])
