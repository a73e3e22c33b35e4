"""Recall: a model trained on one task, tested on the task's grid."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

from hymba.eval.recall import RecallRows, score
from hymba.lab.sizes import Size
from hymba.lab.tasks import LESSONS
from hymba.lab.training import Device, Trained
from hymba.train.rows import Packed

AT_ONCE = 16384  # tokens of a forward


class Remembered(RecallRows):
    """Rows that many variants read one after the other, drawn once."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._drawn: dict[int, Packed] = {}

    def row(self, number: int) -> Packed:
        if number not in self._drawn:
            self._drawn[number] = super().row(number)
        return self._drawn[number]


@lru_cache(maxsize=1)
def rows(task: str, size: Size, seed: int) -> Remembered:
    """What a model of this seed is trained on; the same for all variants."""
    length = size.recall.sequence_length
    return Remembered(LESSONS[task].train(length), seed=seed, sequence_length=length)


def measure(trained: Trained, task: str, size: Size, device: Device) -> dict[str, Any]:
    """Every point of the grid, on the same test rows for every variant and seed."""
    found = []
    for point in LESSONS[task].test(size.recall.sequence_length):
        test = RecallRows((point.task,), seed=0, side="test")
        at_once = max(1, AT_ONCE // point.task.length)
        got = score(trained.model, test, size.test_rows, at_once, device.precision)
        found.append(
            {
                "at": point.at,
                "beyond": point.beyond,
                "chance": point.task.chance,
                **asdict(got),
            }
        )
    return {
        "recall": _mean([p["token_accuracy"] for p in found if not p["beyond"]]),
        "beyond": _mean([p["token_accuracy"] for p in found if p["beyond"]]),
        "points": found,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
