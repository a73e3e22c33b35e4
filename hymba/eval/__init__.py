"""Evaluation: what a model can do, measured. recall.py: synthetic tasks, exactly scored."""

from hymba.eval.recall import (
    MQAR,
    TASKS,
    Induction,
    Needle,
    Phonebook,
    RecallError,
    RecallRows,
    Score,
    SelectiveCopy,
    Task,
    score,
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
