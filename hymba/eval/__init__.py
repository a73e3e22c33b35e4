"""Evaluation: what a model can do, measured.

tasks, recall                     tokens alone: recall tasks, and rows of them for the Trainer
subject                           any causal language model under test
text_tasks, recall_suite          recall in text; perplexity: by position
harness, branches, run, suites    lm-eval's tasks, through our own batches
probe/                            what the heads do
own                               the suites without a download, as the command runs them
results, tables, figures          what is left of it
"""

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
