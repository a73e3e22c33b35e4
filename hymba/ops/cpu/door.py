"""Which calls on a CPU go to the kernels: those of inference, where numba is and the CPU is known.

Everything else (gradients, compilers and others that look on, float64) goes to plain PyTorch. No
numba is imported before a kernel is wanted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hymba.ops import conv, norm, norms, packed, rotary, scan
from hymba.ops.attention import Meta, Past
from hymba.ops.attention import attention as plain_attention
from hymba.ops.backend import wants_grad, watched
from hymba.ops.packed import Packed
from hymba.ops.segments import Segments
from hymba.ops.swiglu import swiglu as plain_swiglu

log = logging.getLogger("hymba")
PLAIN = (Tensor, torch.nn.Parameter)


def _takes(*tensors: Tensor | None) -> bool:
    """Whether kernels may be called with these."""
    if torch.compiler.is_compiling() or watched() or forward_ad._current_level >= 0:
        return False
    given = [x for x in tensors if x is not None]
    plain = all(type(x) in PLAIN and x.dtype != torch.float64 for x in given)
    return plain and not wants_grad(*given) and _known_cpu()


def _takes_wide(*tensors: Tensor) -> bool:
    """The same for ops whose order of roundings counts where numbers are narrow, or that autocast
    makes narrow."""
    wide = all(x.dtype == torch.float32 for x in tensors)
    return wide and not torch.is_autocast_enabled("cpu") and _takes(*tensors)


@cache
def _known_cpu() -> bool:
    from hymba.ops.cpu.simd import unsupported

    if why := unsupported():
        log.warning("hymba: no CPU kernels (%s); using plain PyTorch", why)
    return not why


def packed_linear(x: Tensor, packed_: Packed) -> Tensor:
    """x (N, columns) -> (N, rows); see hymba/ops/cpu/tiles.py. It multiplies whole codes only."""
    if packed_.scheme.kind != "int" or not _takes(x, packed_.tiles):
        return packed.packed_linear(x, packed_)
    from hymba.ops.cpu import tiles

    return tiles.packed_linear(x, packed_)


# Row by row.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    if not _takes_wide(x, weight):
        return norm.rms_norm(x, weight, eps)
    from hymba.ops.cpu import rows

    return rows.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> rms_norm(x + residual), x + residual."""
    if not _takes_wide(x, residual, weight):
        return norm.add_rms_norm(x, residual, weight, eps)
    from hymba.ops.cpu import rows

    return rows.add_rms_norm(x, residual, weight, eps)


def rms_norms(x: Tensor, weights: Sequence[Tensor], eps: float) -> list[Tensor]:
    """x (N, D1 + D2 + ...), weights (D1), (D2), ... -> (N, D1), (N, D2), ..."""
    if not _takes_wide(x, *weights):
        return norms.rms_norms(x, weights, eps)
    parts = x.split([len(weight) for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Mean of the two normed branches, all (N, E)."""
    inputs = attention, ssm, attention_weight, ssm_weight
    if not _takes_wide(*inputs):
        return norm.fuse_heads(*inputs, eps)
    from hymba.ops.cpu import rows

    return rows.fuse_heads(*inputs, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> (..., F)."""
    if not _takes_wide(gate, up):
        return plain_swiglu(gate, up)
    from hymba.ops.cpu import rows

    return rows.swiglu(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, width); cos, sin (N, 1, width / 2) -> as x."""
    if not _takes_wide(x, cos, sin):
        return rotary.rotate(x, cos, sin)
    from hymba.ops.cpu import rows

    return rows.rotate(x, cos, sin)


# Whole segments.


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """As `attention_reference` in hymba/ops/attention.py."""
    inputs = (*(meta or ()), *(past[:2] if past else ()))
    if _takes(q, k, v, *inputs) and len(q):
        from hymba.ops.cpu import attention as kernels

        out = kernels.attention(q, k, v, segments, window, meta, past)
        if out is not None:
            return out
    return plain_attention(q, k, v, segments, window, meta, past)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `causal_conv_reference` in hymba/ops/conv.py."""
    if not _takes(x, weight, bias, initial_state):
        return conv.causal_conv(x, weight, bias, segments, initial_state)
    from hymba.ops.cpu import scan as kernels

    return kernels.causal_conv(x, weight, bias, segments, initial_state)


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
    """As `selective_scan_reference` in hymba/ops/scan.py."""
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    if not _takes(*inputs, initial_state):
        return scan.selective_scan(*inputs, segments, initial_state)
    from hymba.ops.cpu import scan as kernels

    return kernels.selective_scan(*inputs, segments, initial_state)
