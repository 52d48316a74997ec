"""The page pool against a plain model of it, over random operations."""

from collections import Counter

import pytest

from pallasite.engine.page_pool import PagePool


def test_random_operations_do_what_a_plain_model_says(rng, repetitions, figures):
    num_operations = repetitions(20_000, 200_000)
    num_pages = 61
    pool = PagePool(num_pages)
    owned: list[list[int]] = []
    counts: Counter[int] = Counter()
    done: Counter[str] = Counter()

    def allocate():
        count = int(rng.integers(0, 12))
        pages = pool.allocate(count)
        if count > num_pages - len(counts):
            assert pages is None
            done["refused"] += 1
            return
        assert len(pages) == len(set(pages)) == count
        assert not counts.keys() & set(pages), "a page with owners is given again"
        assert set(pages) <= set(range(num_pages))
        counts.update(pages)
        owned.append(pages)

    def share():
        pages = owned[int(rng.integers(len(owned)))] if owned else []
        some = pages[: int(rng.integers(0, len(pages) + 1))]
        assert pool.share(some) == some
        counts.update(some)
        owned.append(some)

    def release():
        if owned:
            pages = owned.pop(int(rng.integers(len(owned))))
            pool.release(pages)
            counts.subtract(pages)
            for page in set(pages):
                if counts[page] == 0:
                    del counts[page]

    def free_twice():
        free = [page for page in range(num_pages) if page not in counts]
        if free:
            page = free[int(rng.integers(len(free)))]
            operation = pool.release if rng.random() < 0.5 else pool.share
            with pytest.raises(ValueError, match="free"):
                operation([page])

    operations = [allocate, share, release, release, free_twice]
    for _ in range(num_operations):
        operation = operations[int(rng.integers(len(operations)))]
        operation()
        done[operation.__name__] += 1
        assert pool.num_free == num_pages - len(counts)
        assert pool.references() == counts
    assert min(done.values()) > num_operations // 100
    for pages in owned:
        pool.release(pages)
    assert pool.num_free == num_pages
    figures(operations=num_operations, divergences=0, **done)
