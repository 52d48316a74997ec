"""Rotary position embedding (Su et al. 2021), the halves of what is turned being the pairs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rope:
    """By how much each token's pairs of dimensions are turned, the same for all heads.

    Attributes:
        cosines, sines: f32 `[T, pairs]`.
    """

    cosines: Any
    sines: Any


def rotate(x: Float[Array, "T N H"], rope: Rope) -> Float[Array, "T N H"]:
    """Turns the first 2 * pairs dimensions of each head; the others stay."""
    num_rotated = 2 * rope.cosines.shape[1]
    turned, rest = x[..., :num_rotated], x[..., num_rotated:]
    cos, sin = rope.cosines[:, None, :], rope.sines[:, None, :]
    first, second = jnp.split(turned, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
