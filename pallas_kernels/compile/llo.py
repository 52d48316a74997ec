"""Reads the TPU compiler's dumps of a kernel's final bundles into a tree of regions.

The text is libtpu's own (of version 0.0.42); nothing documents it. What is not understood raises
`AnalysisError`, so that a newer compiler's text is refused, not misread.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pallasite.pallas_kernels.compile.regions import Dma, Region, Work
from pallasite.pallas_kernels.compile.scalars import Counter, Scalars


class AnalysisError(Exception):
    """The compiler's dump is not of the form that is known."""


@dataclass(frozen=True)
class Place:
    """A line of Python that an instruction was made for."""

    file: str
    line: int


@dataclass(frozen=True)
class SourceNames:
    """What functions are at a place.

    Attributes:
        bodies: names of the functions that are bodies of the loop or the branches made there; the
            second argument tells which.
        function: the function whose text the place is in; None where it is not known.
    """

    bodies: Callable[[Place, str], tuple[str, ...]]
    function: Callable[[Place], str | None]


@dataclass(frozen=True)
class _Instruction:
    text: str
    """Without comments, but for a copy's size."""
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Bundle:
    instructions: tuple[_Instruction, ...]
    depth: int
    is_target: bool
    starts: tuple[int, ...]
    """Numbers of the compiler's regions that start here."""
    is_grid: bool
    """Whether it counts steps of the grid."""


@dataclass(frozen=True)
class _Span:
    """Bundles `start` to `stop`, exclusive, that a branch repeats or skips."""

    start: int
    stop: int
    kind: Literal["kernel", "loop", "branch"]
    branch: _Instruction
    trips: int | None = None
    counter: Counter | None = None
    is_grid: bool = False


