"""Pages: every one is free or owned, never both, whoever comes and goes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba.engine.pages import Pages


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "leave"]), st.integers(0, 9))))
def test_owners(moves: list[tuple[str, int]]) -> None:
    pages, holders = Pages(8, 4), list[list[int]]()
    for move, number in moves:
        if move == "take" and number <= pages.free:
            holders.append(pages.take(number))
        elif move == "take":
            before = pages.free
            with pytest.raises(MemoryError):
                pages.take(number)
            assert pages.free == before
        elif holders and move == "share":
            holders.append(list(holders[number % len(holders)]))
            pages.share(holders[-1])
        elif holders:
            pages.give_back(holders.pop(number % len(holders)))
        owners = Counter(page for holder in holders for page in holder)
        assert [owners[page] for page in range(8)] == pages._owners
        assert sorted(pages._free) == [page for page in range(8) if not owners[page]]
        assert pages.free + pages.used == 8


def test_the_lowest_first() -> None:
    pages = Pages(6, 4)
    assert pages.take(4) == [0, 1, 2, 3]
    pages.give_back([0])
    pages.give_back([2])
    assert pages.take(3) == [0, 2, 4]


def test_needed() -> None:
    assert [Pages(9, 4).needed(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert Pages(0, 4).needed(9) == 0  # a model without pages
