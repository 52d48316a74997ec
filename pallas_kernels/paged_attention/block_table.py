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


ENTRIES: tuple[Entry, ...] = (
    Entry(
        chip="tpu:v5e",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,956 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v5e",
        shape=Shape(cache="int8", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,446 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v5e",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=4, rows=256, heads=4),
        made="static",
        why="1,369,680 bundles of a prompt of 4,096 tokens",
    ),
    Entry(
        chip="tpu:v5e",
        shape=Shape(cache="int8", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=4, rows=256, heads=4),
        made="static",
        why="1,446,483 bundles of a prompt of 4,096 tokens",
    ),
    Entry(
        chip="tpu:v6e",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,487 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v6e",
        shape=Shape(cache="int8", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,191 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v6e",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=4, rows=256, heads=4),
        made="static",
        why="845,280 bundles of a prompt of 4,096 tokens",
    ),
    Entry(
        chip="tpu:v6e",
        shape=Shape(cache="int8", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=2, rows=512, heads=8),
        made="static",
        why="964,514 bundles of a prompt of 4,096 tokens",
    ),
    Entry(
        chip="tpu:v7x",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,517 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v7x",
        shape=Shape(cache="float8_e4m3fn", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=DecodeBlocks(pages=16, piece_pages=4, heads=8),
        made="static",
        why="2,112 bundles per 2,048 cached tokens",
    ),
    Entry(
        chip="tpu:v7x",
        shape=Shape(cache="bfloat16", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=4, rows=256, heads=4),
        made="static",
        why="838,656 bundles of a prompt of 4,096 tokens",
    ),
    Entry(
        chip="tpu:v7x",
        shape=Shape(cache="float8_e4m3fn", page=128, key_heads=8, group=4, row=(2, 128)),
        blocks=PrefillBlocks(tokens=128, pages=4, rows=512, heads=8),
        made="static",
        why="898,707 bundles of a prompt of 4,096 tokens",
    ),
)
