"""What a TPU kernel's machine code does, region by region, and how often.

A bundle is one instruction word of the core: what its slots hold is issued in one cycle, unless
the core stalls. Figures here count bundles, so they are a lower bound of cycles: waits for DMAs,
for results of the matrix and transcendental units and for memory banks are not included. On a
v7x one empty bundle may stand for several cycles in which nothing is issued, after a branch mostly.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Number = int | float


@dataclass(frozen=True, kw_only=True)
class Dma:
    """Copies that a region starts; waits are not counted.

    Attributes:
        kind: from where to where, such as hbm_to_vmem.
        num_bytes: of each copy; None where it is known only while running.
        count: how many.
    """

    kind: str
    num_bytes: int | None
    count: Number


@dataclass(frozen=True, kw_only=True)
class Work:
    """Instructions of a region, or of several, weighted.

    One that a predicate may suppress counts as if it were executed, copies too.

    Attributes:
        bundles: instruction words.
        slots: instructions by unit: MXU, XLU, VALU, VPOP, EUP, VLOAD, VSTORE, SALU.
        fills: vector registers read back from memory for want of registers, among VLOAD.
        spills: vector registers written to memory for want of registers, among VSTORE.
        dmas: copies started.
    """

    bundles: Number = 0
    slots: dict[str, Number] = field(default_factory=dict)
    fills: Number = 0
    spills: Number = 0
    dmas: tuple[Dma, ...] = ()

    @property
    def num_dmas(self) -> Number:
        """How many copies are started."""
        return sum(dma.count for dma in self.dmas)

    @property
    def dma_bytes(self) -> Number:
        """Bytes of all copies; raises ValueError where a size is not known."""
        unknown = {dma.kind for dma in self.dmas if dma.num_bytes is None}
        if unknown:
            raise ValueError(f"got copies of unknown size: {', '.join(sorted(unknown))}")
        return sum(dma.count * (dma.num_bytes or 0) for dma in self.dmas)

    def scaled(self, factor: Number) -> "Work":
        """Returns the work done `factor` times."""
        return Work(
            bundles=self.bundles * factor,
            slots={name: count * factor for name, count in self.slots.items()},
            fills=self.fills * factor,
            spills=self.spills * factor,
            dmas=tuple(
                Dma(kind=dma.kind, num_bytes=dma.num_bytes, count=dma.count * factor)
                for dma in self.dmas
            ),
        )

    def __add__(self, other: "Work") -> "Work":
        names = self.slots | other.slots
        counts: dict[tuple[str, int | None], Number] = {}
        for dma in (*self.dmas, *other.dmas):
            key = dma.kind, dma.num_bytes
            counts[key] = counts.get(key, 0) + dma.count
        return Work(
            bundles=self.bundles + other.bundles,
            slots={n: self.slots.get(n, 0) + other.slots.get(n, 0) for n in names},
            fills=self.fills + other.fills,
            spills=self.spills + other.spills,
            dmas=tuple(
                Dma(kind=kind, num_bytes=num_bytes, count=count)
                for (kind, num_bytes), count in counts.items()
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Region:
    """A loop's body, what a branch may skip, or the whole kernel.

    Attributes:
        path: names from the kernel's own function down, joined by "/"; "" of the kernel itself. A
            sibling of the same name gets #2, #3 and so on.
        name: the Python function that is the body; "grid" is the loop over the grid, "loop" and
            "if" are what the compiler made of itself.
        kind: what repeats or skips it.
        trips: of a loop, how often it runs, where the program says so. The loop over a grid of n
            steps has n + 2 where the compiler overlaps copies with work.
        share: of a branch, how often it is taken each time it is reached, where that depends on
            a known count alone; None where it does not.
        own: its instructions without those of `parts`, for one pass.
        functions: instructions by the Python function that they were written in, without those of
            `parts`. What a function calls is counted for the callee.
        parts: the regions in it, in order.
    """

    path: str
    name: str
    kind: Literal["kernel", "loop", "branch"]
    trips: int | None
    share: Number | None
    own: Work
    functions: dict[str, int]
    parts: "tuple[Region, ...]" = ()

    @property
    def depth(self) -> int:
        """How many regions it lies in."""
        return self.path.count("/") + 1 if self.path else 0

    def walk(self) -> "Iterator[Region]":
        """Yields this region and all in it, outer ones first."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def find(self, name: str) -> "Region":
        """Returns the region of this path, or whose body is the Python function of this name.

        Where the function is no body of a loop or branch, it is the region that most of the
        function's instructions are in.

        Raises ValueError where there is none, or several.
        """
        found = [region for region in self.walk() if name in (region.path, region.name)]
        if not found:
            counts = {
                region.path: sum(n for f, n in region.functions.items() if _is_named(f, name))
                for region in self.walk()
            }
            most = max(counts.values())
            found = [region for region in self.walk() if most and counts[region.path] == most]
        if len(found) == 1:
            return found[0]
        paths = [region.path for region in found or self.walk() if region.path]
        raise ValueError(
            f"got {name!r}, the name of {len(found)} regions; "
            + (f"name one by its path: {', '.join(paths)}" if paths else "it has no regions")
        )

    def weighted(self, trips: Mapping[str, Number] | None = None) -> Work:
        """Returns the work of one pass through this region and all in it.

        `trips` says by path or name how often a loop runs each time it is reached, or which share
        of the times a branch is taken. A name stands for all regions of that name. What the
        program says needs none; a branch of whose share neither says counts as always taken.

        Raises ValueError for a loop whose count nobody says, and for a name of no region.
        """
        given = dict(trips or {})
        names = {key for region in self.walk() for key in (region.path, region.name)}
        if unknown := given.keys() - names:
            raise ValueError(
                f"got trips for {', '.join(sorted(unknown))}; the regions are"
                f" {', '.join(region.path for region in self.walk() if region.path)}"
            )
        return self._weighted(given)

    def _weighted(self, given: dict[str, Number]) -> Work:
        work = self.own
        for part in self.parts:
            work += part._weighted(given).scaled(_weight(part, given))
        return work


def _weight(region: Region, given: dict[str, Number]) -> Number:
    for key in (region.path, region.name):
        if key in given:
            return given[key]
    if region.kind == "branch":
        return 1 if region.share is None else region.share
    if region.trips is None:
        raise ValueError(f"got no trip count for the loop {region.path!r}; the program says none")
    return region.trips


def _is_named(function: str, name: str) -> bool:
    return function == name or function.endswith("." + name)
