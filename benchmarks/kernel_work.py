"""How often each region of a TPU attention kernel runs for one unit of work.

Regions are known by the Python functions that they are made of, and by the compiler's own "if" and
"loop". A `Count` must speak of each loop and branch that is reached, so that a kernel that has been
changed is refused, not miscounted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pallasite.pallas_kernels.compile import Kernel, Region, Work

Number = int | float


_UNNAMED = ("if", "loop")
"""What the compiler calls what it has made of itself."""


class UnknownRegionsError(Exception):
    """A kernel's regions are not those that a count speaks of."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """How often the regions of a kernel run.

    Attributes:
        times: by the last names of a region's path, such as "fetch_next/fetch_some": how often it
            runs each time it is reached, which may be a share. The longest that fits holds. What
            is here and not 0 must be there, but for "if" and "loop", which the compiler makes.
        scale: by what all is multiplied in the end.
        may_lack: what of `times` need not be there, either.
    """

    times: Mapping[str, Number]
    scale: Number = 1
    may_lack: frozenset[str] = frozenset()


def work(kernel: Kernel, region: str, count: Count) -> Work:
    """Returns what a region of the kernel, "" for all of it, does by a count.

    Raises UnknownRegionsError where the count and the kernel do not fit each other.
    """
    if kernel.root is None:
        raise UnknownRegionsError(f"got no regions of {kernel.name}")
    root = find(kernel.root, region)
    times: dict[str, Number] = {}
    used: set[str] = set()
    unknown = []
    for part in _reached(root, count, times, used):
        if part.trips is None and part.share is None and part.path not in times:
            unknown.append(part.path)
    missing = [
        name
        for name, number in count.times.items()
        if number and name not in used | count.may_lack and name.split("/")[-1] not in _UNNAMED
    ]
    if unknown or missing:
        raise UnknownRegionsError(
            f"{kernel.name} has changed: nothing says how often {', '.join(unknown) or 'none'}"
            f" runs, and there is no {', '.join(missing) or 'other'}; mend the counts in"
            " benchmarks/kernel_counts.py"
        )
    done = root.weighted(times).scaled(count.scale)
    # A copy of unknown size that is never made is no copy.
    return Work(
        bundles=done.bundles,
        slots=done.slots,
        fills=done.fills,
        spills=done.spills,
        dmas=tuple(dma for dma in done.dmas if dma.count),
    )


def find(root: Region, name: str) -> Region:
    """Returns the one region whose path ends with these names; "" is the root.

    Raises UnknownRegionsError where there is none, or several.
    """
    if not name:
        return root
    found = [region for region in root.walk() if _ends(region.path, name)]
    if len(found) != 1:
        raise UnknownRegionsError(
            f"got {name!r}, the name of {len(found)} regions of {root.name}; there are"
            f" {', '.join(region.path for region in root.walk() if region.path)}"
        )
    return found[0]


def _reached(
    region: Region, count: Count, times: dict[str, Number], used: set[str]
) -> Iterator[Region]:
    """Yields the parts that are reached, after it has noted in `times` how often.

    Names of `count` that are there at all go to `used`.
    """
    for part in region.parts:
        if fitting := _fitting(part, count):
            times[part.path] = count.times[max(fitting, key=lambda name: name.count("/"))]
            used |= fitting
        yield part
        if times.get(part.path, 1):
            yield from _reached(part, count, times, used)
        else:
            for inner in part.walk():
                times[inner.path] = 0
                used |= _fitting(inner, count)


def _fitting(region: Region, count: Count) -> set[str]:
    return {name for name in count.times if _ends(region.path, name)}


def _ends(path: str, name: str) -> bool:
    """Whether a path's last names are these; the numbers of equal siblings do not matter."""
    names, wanted = [part.partition("#")[0] for part in path.split("/")], name.split("/")
    return names[-len(wanted) :] == wanted
