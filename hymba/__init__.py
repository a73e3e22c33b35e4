"""Hymba: attention and state-space heads side by side in every layer.

    import hymba                                          # light: no torch yet
    config = hymba.Config.preset("hymba-1.5b")            # still none
    model = hymba.load("folder or hub id", device="cpu")  # a torch.nn.Module
    llm = hymba.LLM("folder or hub id")                   # a model that answers many prompts

Names load the module behind them when first used, so that `hymba --help` answers at once.
`import hymba.hf` tells transformers' Auto classes about the model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba.config import Config as Config
    from hymba.engine import LLM as LLM
    from hymba.engine import Limits as Limits
    from hymba.engine import Sampling as Sampling
    from hymba.engine import generate as generate
    from hymba.weights import load as load
    from hymba.weights import save as save

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here

_HOME = {
    "Config": "hymba.config",
    "load": "hymba.weights",
    "save": "hymba.weights",
    "LLM": "hymba.engine",
    "Limits": "hymba.engine",
    "Sampling": "hymba.engine",
    "generate": "hymba.engine",
}
__all__ = ["LLM", "Config", "Limits", "Sampling", "__version__", "generate", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hymba' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
