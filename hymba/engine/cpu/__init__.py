"""Decode steps on a CPU, for packed weights, without torch: one compiled function a step.

In reading order: layout (what a step is told), program (a model and its store as that), step (the
phases), then what they are made of: rows, product, attention, ssm, mlp, vectors. These need numba.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hymba.engine.store import Store
from hymba.model.decoder import LanguageModel
from hymba.ops.backend import backend

if TYPE_CHECKING:
    from hymba.engine.cpu.program import Program

log = logging.getLogger("hymba")


def program(model: LanguageModel, store: Store) -> Program | None:
    """The compiled step of a model and a store; None where torch does it (`program.why_not`)."""
    if backend(model.device.type) != "numba":
        return None
    from hymba.engine.cpu.program import Program, why_not

    if reason := why_not(model, store):
        log.debug("hymba: decode steps by torch: %s", reason)
        return None
    return Program(model, store)
