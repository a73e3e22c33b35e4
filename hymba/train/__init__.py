"""Training: text to tokens to rows (data), steps (run, optim), going on (resume), and the record
of it (metrics). Read them in that order; `run` is the centre."""

from hymba.train.optim import AdamWConfig, Schedule
from hymba.train.resume import CheckpointError
from hymba.train.run import Result, TrainConfig, Trainer, TrainError
from hymba.train.sources import DataError, python_library, split
from hymba.train.store import TokenStore, prepare

__all__ = [
    "AdamWConfig",
    "CheckpointError",
    "DataError",
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
