"""Which pages of the cache are free, and how many owners each of the others has."""

from collections.abc import Sequence


class PagePool:
    """Counts references to pages 0 to num_pages - 1; a page is free where it has none."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` free pages, one reference each, or none at all and returns None."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """Adds a reference to each page, and returns them. Raises ValueError on a free one."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is shared but free")
        for page in pages:
            self._references[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Takes a reference from each page. Raises ValueError on one that has none."""
        for page in pages:
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released but free")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def references(self) -> dict[int, int]:
        """Returns the count of each page that has any, for the audit."""
        return {page: count for page, count in enumerate(self._references) if count}
