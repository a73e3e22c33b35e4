"""Evaluation: what a model can do, measured. tasks.py: synthetic recall tasks; recall.py: rows of
them for the Trainer, exactly scored."""

from hymba.eval.recall import RecallRows, Score, score
from hymba.eval.tasks import (
    MQAR,
    TASKS,
    Induction,
    Needle,
    Phonebook,
    RecallError,
    SelectiveCopy,
    Task,
)

__all__ = [
    "MQAR",
    "TASKS",
    "Induction",
    "Needle",
    "Phonebook",
    "RecallError",
    "RecallRows",
    "Score",
    "SelectiveCopy",
    "Task",
    "score",
]
