"""What all decoder-only families share: embed, one loop over stacked layers, norm, unembed.

The loop is rolled, so that compile time does not grow with depth, and carries the whole cache,
which every layer updates in place. All of it runs within `jax.shard_map`, on what one device has:
key heads, query heads, feed-forward channels and rows of the vocabulary are the device's own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallasite.models import layers
from pallasite.models.config import ModelConfig
from pallasite.models.layers import RmsNorm, rope, rope_factor, rope_frequencies
from pallasite.models.lora import BatchAdapters
from pallasite.models.place import Place
from pallasite.models.weights import Declare, Matrix
from pallasite.pallas_kernels.paged_attention import AttentionConfig, PagedCache, Ragged, Rope

PlaceT = TypeVar("PlaceT", bound=Place)


class DecoderLayers(nnx.Module):
    """A family's layers. Under the loop each weight is one layer's, without its first axis."""

    def block(
        self, x: Float[Array, "T D"], cache: PagedCache, at: Place
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """Runs one layer on the residual stream."""
        raise NotImplementedError


class Decoder(nnx.Module):
    """The weights of a decoder, and how it begins and ends.

    Attributes:
        target: what its programs are compiled for.
        embedding: `[V, D]`.
        embedding_scale: what its rows are multiplied by.
        layers: a family's module of stacked weights, `[L, ...]` each.
        final_norm: over D.
        head: `[V, D]`, or None where the embedding serves.
    """

    embedding_scale: float = 1.0

    def __init__(
        self,
        config: ModelConfig,
        declare: Declare,
        layers: DecoderLayers,
        norm: Callable[..., RmsNorm] = RmsNorm,
    ) -> None:
        shape, axes = (config.vocab_size, config.model_width), ("vocab", "width")
        self.config = config
        self.partition = declare.partition
        self.target = declare.target
        self.embedding = declare.matrix(shape, axes, "model.embed_tokens.weight")
        self.layers = layers
        self.final_norm = norm(config, declare, "model.norm.weight")
        has_head = not config.ties_embedding
        self.head = declare.matrix(shape, axes, "lm_head.weight") if has_head else None


def forward(
    model: Decoder,
    cache: PagedCache,
    token_ids: Int[Array, "T"],
    ragged: Ragged,
    adapters: BatchAdapters,
    wanted: Bool[Array, "T"] | None = None,
) -> tuple[Float[Array, "T D"], PagedCache]:
    """Runs a ragged batch of tokens; returns normed hidden states and the updated cache.

    Hidden states of tokens that are not `wanted`, or no request's, may be anything, NaN too: what
    follows must take each token by itself. None wants all.
    """
    place = places(model, ragged, adapters, Place)

    def layer(index: Int[Array, ""], carry: tuple[Array, PagedCache]) -> tuple[Array, PagedCache]:
        at = place(index)
        if wanted is not None:
            # Later layers need keys and values of all.
            at = replace(at, wanted=wanted | (index < model.config.num_layers - 1))
        return layer_weights(model, index).block(*carry, at)

    with jax.named_scope("embed"):
        x = embed(model, token_ids)
    x, cache = jax.lax.fori_loop(0, model.config.num_layers, layer, (x, cache))
    with jax.named_scope("final_norm"):
        return model.final_norm(x), cache


def places(
    model: Decoder, ragged: Ragged, adapters: BatchAdapters, kind: type[PlaceT]
) -> Callable[[Int[Array, ""]], PlaceT]:
    """Returns what gives the place of a batch in a layer, by the layer's index."""
    config = model.config
    attention = AttentionConfig(
        scale=config.attention_scale, windows=config.windows, target=model.target
    )
    frequencies, which = np.unique(rope_frequencies(config), axis=0, return_inverse=True)
    # Outside the loop: most models turn all layers alike.
    ropes = [rope(ragged.positions, own, rope_factor(config)) for own in frequencies]

    def rope_of(index: Int[Array, ""]) -> Rope:
        if len(ropes) == 1:
            return ropes[0]
        own = jnp.asarray(which, jnp.int32)[index]
        return jax.tree.map(lambda *tables: jnp.stack(tables)[own], *ropes)

    def place(index: Int[Array, ""]) -> PlaceT:
        return kind(
            layer=index,
            ragged=ragged,
            rope=rope_of(index),
            attention=attention,
            adapters=adapters,
        )

    return place


def layer_weights(model: Decoder, index: Int[Array, ""]) -> DecoderLayers:
    """Returns one layer's weights."""

    def own(part: Any) -> Any:
        if isinstance(part, Matrix | RmsNorm):
            return part.of_layer(index)
        return jax.lax.dynamic_index_in_dim(part, index, keepdims=False)

    return jax.tree.map(own, model.layers, is_leaf=lambda part: isinstance(part, Matrix | RmsNorm))


def embed(model: Decoder, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Returns what the first layer takes."""
    return layers.embed(token_ids, model.embedding) * model.embedding_scale


def unembed(
    model: Decoder, hidden: Float[Array, "T D"], count: Int[Array, ""] | None = None
) -> Float[Array, "T V"]:
    """Returns the logits of normed hidden states; of the first `count`, where that is given."""
    with jax.named_scope("unembed"):
        head = model.embedding if model.head is None else model.head
        return layers.unembed(hidden, head, model.config.vocab_size, count)
