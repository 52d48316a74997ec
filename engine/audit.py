"""Whether the pages are accounted for: run by tests after each engine test, and by the operator."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pallasite.engine.page_pool import PagePool
from pallasite.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class PageAudit:
    """Whose the pages are; `problems` says where the counts contradict each other."""

    free: int
    used: int
    leased: int
    total: int
    problems: tuple[str, ...] = ()


def audit(pool: PagePool, owners: Iterable[Sequence], num_leased: int) -> PageAudit:
    """Compares the pool's reference counts with what the sequences hold."""
    held = Counter(page for sequence in owners for page in sequence.pages)
    counted = pool.references()
    problems = [
        f"page {page} has {counted.get(page, 0)} references and {held.get(page, 0)} owners"
        for page in sorted(held.keys() | counted.keys())
        if counted.get(page, 0) != held.get(page, 0)
    ]
    if pool.num_free + len(counted) != pool.num_pages:
        problems.append(
            f"{pool.num_free} pages are free and {len(counted)} in use, of {pool.num_pages}"
        )
    return PageAudit(
        free=pool.num_free,
        used=len(counted) - num_leased,
        leased=num_leased,
        total=pool.num_pages,
        problems=tuple(problems),
    )