_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)? *: *(>*) *\{", re.M)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"= sbr\.rel .*target = \$region(\d+)")
_DMA = re.compile(r"= dma\.(?!done)(\w+) .*")
_SIZE = re.compile(r"size_in_granules=(%?\w+)")
_FILLS, _SPILLS = "VLOAD:FILL", "VSTORE:SPILL"
_GRANULE = 32
_MOST_DELAYED = {"tpu:v7x": 6}
"""Bundles after a branch that are still executed: 4, on v7x up to 6."""


def has_dump(folder: Path, instruction: str) -> bool:
    """Whether the kernel that XLA calls `instruction` was compiled, not taken from an equal one."""
    return bool(_dumps(folder, instruction, "final_bundles"))


def read_kernel(
    folder: Path, instruction: str, target: str, names: SourceNames
) -> tuple[Region, dict[str, int]]:
    """Returns the regions of the kernel that XLA calls `instruction`, and what a bundle can hold.

    Raises AnalysisError where its dumps are missing or not understood.
    """
    bundles_text = _dump(folder, instruction, "final_bundles").read_text()
    uses_text = _dump(folder, instruction, "final_hlo-static-per-bundle-utilization").read_text()
    loops_text = _dump(folder, instruction, "pre-finalize-registers-and-allocations").read_text()
    bundles = _bundles(bundles_text)
    capacity, *uses = _uses(uses_text)
    if not bundles or len(uses) < len(bundles):
        raise AnalysisError(f"got {len(uses)} lines of slots for {len(bundles)} bundles")
    delayed = _MOST_DELAYED.get(target, 4)
    scalars = Scalars(i.text for bundle in bundles for i in bundle.instructions)
    spans = _spans(bundles, scalars, _trips(loops_text), delayed)
    whole = _Span(0, len(bundles), "kernel", _Instruction("", ()))
    builder = _Builder(bundles, uses, scalars, spans, names)
    del capacity[_FILLS], capacity[_SPILLS]
    return builder.region(whole, spans, "", instruction, None), capacity


def _dump(folder: Path, instruction: str, label: str) -> Path:
    found = _dumps(folder, instruction, label)
    if not found:
        raise AnalysisError(f"got no dump {label} of the kernel {instruction}")
    return found[-1]


def _dumps(folder: Path, instruction: str, label: str) -> list[Path]:
    pattern = re.compile(rf"\d+-{re.escape(instruction)}-\d+-{re.escape(label)}\.txt")
    return [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]


def _bundles(text: str) -> list[_Bundle]:
    starts = list(_BUNDLE.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bundles = []
    for index, (match, end) in enumerate(zip(starts, ends, strict=True)):
        if int(match[1], 16) != index:
            raise AnalysisError(f"got bundle {match[1]} where {index:#x} was due")
        body, _, marks = text[match.end() : end].rpartition("}")
        bundles.append(
            _Bundle(
                instructions=tuple(_instructions(body)),
                depth=len(match[3]),
                is_target=match[2] is not None,
                starts=tuple(int(number) for number in _START.findall(marks)),
                is_grid="iteration index, stage" in body,
            )
        )
    return bundles


def _instructions(body: str) -> Iterator[_Instruction]:
    """Yields what a bundle holds. Comments may lie in one another."""
    text, comment, depth = "", "", 0
    for part in re.split(
        r"(/\*|\*/|;;)", body.replace("/*size_in_granules=*/", "size_in_granules=")
    ):
        if part == "/*":
            depth += 1
        elif part == "*/":
            depth -= 1
        elif depth:
            comment += part
        elif part != ";;":
            text += part
        else:
            yield _instruction(text, comment)
            text, comment = "", ""
    if text.strip():
        yield _instruction(text, comment)


def _instruction(text: str, comment: str) -> _Instruction:
    found = re.findall(r'loc\("([^"]*)":(\d+)', comment)
    return _Instruction(text.strip(), tuple(Place(file, int(line)) for file, line in found))


def _uses(text: str) -> list[dict[str, int]]:
    """Returns how many instructions a bundle can hold for each unit, then how many each does."""
    lines = text.splitlines()
    try:
        names = lines[1].replace(" ", "").split(",")
        rows = [[int(word) for word in line.split()] for line in (lines[2], *lines[4:])]
        uses = [dict(zip(names, row, strict=True)) for row in rows if row]
    except (IndexError, ValueError) as error:
        raise AnalysisError(f"got a table of slots that cannot be read: {error}") from error
    if not uses or not {_FILLS, _SPILLS} < uses[0].keys():
        raise AnalysisError(f"got a table of the slots {', '.join(names)}")
    return uses


def _trips(text: str) -> dict[int, int]:
    """Returns how often loops run whose bodies are the compiler's regions of these numbers."""
    trips: dict[int, int] = {}
    due: int | None = None
    for line in text.splitlines():
        if match := re.match(r" *loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)$", line):
            start, step, limit = map(int, match.groups())
            due = max(-(-(limit - start) // step), 0)
        elif re.match(r" *loop: |.*// DoWhile loop", line):
            due = None
        elif (match := re.match(r" *\$region(\d+): .*// loop_body", line)) and due is not None:
            trips[int(match[1])] = due
            due = None
    return trips


def _spans(
    bundles: list[_Bundle], scalars: Scalars, trips: dict[int, int], delayed: int
) -> list[_Span]:
    """Returns what branches repeat or skip, outer spans before those in them."""
    starts = {number: index for index, bundle in enumerate(bundles) for number in bundle.starts}
    spans = []
    for index, bundle in enumerate(bundles):
        for instruction in bundle.instructions:
            if not (match := _BRANCH.search(instruction.text)):
                continue
            number = int(match[1])
            # What is not there is empty, after the last bundle.
            target, after = starts.get(number, len(bundles)), _after(bundles, index, delayed)
            if target <= index:
                counter = scalars.counter(instruction.text)
                count = len(counter.values) if counter else trips.get(number)
                is_grid = bundles[target].is_grid
                spans.append(
                    _Span(target, after, "loop", instruction, count, counter, is_grid=is_grid)
                )
            elif after < target:
                spans.append(_Span(after, target, "branch", instruction))
    return sorted(spans, key=lambda span: (span.start, -span.stop, span.kind))


def _after(bundles: list[_Bundle], index: int, delayed: int) -> int:
    """Returns the bundle that is the first to be skipped where the branch at `index` is taken."""
    depth = bundles[index].depth
    after = index + 1
    while after < min(len(bundles), index + 1 + delayed) and not bundles[after].is_target:
        if delayed > 4 and bundles[after].instructions and bundles[after].depth < depth:
            break
        after += 1
    return after


@dataclass(frozen=True)
class _Builder:
    bundles: list[_Bundle]
    uses: list[dict[str, int]]
    scalars: Scalars
    spans: list[_Span]
    names: SourceNames

    def region(
        self, span: _Span, spans: list[_Span], path: str, name: str, reached: Counter | None
    ) -> Region:
        """Returns the region of `span`, of which `spans` are all others that lie in it.

        `reached` is for which counts of the innermost loop around it the region is reached.
        """
        share = None
        if span.counter:
            reached = span.counter
        elif span.kind == "loop":
            reached = None
        elif reached and (taken := self._taken(span.branch.text, reached)) is not None:
            share = len(taken.values) / max(len(reached.values), 1)
            reached = taken
        parts, names, own = [], collections.Counter[str](), set(range(span.start, span.stop))
        rest = spans
        while rest:
            first, rest = rest[0], rest[1:]
            inner = [other for other in rest if other.start < first.stop]
            rest = rest[len(inner) :]
            if any(other.stop > first.stop for other in inner):
                raise AnalysisError(f"got branches that cross at bundle {first.start:#x}")
            if self._is_guard(first):
                # Sorted as they were: all of `inner` starts before `rest`.
                rest = [*inner, *rest]
                continue
            part = self._name(first)
            names[part] += 1
            part_name = part if names[part] == 1 else f"{part}#{names[part]}"
            part_path = f"{path}/{part_name}" if path else part_name
            parts.append(self.region(first, inner, part_path, part, reached))
            own -= set(range(first.start, first.stop))
        return Region(
            path=path,
            name=name,
            kind=span.kind,
            trips=span.trips,
            share=share,
            own=self._work(sorted(own)),
            functions=self._functions(sorted(own)),
            parts=tuple(parts),
        )

    def _taken(self, branch: str, reached: Counter) -> Counter | None:
        """Returns for which counts of the loop `branch` does not skip; None where others decide."""
        skipped = [self.scalars.is_skipped(branch, reached, value) for value in reached.values]
        if None in skipped:
            return None
        pairs = zip(reached.values, skipped, strict=True)
        return Counter(reached.name, [value for value, is_skipped in pairs if not is_skipped])

    def _is_guard(self, span: _Span) -> bool:
        """Whether the branch only skips a loop that runs no time."""
        places = span.branch.places if span.kind == "branch" else ()
        kinds = [(self.names.bodies(p, "branch"), self.names.bodies(p, "loop")) for p in places]
        return any(loops and not branches for branches, loops in kinds)

    def _name(self, span: _Span) -> str:
        if span.is_grid:
            return "grid"
        for place in span.branch.places:
            bodies = self.names.bodies(place, span.kind)
            if len(bodies) == 1:
                return bodies[0]
            # Of several branches it is the one that has the most of its instructions here.
            rivals = [other for other in self.spans if other.branch.places == span.branch.places]
            shares = {
                body: self._count(span, body) / max(sum(self._count(o, body) for o in rivals), 1)
                for body in bodies
            }
            if shares and max(shares.values()):
                return max(shares, key=lambda body: shares[body])
        return "loop" if span.kind == "loop" else "if"

    def _count(self, span: _Span, body: str) -> int:
        functions = self._functions(range(span.start, span.stop))
        return sum(count for name, count in functions.items() if body in name.split("."))

    def _functions(self, indices: Iterable[int]) -> dict[str, int]:
        counts = collections.Counter(
            function
            for index in indices
            for instruction in self.bundles[index].instructions
            for place in instruction.places[:1]
            if (function := self.names.function(place))
        )
        return dict(counts)

    def _work(self, indices: list[int]) -> Work:
        slots = collections.Counter[str]()
        for index in indices:
            slots.update(self.uses[index])
        fills, spills = slots.pop(_FILLS, 0), slots.pop(_SPILLS, 0)
        dmas = collections.Counter(
            dma
            for index in indices
            for instruction in self.bundles[index].instructions
            if (dma := _dma(instruction.text))
        )
        return Work(
            bundles=len(indices),
            slots=dict(slots),
            fills=fills,
            spills=spills,
            dmas=tuple(
                Dma(kind=kind, num_bytes=num_bytes, count=count)
                for (kind, num_bytes), count in dmas.items()
            ),
        )


def _dma(text: str) -> tuple[str, int | None] | None:
    if not (match := _DMA.search(text)):
        return None
    size = _SIZE.search(text)
    is_known = size is not None and size[1].isdigit()
    return match[1], int(size[1]) * _GRANULE if size and is_known else None
