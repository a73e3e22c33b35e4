"""Wide products: dozens of rows against a whole weight, with what stands behind it.

A decode step of dozens of sequences still reads every weight of the model once, and each number
of it meets as many rows: bytes bound it, where the rows' tiles stay out of their way.

    wide_linear     F.linear(x, weight)
    wide_add        residual + F.linear(x, weight)
    wide_swiglu     swiglu of two products

These are the plain forms; see `wide_triton` for kernels. No gradients: this is decode.
Letters: S rows, D and F widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.swiglu import swiglu

MOST_ROWS = 128  # beyond, matrix products of a library are faster


@torch.no_grad()
def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (S, D), weight (F, D) -> (S, F)."""
    return F.linear(x, weight)


@torch.no_grad()
def wide_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x (S, D), weight (F, D), residual (S, F) -> (S, F), the sum rounded once."""
    return torch.addmm(residual, x, weight.T)


@torch.no_grad()
def wide_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """x (S, D), gate_weight and up_weight (F, D) -> (S, F)."""
    return swiglu(F.linear(x, gate_weight), F.linear(x, up_weight))
