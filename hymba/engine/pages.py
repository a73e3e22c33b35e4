"""Which pages of the cache belong to whom: a free list with counts of owners. No torch here.

A page holds the keys and values of KV_BLOCK tokens in every layer without a window. Sequences that
begin alike own their full pages together; nobody writes to a page that has two owners, because a
sequence writes at its end only, and its last page is always its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class Pages:
    """Pages 0 .. count-1; the lowest free ones are taken first, so that memory which the system
    gives out by touch follows what is used."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count))  # a heap
        self._owners = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens lies in."""
        return -(-tokens // self.size) if self.count else 0

    def owners(self, page: int) -> int:
        return self._owners[page]

    def take(self, count: int) -> list[int]:
        """So many fresh pages. MemoryError, nothing taken, where there are not as many."""
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} free")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One owner more of each."""
        for page in pages:
            self._owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One owner less of each; free without any."""
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                heapq.heappush(self._free, page)
