"""Lines through the times of steps, and what a machine's own speeds would make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

Kind = Literal["rows", "prompt", "cached"]
"""What grows: rows that decode, the tokens of a prompt, or cached tokens of all rows together."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A straight line y = start + slope * x through points, and how well it goes through them.

    Attributes:
        r_squared: the share of the variance of y that the line has.
        largest_miss: of all points, the largest |y - line| / y.
    """

    start: float
    slope: float
    r_squared: float
    largest_miss: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Returns the line of least squares, each point's distance counted as a share of its y.

    Without that the longest steps alone would choose the line. Needs two different x, and y > 0.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    columns = np.stack([np.ones_like(xs), xs], axis=1)
    start, slope = np.linalg.lstsq(columns / ys[:, None], np.ones_like(ys), rcond=None)[0]
    misses = ys - (start + slope * xs)
    spread = ((ys - ys.mean()) ** 2).sum()
    return Line(
        start=float(start),
        slope=float(slope),
        r_squared=float(1 - (misses**2).sum() / spread) if spread else 1.0,
        largest_miss=float(np.max(np.abs(misses) / ys)),
    )


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a machine does, measured.

    Attributes:
        read: bytes a second of memory.
        operations: of the products that a step is made of, a second; an addition is one, too.
    """

    read: float
    operations: float

    def best(self, other: Self) -> "Speeds":
        """Returns the higher of each: others on a machine only make it slower."""
        return Speeds(
            read=max(self.read, other.read), operations=max(self.operations, other.operations)
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step of a model cannot do without.

    Attributes:
        weight_bytes: of all weights, which a step reads once.
        row_operations: of a row's products with the layers' matrices.
        head_operations: of a sampled row's product with the output matrix.
        cached_bytes: the keys and values of one token in the cache.
    """

    weight_bytes: int
    row_operations: int
    head_operations: int
    cached_bytes: int


def roofline(work: Work, speeds: Speeds, kind: Kind) -> tuple[float, float]:
    """Returns the seconds that a line would start at and rise by, of steps of a `kind`.

    Weights are read once a step, and meanwhile nothing is computed: a step that does both at a
    time may be below.
    """
    start_s = work.weight_bytes / speeds.read
    slopes_s = {
        "rows": (work.row_operations + work.head_operations) / speeds.operations,
        "prompt": work.row_operations / speeds.operations,
        "cached": work.cached_bytes / speeds.read,
    }
    return start_s, slopes_s[kind]
