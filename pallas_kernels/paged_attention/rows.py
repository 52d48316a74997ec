"""How a key and a value of one head lie in the cache's rows, see `PagedCache`.

Not how they are rounded: rows are joined in the cache's dtype, and split in any.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def join_rows(kv: Shaped[Array, "*r 2 H"], row: tuple[int, int]) -> Shaped[Array, "*r R W"]:
    """Returns keys and values as the cache's rows; `row` is R and W.

    With R = 2 each has a row of W, with R = 1 each has half of one. What is wider than H is zeros.
    """
    surplus = row[0] * row[1] // 2 - kv.shape[-1]
    padded = jnp.pad(kv, ((0, 0),) * (kv.ndim - 1) + ((0, surplus),))
    return padded.reshape(*kv.shape[:-2], *row)


def split_rows(
    rows: Shaped[Array, "*r R S W"], head_width: int
) -> tuple[Shaped[Array, "*r S H"], Shaped[Array, "*r S H"]]:
    """Returns the keys and the values of S tokens, without what is wider than `head_width`."""
    value_start = rows.shape[-1] // 2 if rows.shape[-3] == 1 else 0
    keys = rows[..., 0, :, :head_width]
    return keys, rows[..., -1, :, value_start : value_start + head_width]
