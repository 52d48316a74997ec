"""The types of the paged attention op, shared by the op and its bodies."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What is static about a model's attention.

    Attributes:
        scale: the queries are multiplied by it, usually H ** -0.5.
        windows: for each layer, how many positions a query sees at most, itself included, None for
            all; empty where every layer sees all. Layers run in a rolled loop, so a body looks its
            window up by the layer's index, and one program serves them all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) before masking; None leaves them.
    """

    scale: float
    windows: tuple[int | None, ...] = ()
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(
                f"got windows={self.windows}; each must be at least 1; use None for none"
            )
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """The keys and values of all layers, by pages.

    The fields are typed Any since the same tree also holds abstract shapes, placements and the
    axes' names.

    Attributes:
        values: `[L, P, K, 2, page, H]` of f32, bfloat16, the bits of bfloat16 in uint16, or int8.
        scales: for int8, f32 `[L, P, K, 2, page]`: what each row of H values is multiplied by. A
            row has a scale of its own, made when it is written, so that no row is rounded twice.
            None for floats.
    """

    values: Any
    scales: Any = None
