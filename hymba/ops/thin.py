"""Thin products: a few rows against a whole weight, with what stands before and behind it.

A decode step of a row or two reads every weight of the model once and does little else, so
what it costs is bytes and the number of kernels. Each op here is a product and its neighbours:

    linear          F.linear(x, weight)
    norm_linear     F.linear(rms_norm(x), weight)
    norm_swiglu     swiglu of two such products
    fuse_linear     residual + F.linear(fuse_heads(attention, ssm), weight)
    linear_add      residual + F.linear(x, weight)
    narrow_linear   F.linear(x, weight) of any number of rows and a hundred or two outputs

These are the plain forms, and by definition what kernels have to give, roundings included; see
`thin_triton` for those. No gradients: this is decode.
Letters: S rows, D, E and F widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import hymba.ops.norm as norms
from hymba.ops.swiglu import swiglu

MOST_ROWS = 2  # beyond, matrix products of a library are faster


@torch.no_grad()
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (S, D), weight (F, D) -> (S, F)."""
    return F.linear(x, weight)


@torch.no_grad()
def narrow_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (S, D), weight (F, D) -> (S, F)."""
    return F.linear(x, weight)


@torch.no_grad()
def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """x (S, D), norm_weight (D), weight (F, D) -> (S, F)."""
    return F.linear(norms.rms_norm(x, norm_weight, eps), weight)


@torch.no_grad()
def norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up_weight: Tensor
) -> Tensor:
    """x (S, D), norm_weight (D), gate_weight and up_weight (F, D) -> (S, F)."""
    normed = norms.rms_norm(x, norm_weight, eps)
    return swiglu(F.linear(normed, gate_weight), F.linear(normed, up_weight))


@torch.no_grad()
def fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    weight: Tensor,
    residual: Tensor,
) -> Tensor:
    """attention, ssm (S, E), their norms' weights (E), weight (D, E), residual (S, D) -> (S, D)."""
    fused = norms.fuse_heads(attention, ssm, attention_weight, ssm_weight, eps)
    return residual + F.linear(fused, weight)


@torch.no_grad()
def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x (S, F), weight (D, F), residual (S, D) -> (S, D)."""
    return residual + F.linear(x, weight)
