"""Block sizes of the TPU kernels that somebody has looked for, and how they were found.

`tpu_blocks.py` looks here first. `python -m benchmarks.kernels --tune` writes the entries. "static"
says that what the compiler made was counted, "measured" that a chip was timed.
"""

from dataclasses import dataclass
from typing import Literal

from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on, on one device.

    Attributes:
        cache: the cache's dtype.
        page: cached tokens of a page.
        key_heads: K.
        group: query heads of a key head.
        row: R and W of the cache.
    """

    cache: str
    page: int
    key_heads: int
    group: int
    row: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The block sizes of one kernel on one chip.

    Attributes:
        chip: the target's name.
        shape: what they are for.
        blocks: of the decode or of the prefill kernel.
        made: "static" or "measured".
        why: the figure that decided.
    """

    chip: str
    shape: Shape
    blocks: DecodeBlocks | PrefillBlocks
    made: Literal["static", "measured"]
    why: str


ENTRIES: tuple[Entry, ...] = ()
