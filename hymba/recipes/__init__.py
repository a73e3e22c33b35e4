"""A run is a Python function that returns its settings (TrainConfig); a variant is base plus one
line. `hymba train NAME` runs one of RECIPES, `hymba train file.py:function` one of the user's."""

from __future__ import annotations

import difflib
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.train.config import TrainConfig

# name: (where, what it is)
RECIPES = {
    "tiny": ("hymba.recipes.pretrain:tiny", "a small hybrid on Python's own sources, on a CPU"),
    "hymba-125m": ("hymba.recipes.pretrain:hymba_125m", "10B tokens, one GPU for days"),
    "hymba-350m": ("hymba.recipes.pretrain:hymba_350m", "20B tokens, several GPUs"),
    "hymba-1.5b": ("hymba.recipes.pretrain:hymba_1b5", "the paper's run: 1.5T tokens"),
    "llama-125m": ("hymba.recipes.pretrain:llama_125m", "attention alone, as large as hymba-125m"),
}


def recipe(name: str) -> TrainConfig:
    """What the recipe called `name` returns; `name` may be file.py:function. UserError if there is
    none."""
    if name in RECIPES:
        module, function = RECIPES[name][0].split(":")
        found: TrainConfig = getattr(import_module(module), function)()
        return found
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _of_file(Path(path), function)
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(RECIPES)}"
    raise UserError(f"no recipe is called {name!r}; {hint} (or file.py:function of your own)")


def _of_file(path: Path, function: str) -> TrainConfig:
    from hymba.train.config import TrainConfig

    if not path.is_file():
        raise UserError(f"{path} does not exist: a recipe of your own is file.py:function")
    # As `python file.py` does, for what lies beside it; for good: a function may import late.
    sys.path.insert(0, str(path.resolve().parent))
    names: dict[str, Any] = runpy.run_path(str(path))
    if not callable(names.get(function)):
        raise UserError(f"{path} has no function {function!r}")
    made = names[function]()
    if not isinstance(made, TrainConfig):
        raise UserError(f"{function} of {path} returns {type(made).__name__}, not a TrainConfig")
    return made
