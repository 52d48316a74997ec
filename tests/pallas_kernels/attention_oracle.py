"""Attention as its definition reads: float64, dense, one query head at a time. It knows no pages.

Also what a case of the op is made of: each request's whole sequence of keys and values, and the
pages that they lie in. Shares no code with the op.
"""

from copy import copy
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
        given: [S, K, 2, H], keys and values of the whole sequence, before they are rounded.
        kv: the same as the cache's type gives them back.
        pages: where positions [m * page, (m + 1) * page) lie.
    """

    q: np.ndarray
    given: np.ndarray
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


class Cache:
    """A cache in numpy: values [L, P, K, 2, page, H] and, for int8, scales [L, P, K, 2, page].

    It begins as poison: NaN, or 127 with scales of NaN.
    """

    def __init__(self, shape: tuple[int, ...], held_as: np.dtype) -> None:
        self.scales = None
        if held_as == np.int8:
            self.values = np.full(shape, 127, np.int8)
            self.scales = np.full(shape[:-1], np.nan, np.float32)
        else:
            self.values = held(np.full(shape, np.nan, np.float32), held_as)[0]

    def copy(self) -> "Cache":
        other = copy(self)
        other.values = self.values.copy()
        other.scales = None if self.scales is None else self.scales.copy()
        return other

    def write(self, layer: int, sequence: Sequence, start: int, end: int) -> None:
        """Puts the positions from start to end of a sequence where its pages say."""
        page_size = self.values.shape[4]
        for position in range(start, end):
            page, row = sequence.pages[position // page_size], position % page_size
            values, scales = held(sequence.given[position], self.values.dtype)
            self.values[layer, page, :, :, row] = values
            if self.scales is not None:
                self.scales[layer, page, :, :, row] = scales


def rounded(values: np.ndarray, held_as: np.dtype) -> np.ndarray:
    """Returns f32 values [..., H] as a cache of this dtype gives them back."""
    if held_as == np.float32:
        return values
    if held_as == np.int8:
        rows, scales = held(values, held_as)
        return rows.astype(np.float32) * scales[..., None]
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def held(values: np.ndarray, held_as: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns f32 values [..., H] as the cache's dtype holds them, with each row's scale for int8.

    uint16 means the bits of bfloat16. The largest of a row becomes 127 or -127.
    """
    if held_as == np.int8:
        scales = np.abs(values).max(axis=-1) * np.float32(1 / 127)
        inverse = np.float32(1) / np.where(scales == 0, np.float32(1), scales)
        return np.round(values * inverse[..., None]).astype(np.int8), scales
    if held_as == np.uint16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16), None
    return values.astype(held_as), None


def assert_same_bits(ours: Cache, theirs: Cache) -> None:
    """Compares two caches bit by bit, so that NaN compares; ours may be any object of the kind."""
    assert (ours.scales is None) == (theirs.scales is None)
    for name in ("values",) if ours.scales is None else ("values", "scales"):
        own, other = (np.asarray(getattr(cache, name)) for cache in (ours, theirs))
        assert (own.dtype, own.shape) == (other.dtype, other.shape)
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[own.dtype.itemsize]
        np.testing.assert_array_equal(own.view(unsigned), other.view(unsigned), err_msg=name)
