"""Kept beginnings: the longest that fits is found, the least recently used goes, bytes add up."""

from __future__ import annotations

import random
from os.path import commonprefix
from typing import Any

import pytest

from hymba.engine.prefix import REMEMBERED, Prefixes


@pytest.mark.parametrize("limit", [8, 25, 10_000])
def test_as_a_list_would_do_it(limit: int) -> None:
    """The twin is a list of tokens, the least recently used first. Many begin alike."""
    draw, hits, gone_by = random.Random(limit), 0, 0
    prefixes, twin = Prefixes(limit, shortest=2), list[list[int]]()
    for _ in range(2000):
        move = draw.choice(["put", "find", "find", "get", "shed"])
        tokens = [0] * draw.randrange(5) + draw.choices([0, 1], k=draw.randrange(4))
        n = len(tokens)
        if move == "put" and tokens not in twin:
            prefixes.put([*tokens, 7, 7], n, n + 1, kept=list(tokens))
            twin.append(tokens)
        elif move == "get":
            entry = prefixes.get(tokens, n)
            assert (entry is not None) == (tokens in twin)
        elif move == "find":
            fits = [t for t in twin if t and t == tokens[: len(t)] and len(t) <= n - 1]
            want = max(fits, key=len, default=None)
            entry = prefixes.find(tokens, n - 1)
            assert (entry.kept if entry else None) == want
            tokens = want if want is not None else [9]
            hits += want is not None
        elif move == "shed":
            gone = prefixes.shed()
            assert gone == twin[: len(gone)]
            del twin[: len(gone)]
            gone_by += len(gone)
            assert prefixes.nbytes <= limit
        if move in ("get", "find") and tokens in twin:
            twin.remove(tokens)
            twin.append(tokens)
        assert len(prefixes) == len(twin)
        assert prefixes.nbytes == sum(len(t) + 1 for t in twin)
    assert hits > 50 and (gone_by > 100) == (limit < 100)


def put(prefixes: Prefixes, tokens: list[int], nbytes: int = 10) -> Any:
    return prefixes.put(tokens, len(tokens), nbytes, kept=tuple(tokens))


def test_who_is_waited_for_stays() -> None:
    prefixes = Prefixes(limit=15, shortest=1)
    first, second, third = (put(prefixes, [i, i]) for i in range(3))
    first.waiting = third.waiting = 1
    assert prefixes.shed() == [(1, 1)] and prefixes.nbytes == 20  # over the limit, for now
    assert prefixes.evict() is None and second.kept == (1, 1)
    assert prefixes.evict(all_of_them=True) == (0, 0)
    third.waiting = 0
    assert prefixes.evict() == (2, 2) and prefixes.evict(all_of_them=True) is None
    assert prefixes.nbytes == len(prefixes) == 0


def test_one_that_went_may_come_again() -> None:
    prefixes = Prefixes(limit=100, shortest=1)
    put(prefixes, [1, 2, 3])
    assert prefixes.evict() == (1, 2, 3) and prefixes.find([1, 2, 3, 4], 3) is None
    put(prefixes, [1, 2, 3])
    found = prefixes.find([1, 2, 3, 4], 3)
    assert found is not None and found.length == 3


def test_a_number_is_not_its_digits() -> None:
    """Tokens are hashed as words of one size: 1, 23 is not 12, 3, nor 256 the bytes 0 and 1."""
    prefixes = Prefixes(limit=100, shortest=1)
    put(prefixes, [1, 23])
    put(prefixes, [256, 0])
    for other in ([12, 3, 0], [123, 0, 0], [0, 256, 0], [0, 1, 0], [1, 24, 0]):
        assert prefixes.find(other, 2) is None


def test_parting() -> None:
    """The longest common beginning with any prompt before; the prompt itself is one from then."""
    prefixes = Prefixes(limit=100, shortest=3)
    assert prefixes.parting([1, 2, 3, 4, 5]) == 0
    assert prefixes.parting([1, 2, 3, 9]) == 3
    assert prefixes.parting([1, 2, 8, 9]) == 0  # two are too few
    assert prefixes.parting([1, 2, 3, 4, 5]) == 5
    assert prefixes.parting([1, 2, 3, 4, 5, 6]) == 5
    assert prefixes.parting([1, 2, 3, 4]) == 4


def test_parting_forgets_and_repeats_cost_nothing() -> None:
    prefixes = Prefixes(limit=100, shortest=3)
    prefixes.parting([5, 5, 5, 5])
    for number in range(REMEMBERED - 1):
        prefixes.parting([number, 1])
        prefixes.parting([number, 1])  # the same again takes no place
    assert prefixes.parting([5, 5, 5, 6]) == 3  # and pushes [5, 5, 5, 5] out
    assert prefixes.parting([5, 5, 5, 5]) == 3


def test_parting_by_halving_is_parting_by_looking() -> None:
    draw = random.Random(0)
    prefixes, before = Prefixes(limit=100, shortest=1), list[list[int]]()
    for _ in range(60):
        tokens = draw.choices([0, 1], k=draw.randrange(1, 20))
        common = [len(commonprefix([tokens, other])) for other in before]
        assert prefixes.parting(tokens) == max(common, default=0)
        before.append(tokens)
