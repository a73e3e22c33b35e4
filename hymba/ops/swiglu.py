"""The gate of an MLP: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> (..., F)."""
    return F.silu(gate) * up
