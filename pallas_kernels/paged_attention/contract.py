"""The types of the paged attention op, shared by the op and its bodies."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What is static about an attention layer.

    Attributes:
        scale: the queries are multiplied by it, usually H ** -0.5.
        window: each query sees this many positions at most, itself included; None sees all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) before masking; None leaves them.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"got window={self.window}; it must be at least 1; use None for none")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"got soft_cap={self.soft_cap}; it must be > 0; use None for none")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Which tokens of the flat axis belong to which request, and where their pages are.

    Rows at and beyond num_requests are padding: their query_starts equal the total of tokens and
    their kv_lens are 0.

    Attributes:
        positions: each token's position in its sequence.
        kv_lens: cached tokens of each request after this step's are written.
        query_starts: request b owns the tokens query_starts[b] to query_starts[b + 1].
        page_table: the page of positions [m * page, (m + 1) * page) of each request; entries
            beyond kv_lens are not read.
        num_requests: rows in use.
        num_decode: how many of them, the first ones, have exactly one query.
    """

    positions: Int[Array, "T"]
    kv_lens: Int[Array, "B"]
    query_starts: Int[Array, "B+1"]
    page_table: Int[Array, "B M"]
    num_requests: Int[Array, ""]
    num_decode: Int[Array, ""]
