"""Attention as its definition reads: float64, dense, one query head at a time. It knows no pages.

Also what a case of the op is made of: each request's whole sequence of keys and values, the pages
that they lie in, and the cache that holds them. Shares no code with the op.
"""

from copy import copy
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

INT8 = np.dtype(np.int8)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = {INT8: 127, FP8: 448}
"""What the largest of a row becomes, in each type that has a scale for a row."""


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    future: int = 0,
) -> np.ndarray:
    """Returns f64 [t, N, H]: the last t positions of a sequence of S, each seeing those before.

    q is [t, N, H], k and v are [S, K, H]; query head n reads key head n // (N / K). A head's sink
    takes weight as one more score would. `future` lets a query see as many positions after its own,
    which is wrong, for tests of the tests.
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
        if sinks is not None:
            scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=sinks[n])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[:, n] = weights[:, :S] @ v[:, head].astype(np.float64)
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

    def without_page(self, index: int, page_size: int) -> "Sequence":
        """The same with one page's positions taken out, which is wrong."""
        keep = np.arange(len(self.kv)) // page_size != index
        return replace(self, kv=self.kv[keep])


class Cache:
    """A cache in numpy: values [L, P, K, R, page, W] and, for 8 bits, scales [L, P, K, 2, page].

    It begins as one number everywhere: poison unless told, which is NaN, or 127 in int8 with scales
    of NaN.
    """

    def __init__(self, shape: tuple[int, ...], held_as: np.dtype, fill: float = np.nan) -> None:
        self.scales = None
        if held_as in LARGEST:
            value = 127 if held_as == INT8 and np.isnan(fill) else fill
            self.values = np.full(shape, value, held_as)
            self.scales = np.full((*shape[:3], 2, shape[4]), fill, np.float32)
        else:
            self.values = held(np.full(shape, fill, np.float32), held_as)[0]

    def copy(self) -> "Cache":
        other = copy(self)
        other.values = self.values.copy()
        other.scales = None if self.scales is None else self.scales.copy()
        return other

    def write(self, layer: int, sequence: Sequence, start: int, end: int) -> None:
        """Puts the positions from start to end of a sequence where its pages say.

        Those of a page that is none go nowhere.
        """
        positions = np.arange(start, end)
        num_pages, page_size = self.values.shape[1], self.values.shape[4]
        pages = np.asarray(sequence.pages, int)[positions // page_size]
        is_page = (pages >= 0) & (pages < num_pages)
        positions, pages = positions[is_page], pages[is_page]
        place = (layer, pages, slice(None), slice(None), positions % page_size)
        values, scales = held(sequence.given[positions], self.values.dtype)
        self.values[place] = self._rows(values)
        if self.scales is not None:
            self.scales[place] = scales

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """Lays [n, K, 2, H] out as [n, K, R, W]: two rows, or halves of one; the rest zeros."""
        R, W, H = self.values.shape[3], self.values.shape[5], values.shape[3]
        rows = np.zeros((*values.shape[:2], R, W), values.dtype)
        rows[:, :, 0, :H] = values[:, :, 0]
        value_start = W // 2 if R == 1 else 0
        rows[:, :, R - 1, value_start : value_start + H] = values[:, :, 1]
        return rows


def rounded(values: np.ndarray, held_as: np.dtype) -> np.ndarray:
    """Returns f32 values [..., H] as a cache of this dtype gives them back."""
    if held_as == np.float32:
        return values
    if held_as in LARGEST:
        rows, scales = held(values, held_as)
        return rows.astype(np.float32) * scales[..., None]
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def held(values: np.ndarray, held_as: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns f32 values [..., H] as the cache's dtype holds them, and for 8 bits rows' scales.

    uint16 means the bits of bfloat16.
    """
    if held_as in LARGEST:
        scales = np.abs(values).max(axis=-1) * np.float32(1 / LARGEST[held_as])
        inverse = np.float32(1) / np.where(scales == 0, np.float32(1), scales)
        rows = values * inverse[..., None]
        return (np.round(rows) if held_as == INT8 else rows).astype(held_as), scales
    if held_as == np.uint16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16), None
    return values.astype(held_as), None


def assert_same_bits(ours: object, theirs: Cache, free: np.ndarray | None = None) -> None:
    """Compares two caches bit by bit, so that NaN compares.

    Ours may be any object of the kind. `free` is bool [L, P, page]: rows that may hold anything.
    """
    names = ("values", "scales") if theirs.scales is not None else ("values",)
    assert (getattr(ours, "scales", None) is None) == (theirs.scales is None)
    for name in names:
        own, other = (np.asarray(getattr(cache, name)) for cache in (ours, theirs))
        assert (own.dtype, own.shape) == (other.dtype, other.shape)
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[own.dtype.itemsize]
        differs = own.view(unsigned) != other.view(unsigned)
        if free is not None:
            axes = (2, 3, 5) if name == "values" else (2, 3)
            differs &= ~np.expand_dims(free, axes)
        if differs.any():
            places = np.argwhere(differs)
            raise AssertionError(
                f"{len(places)} of the cache's {name} differ, the first at {places[0].tolist()}:"
                f" got {own[differs][0]}, it must be {other[differs][0]}"
            )
