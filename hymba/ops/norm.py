"""RMSNorm, alone and behind a residual, and head fusion: the mean of two branches' norms.

Statistics in float32 (float64 for float64), cast back to the input's dtype, then times the weight:
the order of the released code, which matters in bfloat16. What a norm gives is read by products,
so under autocast it has the dtype that they take (`kind_of`): the values are those of a wide norm
and a cast, without the wide copy. (B and C, too, go to the scan so, and the last norm's output is
no wider than what the head reads.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def kind_of(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype of what is made of these: promoted, or autocast's, which leaves float64 alone."""
    kind = x.dtype
    for other in others:
        kind = torch.promote_types(kind, other.dtype)
    device = x.device.type
    if kind == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return kind
    return torch.get_autocast_dtype(device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    return (_normed(x, eps) * weight).to(kind_of(x, weight))


def _normed(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> rms_norm(x + residual), x + residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Mean of the two normed branches, all (N, E) (paper eq. 3; the half is in the code only)."""
    both = _normed(attention, eps) * attention_weight + _normed(ssm, eps) * ssm_weight
    return (both / 2).to(kind_of(attention, ssm, attention_weight, ssm_weight))
