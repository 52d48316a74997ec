"""Cases of the paged attention op: ragged batches, their caches, and what must come of them.

Whatever a batch does not own is NaN: pages of nobody, rows beyond a sequence's end, those of its
last page included. Entries of the page table beyond its pages are no pages. So a read that should
not count shows in the output, and a write that should not happen shows in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallasite.pallas_kernels.paged_attention import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.target import Target
from tests.pallas_kernels import attention_oracle as oracle

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
BITS, INT8, FP8 = np.dtype(np.uint16), oracle.INT8, oracle.FP8

L = 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The static side of a case: one compiled program.

    Attributes:
        T: tokens of the batch; where they are B, every request has one query.
        held_as: the cache's type.
        given_as: the type of queries and of new keys and values.
        windows: one a layer, so that the wrong layer's would show, or none.
        max_len: the most tokens of a sequence.
    """

    T: int
    K: int
    G: int
    H: int
    page: int
    held_as: np.dtype
    given_as: np.dtype = FLOAT32
    windows: tuple[int | None, ...] = ()
    soft_cap: float | None = None
    has_sinks: bool = False
    B: int = 5
    max_len: int = 320

    @property
    def N(self) -> int:
        return self.K * self.G

    @property
    def num_columns(self) -> int:
        return -(-self.max_len // self.page)

    @property
    def num_pages(self) -> int:
        return self.B * self.num_columns + 3

    @property
    def is_decode(self) -> bool:
        return self.T == self.B

    def __str__(self) -> str:
        shape = f"T{self.T}-K{self.K}-G{self.G}-H{self.H}-page{self.page}-len{self.max_len}"
        extras = [str(w) for w in self.windows] + [f"cap{self.soft_cap}"] * bool(self.soft_cap)
        extras += ["sinks"] * self.has_sinks
        return "-".join([shape, f"{self.given_as}-in-{self.held_as}", *extras])


@dataclass(frozen=True, kw_only=True)
class Body:
    """One way to run the op, and what it is tested with.

    Attributes:
        name: in the tests' names.
        op: takes what the op takes.
        target: what the config says.
        interpret: what the config says.
        settings: those that it is tested with.
        num_examples: how many batches Hypothesis makes for each test and setting.
        is_exact: whether its sums are f32's even where inputs are not. The others may round queries
            and probabilities to bfloat16, unless queries and cache are f32.
        refuses_pages: whether a page that the cache does not have is an error.
    """

    name: str
    op: Callable[..., Any]
    target: Target
    interpret: Any = False
    settings: tuple[Setting, ...]
    num_examples: int = 20
    is_exact: bool = False
    refuses_pages: bool = False

    def config(self, setting: Setting) -> AttentionConfig:
        return AttentionConfig(
            scale=setting.H**-0.5,
            windows=setting.windows,
            soft_cap=setting.soft_cap,
            target=self.target,
            interpret=self.interpret,
        )

    def empty_cache(self, setting: Setting, fill: float = np.nan) -> oracle.Cache:
        R, W = self.target.cache_row(setting.H)
        shape = (L, setting.num_pages, setting.K, R, setting.page, W)
        return oracle.Cache(shape, setting.held_as, fill)

    def run(self, setting: Setting, *arguments: Any, sinks: Any = None) -> Any:
        """Runs the op, compiled once for each setting, on q, kv_new, cache, layer and ragged."""
        key = (self.op, bool(self.interpret))
        if key not in _JITTED:
            options = _QUICK if self.interpret else None
            _JITTED[key] = jax.jit(self.op, static_argnames="config", compiler_options=options)
        return _JITTED[key](*arguments, config=self.config(setting), sinks=sinks)

    def assert_close(self, setting: Setting, ours: np.ndarray, right: np.ndarray) -> None:
        """Holds outputs [t, N, H] of N(0, 1) inputs to the tolerance of their types.

        f32: an output has the error of its scores, some eps * sqrt(H), times its values; 64 eps of
        5, about the largest of them, covers it, and what is measured is a few eps.

        Others: queries and probabilities are each rounded to 8 bits, so a weight has a relative
        error of 2^-9 at most from either, and an output one of 2^-8 of its own size where all of
        them conspire. A row of H may have twice that, and all rows together half of it.
        """
        assert np.isfinite(ours).all()
        error = ours.astype(np.float64) - right
        least = 64 * np.finfo(np.float32).eps * 5
        if self.is_exact or {setting.given_as, setting.held_as} == {FLOAT32}:
            assert np.abs(error).max(initial=0) <= least
            return
        errors, sizes = (np.linalg.norm(x, axis=-1) for x in (error, right))
        floor = least * setting.H**0.5
        assert (errors <= 2.0**-7 * sizes + floor).all()
        assert np.linalg.norm(errors) <= 2.0**-8 * np.linalg.norm(sizes) + floor


_JITTED: dict[tuple[Callable[..., Any], bool], Callable[..., Any]] = {}

# An interpreted kernel is a large program that nobody else compiles: quickly is well enough.
_QUICK: dict[str, Any] = {"xla_backend_optimization_level": 1}
if jax.__version_info__ < (0, 11):
    # Later versions have no other way, and refuse the option.
    _QUICK["xla_cpu_use_fusion_emitters"] = False


class Case:
    """The inputs of one call, and what must come of them."""

    def __init__(
        self,
        body: Body,
        setting: Setting,
        lens: list[tuple[int, int]],
        num_decode: int,
        wanted: int = 0,
        seed: int = 0,
    ) -> None:
        """`lens` are each request's (new tokens, tokens in all).

        Requests share their first pages with the first one, as many as wanted, but none that
        either writes to.
        """
        rng = np.random.default_rng(seed)
        self.body, self.setting, self.num_decode = body, setting, num_decode
        self.layer = seed % L
        K, N, H, page = setting.K, setting.N, setting.H, setting.page
        self.sinks = 2 * rng.standard_normal(N).astype(np.float32) if setting.has_sinks else None
        free = list(rng.permutation(setting.num_pages))
        self.sequences: list[oracle.Sequence] = []
        for num_new, kv_len in lens:
            q = self._given(rng.standard_normal((num_new, N, H)))
            kv = self._given(rng.standard_normal((kv_len, K, 2, H)))
            if kv_len > 1:
                kv[rng.integers(kv_len)] = 0  # an 8-bit cache has a scale of 0 for it
            pages = [int(free.pop()) for _ in range(-(-kv_len // page))]
            if self.sequences:
                first = self.sequences[0]
                num_shared = min(wanted, first.num_old // page, (kv_len - num_new) // page)
                pages[:num_shared] = first.pages[:num_shared]
                kv[: num_shared * page] = first.given[: num_shared * page]
            held = oracle.rounded(kv, setting.held_as)
            self.sequences.append(oracle.Sequence(q=q, given=kv, kv=held, pages=tuple(pages)))
        self._rng = rng

    def _given(self, values: np.ndarray) -> np.ndarray:
        """f32 values as the type that they are given in holds them."""
        return values.astype(self.setting.given_as).astype(np.float32)

    def ragged(self) -> Ragged:
        """Returns whose the tokens are."""
        setting, counts = self.setting, [s.num_new for s in self.sequences]
        positions = np.zeros(setting.T, np.int32)
        query_starts = np.full(setting.B + 1, sum(counts), np.int32)
        kv_lens = np.zeros(setting.B, np.int32)
        no_pages = [-1, setting.num_pages, np.iinfo(np.int32).min, np.iinfo(np.int32).max]
        page_table = self._rng.choice(no_pages, (setting.B, setting.num_columns)).astype(np.int32)
        for row, s in enumerate(self.sequences):
            query_starts[row] = start = sum(counts[:row])
            kv_lens[row] = len(s.kv)
            page_table[row, : len(s.pages)] = s.pages
            positions[start : start + s.num_new] = np.arange(s.num_old, len(s.kv))
        return Ragged(
            positions=jnp.asarray(positions),
            kv_lens=jnp.asarray(kv_lens),
            query_starts=jnp.asarray(query_starts),
            page_table=jnp.asarray(page_table),
            num_requests=jnp.asarray(len(self.sequences), jnp.int32),
            num_decode=jnp.asarray(self.num_decode, jnp.int32),
        )

    def call(self, fill: float = np.nan) -> tuple[np.ndarray, PagedCache, oracle.Cache]:
        """Returns the op's output and cache, and the cache as it must be.

        What the batch does not own is filled with a number.
        """
        setting = self.setting
        before = self.body.empty_cache(setting, fill)
        for s in self.sequences:
            before.write(self.layer, s, 0, s.num_old)
        after = before.copy()
        for s in self.sequences:
            after.write(self.layer, s, s.num_old, len(s.kv))
        # What follows the last request's tokens is anything.
        q, kv_new = self._padding(setting.N, setting.H), self._padding(setting.K, 2, setting.H)
        starts = np.cumsum([0, *(s.num_new for s in self.sequences)])
        for s, start in zip(self.sequences, starts, strict=False):
            q[start : start + s.num_new] = s.q
            kv_new[start : start + s.num_new] = s.given[s.num_old :]
        out, cache = self.body.run(
            setting,
            jnp.asarray(q.astype(setting.given_as)),
            jnp.asarray(kv_new.astype(setting.given_as)),
            on_device(before),
            jnp.asarray(self.layer, jnp.int32),
            self.ragged(),
            sinks=None if self.sinks is None else jnp.asarray(self.sinks),
        )
        return np.asarray(out), cache, after

    def _padding(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal((self.setting.T, *shape)).astype(np.float32)

    def free_rows(self) -> np.ndarray:
        """Returns bool [L, P, page]: what follows a sequence in a page that the step writes to."""
        setting = self.setting
        free = np.zeros((L, setting.num_pages, setting.page), bool)
        for s in self.sequences:
            is_page = s.pages[-1] in range(setting.num_pages)
            if s.num_new and len(s.kv) % setting.page and is_page:
                free[self.layer, s.pages[-1], len(s.kv) % setting.page :] = True
        return free

    def expected(self, **changes: Any) -> np.ndarray:
        """Returns f64 [t, N, H] of all requests in turn."""
        arguments = {
            "scale": self.setting.H**-0.5,
            "window": self.setting.windows[self.layer] if self.setting.windows else None,
            "soft_cap": self.setting.soft_cap,
            "sinks": self.sinks,
            **changes,
        }
        outs = [
            oracle.attend(s.q, s.kv[:, :, 0], s.kv[:, :, 1], **arguments)
            for s in self.sequences
            if s.num_new
        ]
        empty = np.zeros((0, self.setting.N, self.setting.H))
        return np.concatenate([empty, *outs])

    def check(self) -> None:
        out, cache, after = self.call()
        expected = self.expected()
        assert out.dtype == np.float32
        assert out.shape == (self.setting.T, self.setting.N, self.setting.H)
        self.body.assert_close(self.setting, out[: len(expected)], expected)
        oracle.assert_same_bits(cache, after, self.free_rows())


def on_device(cache: oracle.Cache) -> PagedCache:
    scales = None if cache.scales is None else jnp.asarray(cache.scales)
    return PagedCache(values=jnp.asarray(cache.values), scales=scales)


def lengths(least: int, most: int, page: int) -> st.SearchStrategy[int]:
    """Lengths from least to most, page edges and their neighbours often."""
    edges = [n + d for n in range(0, most + 2, page) for d in (-1, 0, 1)]
    edges = [n for n in edges if least <= n <= most]
    return st.integers(least, most) | st.sampled_from(edges or [least])


@st.composite
def decode_batches(draw: st.DrawFn, setting: Setting) -> tuple[list[tuple[int, int]], int]:
    """Rows of one query each, none and one of them included."""
    kv_lens = draw(st.lists(lengths(1, setting.max_len, setting.page), max_size=setting.B))
    return [(1, kv_len) for kv_len in kv_lens], len(kv_lens)


@st.composite
def prefill_batches(
    draw: st.DrawFn, setting: Setting, num_decode: int = 0
) -> tuple[list[tuple[int, int]], int]:
    """Rows of any number of queries, none and one included, behind num_decode of one."""
    lens = [(1, draw(lengths(1, setting.max_len, setting.page))) for _ in range(num_decode)]
    left = setting.T - num_decode
    most = min(left, setting.max_len)
    for _ in range(draw(st.integers(0, setting.B - num_decode))):
        num_new = draw(lengths(0, min(left, most), setting.page))
        least = max(num_new, 1)
        kv_len = draw(st.just(least) | lengths(least, setting.max_len, setting.page))
        lens.append((num_new, kv_len))
        left -= num_new
    return lens, num_decode


def mixed_batches(setting: Setting) -> st.SearchStrategy[tuple[list[tuple[int, int]], int]]:
    """Decode rows, then others."""
    return st.integers(1, setting.B).flatmap(lambda count: prefill_batches(setting, count))
