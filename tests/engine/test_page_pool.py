"""The page pool's rules, one by one. tests/reliability/ has random operations by the thousand."""

import pytest

from pallasite.engine.page_pool import PagePool


def test_all_pages_are_free_at_first_and_each_is_given_once():
    pool = PagePool(7)
    assert pool.num_free == 7
    pages = pool.allocate(7)
    assert sorted(pages) == list(range(7))
    assert pool.num_free == 0
    assert pool.references() == dict.fromkeys(range(7), 1)


def test_an_allocation_takes_all_that_it_asks_for_or_nothing():
    pool = PagePool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    first = pool.allocate(3)
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.references() == dict.fromkeys(first, 1)
    assert pool.allocate(0) == []


def test_a_shared_page_is_free_once_its_last_owner_releases_it():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    assert pool.share([page]) == [page]
    assert pool.share([page]) == [page]
    assert pool.references() == {page: 3}
    for left in (2, 1):
        pool.release([page])
        assert pool.references() == {page: left}
        assert pool.num_free == 1
    pool.release([page])
    assert pool.references() == {}
    assert pool.num_free == 2


def test_a_double_free_raises_and_frees_nothing_twice():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is released but free"):
        pool.release([pages[0]])
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_sharing_a_free_page_raises_and_shares_none_of_the_others():
    pool = PagePool(3)
    [held] = pool.allocate(1)
    free = next(page for page in range(3) if page != held)
    with pytest.raises(ValueError, match=f"page {free} is shared but free"):
        pool.share([held, free])
    assert pool.references() == {held: 1}
