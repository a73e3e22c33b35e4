"""Which calls on a CPU go to the kernels: those of inference, where numba is and the CPU is known.

Everything else (gradients, compilers and others that look on, float64) goes to plain PyTorch. No
numba is imported before a kernel is wanted.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hymba.ops import conv, norm, packed, scan
from hymba.ops.backend import wants_grad, watched
from hymba.ops.packed import Packed
from hymba.ops.segments import Segments
from hymba.ops.swiglu import swiglu

log = logging.getLogger("hymba")
PLAIN = (Tensor, torch.nn.Parameter)


def _takes(*tensors: Tensor | None) -> bool:
    """Whether kernels may be called with these."""
    if torch.compiler.is_compiling() or watched() or forward_ad._current_level >= 0:
        return False
    given = [x for x in tensors if x is not None]
    plain = all(type(x) in PLAIN and x.dtype != torch.float64 for x in given)
    return plain and not wants_grad(*given) and _known_cpu()


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


# What stands before and behind it in a step is plain PyTorch.


def packed_norm_linear(x: Tensor, norm_weight: Tensor, eps: float, packed_: Packed) -> Tensor:
    """x (S, columns) -> (S, rows), of its norm."""
    return packed_linear(norm.rms_norm(x, norm_weight, eps), packed_)


def packed_norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Packed) -> Tensor:
    """x (S, columns), the rows of gate and of up one behind the other -> (S, rows / 2)."""
    return swiglu(*packed_norm_linear(x, norm_weight, eps, gate_up).chunk(2, dim=-1))


def packed_linear_add(x: Tensor, packed_: Packed, residual: Tensor) -> Tensor:
    """x (S, columns), residual (S, rows) -> (S, rows)."""
    return residual + packed_linear(x, packed_)


def packed_fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    packed_: Packed,
    residual: Tensor,
) -> Tensor:
    """attention, ssm (S, columns), their norms' weights, residual (S, rows) -> (S, rows)."""
    fused = norm.fuse_heads(attention, ssm, attention_weight, ssm_weight, eps)
    return packed_linear_add(fused, packed_, residual)


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
