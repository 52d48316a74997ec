"""Whether the pages are accounted for: run by tests after each engine test, and by the operator."""

from collections import Counter
from collections.abc import Collection, Iterable
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


def audit(pools: Collection[PagePool], owners: Iterable[Sequence], num_leased: int) -> PageAudit:
    """Compares the reference counts of each shard's pool with what the sequences hold."""
    held = Counter((sequence.shard, page) for sequence in owners for page in sequence.pages)
    counted = {
        (shard, page): count
        for shard, pool in enumerate(pools)
        for page, count in pool.references().items()
    }
    problems = [
        f"page {page} of shard {shard} has {counted.get((shard, page), 0)} references and"
        f" {held.get((shard, page), 0)} owners"
        for shard, page in sorted(held.keys() | counted.keys())
        if counted.get((shard, page), 0) != held.get((shard, page), 0)
    ]
    for shard, pool in enumerate(pools):
        num_used = len(pool.references())
        if pool.num_free + num_used != pool.num_pages:
            problems.append(
                f"{pool.num_free} pages of shard {shard} are free and {num_used} in use, of"
                f" {pool.num_pages}"
            )
    return PageAudit(
        free=sum(pool.num_free for pool in pools),
        used=len(counted) - num_leased,
        leased=num_leased,
        total=sum(pool.num_pages for pool in pools),
        problems=tuple(problems),
    )
