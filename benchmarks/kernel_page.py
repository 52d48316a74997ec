"""What is made of kernels' figures: tables for a terminal and for a page, and a picture."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.kernel_figures import (
    NUM_UNITS,
    PROMPT,
    TILE_CACHED,
    TILE_QUERIES,
    UNEVEN,
    UNIT,
    DecodeFigures,
    Figures,
    GpuFigures,
    PrefillFigures,
    WriteFigures,
)
from benchmarks.report import shown
from pallasite.models.errors import ConfigError

MARK = "<!-- made by benchmarks: {} -->"
END = "<!-- end -->"
_MIB = 2**20
_Figures = TypeVar("_Figures", DecodeFigures, PrefillFigures, WriteFigures, GpuFigures)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of figures.

    Attributes:
        name: what the page calls it.
        title: for a terminal.
        headers: of the columns.
        rows: as many cells each.
    """

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def markdown(self) -> str:
        """Returns it for a page."""
        lines = [self.headers, ("---",) * len(self.headers)]
        lines += [tuple(shown(cell) for cell in row) for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(figures: Sequence[Figures]) -> list[Table]:
    """Returns a table for each kind of figures that there are."""
    found = [
        _decode(_of(figures, DecodeFigures)),
        _prefill(_of(figures, PrefillFigures)),
        _write(_of(figures, WriteFigures)),
        _gpu(_of(figures, GpuFigures)),
    ]
    return [table for table in found if table.rows]


def check_page(page: Path, names: Iterable[str]) -> None:
    """Raises ConfigError for a page that lacks a place for one of these tables."""
    text = page.read_text() if page.exists() else ""
    for name in names:
        if not _place(name).search(text):
            raise ConfigError(
                f"got {page.name}, which has no line {MARK.format(name)!r} with {END!r} after it;"
                " add both"
            )


def fill_in(page: Path, made: Iterable[Table]) -> None:
    """Puts tables into a page, between the marks of their names.

    Raises ConfigError for a page without one of the marks.
    """
    made = list(made)
    check_page(page, [table.name for table in made])
    text = page.read_text()
    for table in made:
        filled = f"{MARK.format(table.name)}\n{table.markdown()}{END}\n"
        text = _place(table.name).sub(lambda _, filled=filled: filled, text)
    page.write_text(text)


def _place(name: str) -> re.Pattern[str]:
    """Matches what stands between the marks of a table, and them."""
    return re.compile(f"{re.escape(MARK.format(name))}\n.*?{re.escape(END)}\n", re.DOTALL)


def draw(path: Path, figures: Sequence[Figures]) -> None:
    """Draws the figures, as a PNG, a panel for each kind. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = [
        (
            f"bundles per {UNIT:,} cached tokens (TPU decode)",
            [(f, f.bundles) for f in _of(figures, DecodeFigures)],
        ),
        (
            "matrix unit in use in the innermost loop, % (TPU prefill)",
            [(f, 100 * f.use["MXU"]) for f in _of(figures, PrefillFigures)],
        ),
        ("registers of a thread (GPU)", [(f, f.use.registers) for f in _of(figures, GpuFigures)]),
    ]
    panels = [(title, bars) for title, bars in panels if bars]
    heights = [len(bars) + 2 for _, bars in panels]
    figure = Figure(figsize=(8, 0.22 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, bars) in zip(axes, panels, strict=True):
        names = [f"{f.chip}  {_label(f)}" for f, _ in bars]
        colours = ["C0" if f.kernel.startswith("Pallasite") else "C7" for f, _ in bars]
        drawn = axis.barh(range(len(bars)), [value for _, value in bars], color=colours)
        axis.set_yticks(range(len(bars)), names)
        axis.bar_label(drawn, fmt="{:,.0f}", fontsize=7, padding=2)
        axis.set_title(f"{title}; static", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
        axis.invert_yaxis()
    figure.savefig(path, format="png", dpi=90)


def _label(figures: Figures) -> str:
    """Block sizes tell JAX's apart."""
    is_own = figures.kernel.startswith("Pallasite") or not figures.blocks
    return f"{figures.kernel}, {figures.cache}" + ("" if is_own else f" ({figures.blocks})")


def _of(figures: Sequence[Figures], kind: type[_Figures]) -> list[_Figures]:
    return [one for one in figures if isinstance(one, kind)]


def _decode(figures: list[DecodeFigures]) -> Table:
    return Table(
        name="decode",
        title=f"TPU decode: bundles over all key heads; from the sixth column on per {UNIT:,}"
        f" cached tokens of {UNIT * NUM_UNITS:,}",
        headers=(
            "chip",
            "kernel",
            "cache",
            "blocks",
            f"{UNIT:,} tokens",
            f"{UNEVEN:,} tokens",
            f"per {UNIT:,} of {UNIT * NUM_UNITS:,}",
            "slots in use",
            "fills",
            "spills",
            "copies",
            "MB",
            "GHz",
            "VMEM, MiB",
            "compile, s",
        ),
        rows=tuple(
            (
                f.chip,
                f.kernel,
                f.cache,
                f.blocks,
                round(f.request),
                round(f.uneven),
                round(f.bundles),
                _use(f.use),
                round(f.fills),
                round(f.spills),
                round(f.num_dmas),
                f.dma_bytes / 1e6,
                f.clock_hz / 1e9,
                f.vmem_bytes / _MIB,
                float(f.compile_s),
            )
            for f in figures
        ),
    )


def _prefill(figures: list[PrefillFigures]) -> Table:
    return Table(
        name="prefill",
        title=f"TPU prefill: {TILE_QUERIES} queries x {TILE_CACHED} cached tokens, all heads",
        headers=(
            "chip",
            "kernel",
            "cache",
            "blocks",
            "MXU",
            "bundles",
            f"prompt of {PROMPT:,}",
            "slots in use",
            "fills",
            "spills",
            "VMEM, MiB",
            "compile, s",
        ),
        rows=tuple(
            (
                f.chip,
                f.kernel,
                f.cache,
                f.blocks,
                f"{f.use['MXU']:.0%}",
                round(f.bundles),
                round(f.prompt),
                _use(f.use),
                round(f.fills),
                round(f.spills),
                f.vmem_bytes / _MIB,
                float(f.compile_s),
            )
            for f in figures
        ),
    )


def _write(figures: list[WriteFigures]) -> Table:
    return Table(
        name="write",
        title="TPU write: bundles of a page of new rows over all key heads",
        headers=("chip", "kernel", "cache", "bundles", "VMEM, MiB", "compile, s"),
        rows=tuple(
            (
                f.chip,
                f.kernel,
                f.cache,
                round(f.bundles),
                f.vmem_bytes / _MIB,
                float(f.compile_s),
            )
            for f in figures
        ),
    )


def _gpu(figures: list[GpuFigures]) -> Table:
    return Table(
        name="gpu",
        title="GPU: what each kernel takes",
        headers=(
            "chip",
            "kernel",
            "cache",
            "registers",
            "bytes spilled",
            "shared bytes",
            "threads",
            "compile, s",
        ),
        rows=tuple(
            (
                f.chip,
                f.kernel,
                f.cache,
                f.use.registers,
                f.use.spill_stores,
                f.use.shared_bytes,
                f.use.threads,
                float(f.compile_s),
            )
            for f in figures
        ),
    )


def _use(use: dict[str, float]) -> str:
    """The units that are busiest."""
    busiest = sorted(use, key=lambda name: -use[name])[:4]
    return ", ".join(f"{name} {use[name]:.0%}" for name in busiest)
