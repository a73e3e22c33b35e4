"""Running a model: what to sample, and the loop that generates."""

from hymba.engine.loop import Completion, generate, stream
from hymba.engine.sampling import Sampling

__all__ = ["Completion", "Sampling", "generate", "stream"]
