"""Running a model: what to sample, the engine, and the simple loop that it is measured against."""

from hymba.engine.engine import Engine, QueueFull, Stats
from hymba.engine.limits import Limits
from hymba.engine.llm import LLM
from hymba.engine.loop import generate, stream
from hymba.engine.request import Completion, Delta, Logprob, Output, Request
from hymba.engine.sampling import Sampling

__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "Engine",
    "Limits",
    "Logprob",
    "Output",
    "QueueFull",
    "Request",
    "Sampling",
    "Stats",
    "generate",
    "stream",
]
