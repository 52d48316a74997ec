"""The types of the paged attention op, shared by the op and its bodies."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Int

from pallasite.pallas_kernels.target import CPU, Target


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What is static about a model's attention.

    Attributes:
        scale: the queries are multiplied by it, usually H ** -0.5.
        windows: for each layer, how many positions a query sees at most, itself included, None for
            all; empty where every layer sees all. Layers run in a rolled loop, so a body looks its
            window up by the layer's index, and one program serves them all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) before masking; None leaves them.
        target: what the program is compiled for, which decides the body.
        interpret: what a kernel's `pallas_call` is told of the same name, so that a test runs it on
            a CPU; the reference has no use for it.
    """

    scale: float
    windows: tuple[int | None, ...] = ()
    soft_cap: float | None = None
    target: Target = CPU
    interpret: Any = False

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
            beyond kv_lens are not read. Who makes it checks it, as the engine's page pool does. An
            id outside [0, P) never leaves the cache's bounds: nothing is written for it, and what
            is read for it is some page of the cache; or the body refuses the whole step.
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

    A page that a step writes to is one request's alone; pages that are whole may be shared. The
    fields are typed Any since the same tree also holds abstract shapes, placements and the axes'
    names.

    Attributes:
        values: `[L, P, K, R, page, W]` of f32, bfloat16, the bits of bfloat16 in uint16, int8 or
            float8_e4m3fn. `Target.cache_row` gives R and W for a head width H. With R = 2 a key
            and a value have a row of W >= H each. With R = 1 they share one of W >= 2 H: the key in
            its first half, the value in its second one. What is wider than H is written as zeros.
        scales: for the 8-bit types, f32 `[L, P, K, 2, page]`: what each key and each value is
            multiplied by. Every row has a scale of its own, made when it is written, so that no row
            is rounded twice. None for others.
    """

    values: Any
    scales: Any = None

    @property
    def shares_rows(self) -> bool:
        """Whether a key and its value lie in one row."""
        return self.values.shape[3] == 1

    @property
    def page_size(self) -> int:
        return self.values.shape[4]
