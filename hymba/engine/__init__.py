"""Running a model: what to sample, and the loop that generates."""

from hymba.engine.loop import generate, stream
from hymba.engine.request import Completion
from hymba.engine.sampling import Sampling

__all__ = ["Completion", "Sampling", "generate", "stream"]
