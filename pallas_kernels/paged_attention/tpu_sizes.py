"""Checks of how much the TPU kernels take at once: what does not fit would leave something out."""

import dataclasses
from typing import Any


def check_positive(blocks: Any) -> None:
    """Raises ValueError for a field below 1 of block sizes, a dataclass of whole numbers."""
    for name, size in dataclasses.asdict(blocks).items():
        if size < 1:
            raise ValueError(f"got {name}={size} of {type(blocks).__name__}; it must be at least 1")


def check_divides(name: str, size: int, total: int, whole: str) -> None:
    """Raises ValueError where a block size is not a divisor of the total that `whole` names."""
    if total % size:
        raise ValueError(f"got {name}={size} for {whole}, {total} in all; it must divide them")
