"""Recall in the laboratory: rows that are trained on, and the grid that is tested.

With L the training length: training mixes rows of L/4, L/2 and L; tests go from there to 4 L, to
more pairs or items than were ever trained, and to gaps longer than the window. A point `beyond`
training is counted apart: what is asked there was never shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hymba.eval.tasks import MQAR, TASKS, Induction, Needle, Phonebook, SelectiveCopy, Task

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Point:
    """One place of the grid: a task, and the axes it differs in."""

    task: Task
    at: dict[str, float]
    beyond: bool


@dataclass(frozen=True)
class Lesson:
    """A task of the laboratory: which rows a length is trained on, and the grid."""

    train: Callable[[int], list[Task]]
    test: Callable[[int], list[Point]]


def _mqar(length: int) -> list[Task]:
    return [MQAR(n, pairs=n // 8) for n in _thirds(length)]


def _mqar_grid(length: int) -> list[Point]:
    few = length // 32
    by_pairs = [few, 2 * few, 4 * few, 8 * few]
    found = [_at(MQAR(n, pairs=few), length, length=n, pairs=few) for n in _longer(length)]
    for pairs in by_pairs[1:]:
        task = MQAR(length, pairs=pairs)
        found.append(Point(task, {"length": length, "pairs": pairs}, pairs > length // 8))
    gap = MQAR(length, pairs=few, gap=length // 2)
    return [*found, _at(gap, length, length=length, pairs=few, gap=length // 2)]


def _phonebook(length: int) -> list[Task]:
    return [_book(n) for n in _thirds(length)]


def _book(length: int) -> Phonebook:
    return Phonebook(length, questions=max(1, length // 32))


def _phonebook_grid(length: int) -> list[Point]:
    tasks = [Phonebook(n, questions=max(1, length // 64)) for n in _longer(length)[1:]]
    return [_at(t, length, length=t.length, entries=t.entries) for t in tasks]


def _needle(length: int) -> list[Task]:
    return [_hay(length // 2, length), _hay(length, length)]


def _hay(length: int, trained: int, depth: float | None = None) -> Needle:
    return Needle(length, depth=depth, others=3 if trained >= 128 else 1, value_tokens=2)


def _needle_grid(length: int) -> list[Point]:
    return [
        _at(_hay(n, length, depth), length, length=n, depth=depth)
        for n in _longer(length)[1:]
        for depth in DEPTHS
    ]


def _copy(length: int) -> list[Task]:
    return [SelectiveCopy(n, items=min(16, n // 4)) for n in _thirds(length)]


def _copy_grid(length: int) -> list[Point]:
    most = min(16, length // 4)
    found = [
        _at(SelectiveCopy(n, items=most), length, length=n, items=most) for n in _longer(length)[1:]
    ]
    for items in (most // 2, 2 * most):
        task = SelectiveCopy(length, items=items)
        found.append(Point(task, {"length": length, "items": items}, items > most))
    return found


def _induction(length: int) -> list[Task]:
    return [Induction(n, symbols=2 * length) for n in _thirds(length)]


def _induction_grid(length: int) -> list[Point]:
    tasks = [Induction(n, symbols=2 * length) for n in _longer(length)]
    return [_at(task, length, length=task.length) for task in tasks]


def _thirds(length: int) -> tuple[int, int, int]:
    return length // 4, length // 2, length


def _longer(length: int) -> tuple[int, ...]:
    """From a quarter of what was trained to four times it."""
    return length // 4, length // 2, length, 2 * length, 4 * length


def _at(task: Task, trained: int, **axes: Any) -> Point:
    return Point(task, axes, task.length > trained)


LESSONS = {
    "mqar": Lesson(_mqar, _mqar_grid),
    "phonebook": Lesson(_phonebook, _phonebook_grid),
    "needle": Lesson(_needle, _needle_grid),
    "copy": Lesson(_copy, _copy_grid),
    "induction": Lesson(_induction, _induction_grid),
}
assert LESSONS.keys() == TASKS.keys()


def vocab_size(name: str, length: int) -> int:
    """Ids of a task, trained and tested."""
    lesson = LESSONS[name]
    tasks = [*lesson.train(length), *(point.task for point in lesson.test(length))]
    return max(task.vocab_size for task in tasks)
