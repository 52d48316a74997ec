"""Attention as its definition reads: float64, dense, one query head at a time. It knows no pages.

Also what a case of the op is made of: each request's whole sequence of keys and values, and the
pages that they lie in. Shares no code with the op.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    future: int = 0,
) -> np.ndarray:
    """Returns f64 [t, N, H]: the last t positions of a sequence of S, each seeing those before.

    q is [t, N, H], k and v are [S, K, H]; query head n reads key head n // (N / K). `future` lets
    a query see as many positions after its own, which is wrong, for tests of the tests.
    """
    t, N, _ = q.shape
    S, K, _ = k.shape
    at = np.arange(S - t, S)[:, None]
    s = np.arange(S)[None, :]
    visible = s <= at + future
    if window is not None:
        visible &= s > at - window
    out = np.zeros(q.shape, np.float64)
    for n in range(N):
        head = n // (N // K)
        scores = q[:, n].astype(np.float64) @ k[:, head].astype(np.float64).T * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, n] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head].astype(np.float64)
    return out


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One request of a case.

    Attributes:
        q: [t, N, H], the queries of its last t positions; t may be 0.
        kv: [S, K, 2, H], keys and values of the whole sequence, as the cache's type holds them.
        pages: where positions [m * page, (m + 1) * page) lie.
    """

    q: np.ndarray
    kv: np.ndarray
    pages: tuple[int, ...]

    @property
    def num_new(self) -> int:
        return len(self.q)

    @property
    def num_old(self) -> int:
        return len(self.kv) - len(self.q)

    def expected(self, scale: float, window: int | None, soft_cap: float | None) -> np.ndarray:
        """Returns f64 [t, N, H]."""
        return attend(self.q, self.kv[:, :, 0], self.kv[:, :, 1], scale, window, soft_cap)

    def without_page(self, index: int, page_size: int) -> "Sequence":
        """The same with one page's positions taken out, which is wrong."""
        keep = np.arange(len(self.kv)) // page_size != index
        return replace(self, kv=self.kv[keep])


def rounded(values: np.ndarray, held_as: np.dtype) -> np.ndarray:
    """Returns f32 values as a cache of this dtype gives them back."""
    if held_as == np.float32:
        return values.astype(np.float32)
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def held(values: np.ndarray, held_as: np.dtype) -> np.ndarray:
    """Returns values as the cache's dtype holds them: uint16 means the bits of bfloat16."""
    if held_as == np.uint16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(held_as)


def poisoned_cache(shape: tuple[int, ...], held_as: np.dtype) -> np.ndarray:
    """Returns a cache [L, P, K, 2, page, H] of NaN."""
    return held(np.full(shape, np.nan, np.float32), held_as)


def write(
    cache: np.ndarray, layer: int, sequence: Sequence, start: int, end: int, page_size: int
) -> None:
    """Puts the positions from start to end of a sequence where its pages say, in place."""
    for position in range(start, end):
        page = sequence.pages[position // page_size]
        row = held(sequence.kv[position], cache.dtype)
        cache[layer, page, :, :, position % page_size] = row


def bits(array: np.ndarray) -> np.ndarray:
    """Returns the array as unsigned integers, so that NaN compares."""
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
