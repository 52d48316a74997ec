"""Tries block sizes of the TPU kernels, and writes the best into the table that the op reads.

What is best is static: the fewest bundles, of what neither takes long to compile nor spills much.
A chip may disagree; the table's entries say how they were made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.kernel_cases import plain
from benchmarks.kernel_figures import PROMPT, UNIT, Compiler
from benchmarks.kernel_page import Table
from benchmarks.options import say
from pallasite.pallas_kernels.compile import CompileError
from pallasite.pallas_kernels.paged_attention import block_table
from pallasite.pallas_kernels.paged_attention.block_table import Entry, Shape
from pallasite.pallas_kernels.paged_attention.tpu_blocks import shape_of
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks

DECODE_TOKENS = (1024, 2048)
"""Cached tokens of a block. Smaller ones hide less of the memory's latency, which no bundle shows;
larger ones are more of a request's last block."""

PIECE_TOKENS = (512,)
DECODE_HEADS = (4, 8)
DECODE_SPILLS = 50
"""Of UNIT cached tokens at most."""

PREFILL_QUERIES = (128,)
PREFILL_TOKENS = (256, 512, 1024)
PREFILL_ROWS = (256, 512)
PREFILL_PARTS = (8,)
"""Parts side by side in the program: its length, and so its time to compile."""

LEAST_GAIN = 0.03
"""What a candidate must save to take the place of what the op would take without it: smaller
differences of bundles say nothing of a chip."""

TABLE = Path(block_table.__file__)
_START = "ENTRIES: tuple[Entry, ...] = "


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate.

    Attributes:
        blocks: its sizes.
        bundles: what they cost; None where they cannot be compiled.
        spills: registers written for want of them, as `bundles`.
    """

    blocks: DecodeBlocks | PrefillBlocks
    bundles: float | None
    spills: float = 0

    @property
    def is_allowed(self) -> bool:
        limit = DECODE_SPILLS if isinstance(self.blocks, DecodeBlocks) else float("inf")
        return self.bundles is not None and self.spills <= limit


def tune(compiler: Compiler) -> tuple[Table, list[Entry]]:
    """Returns all that was tried for a chip and shapes, and the entries of what was best."""
    tried = [*_try_decode(compiler), *_try_prefill(compiler)]
    entries = []
    for kind in (DecodeBlocks, PrefillBlocks):
        allowed = [one for one in tried if isinstance(one.blocks, kind) and one.is_allowed]
        if allowed:
            entries.append(_entry(compiler, choose(allowed)))
    chosen = [entry.blocks for entry in entries]
    rows = tuple(
        (
            compiler.target.name,
            _kernel(one.blocks),
            compiler.shapes.cache,
            _shown(one.blocks),
            None if one.bundles is None else round(one.bundles),
            round(one.spills),
            "chosen" if one.blocks in chosen else "",
        )
        for one in tried
    )
    headers = "chip", "kernel", "cache", "blocks", "bundles", "spills", ""
    return Table(name="tune", title="block sizes tried", headers=headers, rows=rows), entries


def choose(allowed: list[Tried]) -> Tried:
    """Returns the best, or the first, the op's own, where no other is better by LEAST_GAIN."""
    first, best = allowed[0], min(allowed, key=lambda one: one.bundles or 0)
    return best if (best.bundles or 0) <= (1 - LEAST_GAIN) * (first.bundles or 0) else first


def write(new: list[Entry], path: Path = TABLE) -> None:
    """Puts entries in the place of those for the same chips, shapes and kernels."""
    replaced = {(entry.chip, entry.shape, type(entry.blocks)) for entry in new}
    kept = [
        entry
        for entry in block_table.ENTRIES
        if (entry.chip, entry.shape, type(entry.blocks)) not in replaced
    ]
    text = path.read_text()
    before, start, _ = text.partition(_START)
    if not start:
        raise ValueError(f"got {path}, which has no line that begins with {_START!r}")
    path.write_text(before + render([*kept, *new]))


