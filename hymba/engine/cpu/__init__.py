"""Decode steps on a CPU, for packed weights, without torch: one compiled function a step.

In reading order: layout (what a step is told), program (a model and its store as that), step (the
phases), then what they are made of: rows, product, attention, ssm, mlp, vectors. These need numba.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hymba.engine.store import Store
from hymba.model.decoder import LanguageModel

if TYPE_CHECKING:
    from hymba.engine.cpu.program import Program

log = logging.getLogger("hymba")


def program(model: LanguageModel, store: Store) -> Program | None:
    """The compiled step of a model and a store; None where torch does it (`program.why_not`)."""
    if model.device.type != "cpu" or not kernels_run():
        return None
    from hymba.engine.cpu.program import Program, why_not

    if reason := why_not(model, store):
        log.debug("hymba: decode steps by torch: %s", reason)
        return None
    return Program(model, store)


def kernels_run() -> bool:
    """Whether there are compiled kernels for this CPU, and nothing else was asked for."""
    if os.environ.get("HYMBA_BACKEND") or find_spec("numba") is None:
        return False
    from hymba.ops.cpu.simd import unsupported

    return not unsupported()
