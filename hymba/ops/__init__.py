"""The door to the numbers. Ops know nothing of models: tensors, segments and sizes only.

Every op here has a slow, obvious twin of the same signature (`..._reference`); `backend` picks
between them and faster ones, so nobody else asks what device it is on.
"""

from __future__ import annotations

from torch import Tensor

from hymba.ops import attention as _attention
from hymba.ops import conv as _conv
from hymba.ops import loss as _loss
from hymba.ops import scan as _scan
from hymba.ops.attention import Meta, Past
from hymba.ops.backend import backend
from hymba.ops.loss import IGNORE
from hymba.ops.norm import fuse_heads, rms_norm
from hymba.ops.segments import Segments

__all__ = [
    "IGNORE",
    "Meta",
    "Past",
    "Segments",
    "attention",
    "causal_conv",
    "fuse_heads",
    "linear_cross_entropy",
    "rms_norm",
    "selective_scan",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """q (N, H, h), k (N, G, h), v (N, G, e) -> (N, H, e); see hymba.ops.attention."""
    reference = backend(q.device.type) == "reference"
    op = _attention.attention_reference if reference else _attention.attention
    return op(q, k, v, segments, window, meta, past)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, E), weight (E, K) -> silu(conv) (N, E), last inputs (S, K-1, E)."""
    reference = backend(x.device.type) == "reference"
    op = _conv.causal_conv_reference if reference else _conv.causal_conv
    return op(x, weight, bias, segments, initial_state)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u, dt, z (N, E); A (E, n); B, C (N, n) -> y (N, E), states (S, E, n)."""
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    if backend(u.device.type) == "reference":
        return _scan.selective_scan_reference(*inputs, segments, initial_state)
    if segments.uniform == 1 and initial_state is not None:
        return _scan.scan_step(*inputs, initial_state)
    return _scan.selective_scan_chunked(*inputs, segments, initial_state)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N), -100 left out -> the sum of losses in nats."""
    reference = backend(hidden.device.type) == "reference"
    op = _loss.linear_cross_entropy_reference if reference else _loss.linear_cross_entropy
    return op(hidden, weight, labels)
