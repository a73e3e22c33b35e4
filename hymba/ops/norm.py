"""RMSNorm, alone and behind a residual, and head fusion: the mean of two branches' norms.

Statistics in float32 (float64 for float64), cast back to the input's dtype, then times the weight:
the order of the released code, which matters in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> rms_norm(x + residual), x + residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Mean of the two normed branches, all (N, E) (paper eq. 3; the half is in the code only)."""
    normed = rms_norm(attention, attention_weight, eps) + rms_norm(ssm, ssm_weight, eps)
    return normed / 2
