"""Training: text to tokens to rows (data), steps (run, optim), going on (resume), and the record
of it (metrics). Read them in that order; `run` is the centre."""

from hymba.train.config import Extension, TrainConfig, TrainError
from hymba.train.optim import OptimConfig, Schedule
from hymba.train.resume import CheckpointError
from hymba.train.run import Result, Trainer
from hymba.train.sources import DataError, python_library, split
from hymba.train.store import TokenStore, prepare

__all__ = [
    "CheckpointError",
    "DataError",
    "Extension",
    "OptimConfig",
    "Result",
    "Schedule",
    "TokenStore",
    "TrainConfig",
    "TrainError",
    "Trainer",
    "prepare",
    "python_library",
    "split",
]
