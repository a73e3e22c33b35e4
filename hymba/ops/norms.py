"""RMSNorms of neighbouring slices of columns, each with its own weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hymba.ops.norm import rms_norm


def rms_norms(x: Tensor, weights: Sequence[Tensor], eps: float) -> list[Tensor]:
    """x (N, D1 + D2 + ...), weights (D1), (D2), ... -> (N, D1), (N, D2), ..."""
    parts = x.split([len(weight) for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]
