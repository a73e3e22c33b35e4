"""Training: text to tokens to rows (data), steps (run, optim), going on (resume), several processes
(parallel), and the record of it (metrics). Settings are in config, which needs no torch; names load
the module behind them when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba.train.config import Extension as Extension
    from hymba.train.config import OptimConfig as OptimConfig
    from hymba.train.config import Schedule as Schedule
    from hymba.train.config import TrainConfig as TrainConfig
    from hymba.train.config import TrainError as TrainError
    from hymba.train.data import Data as Data
    from hymba.train.data import DataConfig as DataConfig
    from hymba.train.data import open_data as open_data
    from hymba.train.readers import DataError as DataError
    from hymba.train.resume import CheckpointError as CheckpointError
    from hymba.train.run import Result as Result
    from hymba.train.run import Trainer as Trainer
    from hymba.train.sources import python_library as python_library
    from hymba.train.sources import split as split
    from hymba.train.store import TokenStore as TokenStore
    from hymba.train.store import prepare as prepare

_HOME = {
    "config": ("Extension", "OptimConfig", "Schedule", "TrainConfig", "TrainError"),
    "data": ("Data", "DataConfig", "open_data"),
    "readers": ("DataError",),
    "resume": ("CheckpointError",),
    "run": ("Result", "Trainer"),
    "sources": ("python_library", "split"),
    "store": ("TokenStore", "prepare"),
}
_PLACES = {name: f"hymba.train.{module}" for module, names in _HOME.items() for name in names}
__all__ = sorted(_PLACES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hymba.train' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value