def render(entries: list[Entry]) -> str:
    """Returns the assignment of the entries as a formatter would leave it."""
    if not entries:
        return f"{_START}()\n"
    lines = [f"{_START}("]
    for entry in sorted(entries, key=_order):
        lines += [
            "    Entry(",
            f'        chip="{entry.chip}",',
            f"        shape={_call(entry.shape)},",
            f"        blocks={_call(entry.blocks)},",
            f'        made="{entry.made}",',
            f'        why="{entry.why}",',
            "    ),",
        ]
    return "\n".join([*lines, ")\n"])


def _try_decode(compiler: Compiler) -> Iterator[Tried]:
    own, page = compiler.shapes.decode_blocks(compiler.target), compiler.shapes.page
    num_heads = compiler.shapes.num_kv_heads
    candidates = [own] + [
        DecodeBlocks(pages=tokens // page, piece_pages=piece // page, heads=heads)
        for tokens, piece, heads in product(DECODE_TOKENS, PIECE_TOKENS, DECODE_HEADS)
        if piece >= page and tokens // page % (piece // page) == 0 and num_heads % heads == 0
    ]
    for blocks in dict.fromkeys(candidates):
        say(f"{compiler.target.name}: decode with {_shown(blocks)}")
        try:
            figures = compiler.decode(plain(blocks))
        except CompileError:
            yield Tried(blocks=blocks, bundles=None)
            continue
        # A request's last block is rarely whole.
        bundles = (figures.request + figures.uneven + figures.bundles) / 3
        yield Tried(blocks=blocks, bundles=bundles, spills=figures.spills)


def _try_prefill(compiler: Compiler) -> Iterator[Tried]:
    shapes, page = compiler.shapes, compiler.shapes.page
    own = shapes.prefill_blocks(compiler.target)
    candidates = [own]
    for queries, tokens, rows, parts in product(
        PREFILL_QUERIES, PREFILL_TOKENS, PREFILL_ROWS, PREFILL_PARTS
    ):
        num_rows = queries * shapes.group
        if num_rows % rows or tokens < page:
            continue
        heads = max(1, parts * rows // num_rows)
        if shapes.num_kv_heads % heads == 0:
            blocks = PrefillBlocks(tokens=queries, pages=tokens // page, rows=rows, heads=heads)
            candidates.append(blocks)
    for blocks in dict.fromkeys(candidates):
        say(f"{compiler.target.name}: prefill with {_shown(blocks)}")
        try:
            figures = compiler.prefill(plain(blocks))
        except CompileError:
            yield Tried(blocks=blocks, bundles=None)
            continue
        yield Tried(blocks=blocks, bundles=figures.prompt, spills=figures.spills)


def _entry(compiler: Compiler, best: Tried) -> Entry:
    shapes, bundles = compiler.shapes, best.bundles or 0
    unit = (
        f"per {UNIT:,} cached tokens"
        if isinstance(best.blocks, DecodeBlocks)
        else f"of a prompt of {PROMPT:,} tokens"
    )
    return Entry(
        chip=compiler.target.name,
        shape=shape_of(shapes.paged_cache(compiler.target), shapes.group),
        blocks=best.blocks,
        made="static",
        why=f"{bundles:,.0f} bundles {unit}",
    )


def _order(entry: Entry) -> tuple[str, ...]:
    return entry.chip, _kernel(entry.blocks), repr(entry.shape)


def _kernel(blocks: DecodeBlocks | PrefillBlocks) -> str:
    return "decode" if isinstance(blocks, DecodeBlocks) else "prefill"


def _call(value: Shape | DecodeBlocks | PrefillBlocks) -> str:
    parts = ", ".join(f"{name}={_literal(part)}" for name, part in plain(value).items())
    return f"{type(value).__name__}({parts})"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _shown(blocks: DecodeBlocks | PrefillBlocks) -> str:
    return ", ".join(f"{name} {number}" for name, number in plain(blocks).items())
