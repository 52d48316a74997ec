"""How a TPU multiplies queries with cached keys, and weights with cached values.

A matrix unit that takes 8-bit numbers takes an 8-bit cache as it is. What meets it there is floats,
so each is split into two 8-bit parts, `x = unit * (RATIO * high + low)`, which stand in rows of
their own: a matrix product of few rows costs the same with twice as many. Elsewhere 8-bit rows are
widened first. A row's scale never touches the cached rows: that of a key multiplies its scores,
that of a value its weights.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallasite.pallas_kernels.storage import LARGEST
from pallasite.pallas_kernels.target import Target

LANES = 128
"""Columns of a vector register."""

HIDDEN = -2e30
"""The score of a position that a query does not see: below every running maximum."""

NONE_YET = -1e30
"""The running maximum before any score: 2 ** (HIDDEN - NONE_YET) is 0."""

_RATIO = {"int8": 128, "float8_e4m3fn": 8}
"""By how much the second part is finer than the first one."""

_TINY = 1e-30
"""What a row of zeros is divided by."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """The types of one cache's products.

    Attributes:
        held_as: the cache's type.
        multiplied_as: what both sides of a product are.
    """

    held_as: jnp.dtype
    multiplied_as: jnp.dtype

    @classmethod
    def of(cls, held_as: jnp.dtype, target: Target) -> "Products":
        """Returns the products of a cache on a chip."""
        is_native = {
            "float32": True,
            "bfloat16": True,
            "int8": target.multiplies_int8,
            "float8_e4m3fn": target.multiplies_fp8,
        }[held_as.name]
        return cls(held_as=held_as, multiplied_as=held_as if is_native else jnp.dtype(jnp.bfloat16))

    @property
    def num_parts(self) -> int:
        return 2 if self.multiplied_as.itemsize == 1 else 1

    @property
    def has_scales(self) -> bool:
        return self.held_as.itemsize == 1

    def rows(self, group_rows: int) -> int:
        """Returns how many rows `split` makes of so many, up to whole registers."""
        tile = 8
        return -(-self.num_parts * group_rows // tile) * tile

    def split(
        self, x: Float[Array, "g n"], largest: Float[Array, "#g 1"]
    ) -> tuple[Array, Float[Array, "#g 1"]]:
        """Returns the parts [rows(g), n] of x, whose magnitudes are `largest` at most.

        With it comes the unit of what `multiply` makes of them.
        """
        if self.num_parts == 1:
            return x.astype(self.multiplied_as), jnp.ones_like(largest)
        top, ratio = LARGEST[self.multiplied_as], _RATIO[self.multiplied_as.name]
        x = x * (top / jnp.maximum(largest, _TINY))
        parts = _integers(x) if self.multiplied_as == jnp.int8 else _floats(x)
        surplus = self.rows(x.shape[0]) - 2 * x.shape[0]
        if surplus:
            parts.append(jnp.zeros((surplus, x.shape[1]), parts[0].dtype))
        return jnp.concatenate(parts).astype(self.multiplied_as), largest / (top * ratio)

    def join(self, product: Array, group_rows: int, *, over_columns: bool) -> Float[Array, "g n"]:
        """Returns the sums of both parts' products, in units."""
        if self.num_parts == 1:
            return product
        high, low = product[:group_rows], product[group_rows : 2 * group_rows]
        if not over_columns or self.multiplied_as != jnp.int8:
            high, low = high.astype(jnp.float32), low.astype(jnp.float32)
        # Over a row's columns integers do: 127 * 127 * 256 * 128 is below 2 ** 31.
        return (high * _RATIO[self.multiplied_as.name] + low).astype(jnp.float32)

    def multiply(
        self, parts: Array, rows: Array, group_rows: int, *, over_columns: bool
    ) -> Float[Array, "g n"]:
        """Returns the sums of parts [rows(g), W] or [rows(g), S] with cached rows [S, W].

        `over_columns` sums over W, for scores; else over S.
        """
        axis = 1 if over_columns else 0
        product = jax.lax.dot_general(
            parts,
            rows.astype(self.multiplied_as),
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.int32 if self.multiplied_as == jnp.int8 else jnp.float32,
            precision="highest" if self.multiplied_as == jnp.float32 else None,
        )
        return self.join(product, group_rows, over_columns=over_columns)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is static about the scores.

    Attributes:
        products: how queries meet keys, and weights meet values.
        cap: the soft cap times log2(e), by which a tanh is multiplied; None for none.
        has_window: whether any layer has a window.
    """

    products: Products
    cap: float | None
    has_window: bool

    def scores(self, product: Float[Array, "g S"]) -> Float[Array, "g S"]:
        """Returns scores in units of log2(e), of products that were scaled for it."""
        return product if self.cap is None else self.cap * jnp.tanh(product)


def _integers(x: Float[Array, "g n"]) -> list[Array]:
    """Splits numbers up to 127 into integers, `x = high + low / 128`, whose sizes int8 holds."""
    # Adding 1.5 * 2 ** 23 leaves the nearest integer in the low bits of an f32.
    shift = np.float32(1.5 * 2**23)
    bits = jax.lax.bitcast_convert_type(x * np.float32(_RATIO["int8"]) + shift, jnp.int32)
    whole = bits - shift.view(np.int32)
    high = (whole + 64) >> 7
    return [high, whole - (high << 7)]


def _floats(x: Float[Array, "g n"]) -> list[Array]:
    """Splits numbers into floats, `x = high + low / 8`. float8_e4m3fn holds high, from 2^-6 on."""
    # Without its last 20 bits an f32 has the 3 of the smaller type.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(2**20))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return [high, (x - high) * np.float32(_RATIO["float8_e4m3fn"])]
