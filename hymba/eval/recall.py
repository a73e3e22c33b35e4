"""Recall, measured exactly: rows of tasks (tasks.py) for the Trainer, and a scorer of answers.

rows = RecallRows((MQAR(length=256, pairs=16),), seed=0)       # the Trainer takes them
score(model, RecallRows(rows.tasks, side="test"), count=256)   # Score(token_accuracy=...)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hymba.eval.tasks import RecallError, Side, Task
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops.loss import IGNORE
from hymba.train.rows import Packed


class RecallRows:
    """An endless stream of rows for the Trainer: row i is of task i modulo their number, and holds
    as many of the task's own rows as fill `sequence_length` (the longest task's, unless given),
    each a piece that knows nothing of the others."""

    bytes_per_label = None  # no text

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int = 0,
        side: Side = "train",
        sequence_length: int | None = None,
    ) -> None:
        self.tasks, self.seed, self.side = tuple(tasks), seed, side
        self.sequence_length = sequence_length or max(task.length for task in self.tasks)
        for task in self.tasks:
            if self.sequence_length % task.length:
                raise RecallError(
                    f"rows of {self.sequence_length} tokens cannot be filled with rows of"
                    f" {task.length}: give lengths that divide each other"
                )
        self._most = self.sequence_length // min(task.length for task in self.tasks)

    def row(self, number: int) -> Packed:
        task = self.tasks[number % len(self.tasks)]
        numbers = range(number * self._most, number * self._most + self.pieces(task))
        return Packed.joined([task.row(self.seed, n, self.side) for n in numbers])

    def pieces(self, task: Task) -> int:
        return self.sequence_length // task.length

    @property
    def vocab_size(self) -> int:
        return max(task.vocab_size for task in self.tasks)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": [{"task": task.name, **asdict(task)} for task in self.tasks],
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "side": self.side,
        }

    def epochs(self, rows: int) -> float:
        return 0.0  # no row comes twice


@dataclass(frozen=True)
class Score:
    """How much was right. An answer is right when all its tokens are, each guessed from the true
    ones before it: exactly when greedy decoding would have said the answer."""

    rows: int
    answers: int
    tokens: int
    answer_accuracy: float
    token_accuracy: float


@torch.no_grad()
def score(
    model: LanguageModel,
    rows: RecallRows,
    count: int,
    at_once: int = 16,
    precision: str = "float32",
    first: int = 0,
) -> Score:
    """Over rows `first` .. `first + count - 1`, so many at once; precision as the Trainer's."""
    numbers, found = range(first, first + count), []
    for at in range(0, count, at_once):
        packed = Packed.joined([rows.row(number) for number in numbers[at : at + at_once]])
        found.append(check(model, packed, precision))
    right = torch.cat([part for part, _ in found])
    answer = torch.cat([part for _, part in found])
    return Score(
        rows=count,
        answers=len(answer),
        tokens=len(right),
        answer_accuracy=float(answer.double().mean()),
        token_accuracy=float(right.double().mean()),
    )


def check(
    model: LanguageModel, packed: Packed, precision: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which answer tokens are right, and which answers; in the order of the row."""
    device = model.device
    with _autocast(device, precision):
        hidden = model(packed.tokens.to(device), Batch.of(packed.lengths, device=device))  # (N, D)
        asked = packed.labels != IGNORE
        guesses = model.logits(hidden[asked.to(device)]).argmax(-1).cpu()
    right = guesses == packed.labels[asked]
    return right, torch.tensor([bool(part.all()) for part in right.split(answer_sizes(packed))])


def answer_sizes(packed: Packed) -> list[int]:
    """Tokens of each answer: of each run of labels, a new piece begins a new one."""
    asked = (packed.labels != IGNORE).int()
    starts = torch.zeros_like(asked)
    starts[torch.tensor((0, *packed.lengths[:-1])).cumsum(0)] = 1
    begins = (asked == 1) & ((starts == 1) | (torch.cat([asked.new_zeros(1), asked[:-1]]) == 0))
    number = begins.int().cumsum(0)[asked == 1]
    return torch.bincount(number, minlength=1)[1:].tolist() if len(number) else []


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
