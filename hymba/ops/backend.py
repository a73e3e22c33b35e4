"""Which implementation serves an op, chosen once a device and said once.

    "reference"   the slow and obvious twin, for checking
    "torch"       plain PyTorch, fast on a CPU and correct on any device (the default)

HYMBA_BACKEND=reference overrides. GPU kernels are a third name here when they come; a device
without them (Apple, AMD, older NVIDIA) keeps "torch" and is told so once.
"""

from __future__ import annotations

import logging
import os
from functools import cache

BACKENDS = ("torch", "reference")
log = logging.getLogger("hymba")


@cache
def backend(device_type: str) -> str:
    """The backend for tensors on such a device ("cpu", "cuda", "mps")."""
    asked = os.environ.get("HYMBA_BACKEND", "torch")
    if asked not in BACKENDS:
        raise ValueError(f"HYMBA_BACKEND={asked!r} is not one of {', '.join(BACKENDS)}")
    if device_type != "cpu":
        log.warning("hymba: no kernels for %s in this version; using plain PyTorch", device_type)
    return asked
