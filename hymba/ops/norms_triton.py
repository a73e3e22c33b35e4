# mypy: allow-untyped-defs, allow-incomplete-defs
"""Norms of three neighbouring slices of columns in one launch: dt, B and C of an SSM branch.

What bounds it: the launch; of 132 columns, 16384 rows are 9 MB forward, 13 MB backward. How far
from it, on an H200: 8 us forward, 42 us backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, launch, next_power_of_2, operator
from hymba.ops.norm import kind_of
from hymba.ops.norm_triton import Tile, flat, normed, rms_norm, through_norm, walkers
from hymba.ops.partials_triton import add_up

ROWS = 16  # of a program


@triton.jit
def _norm_slice(
    x, weight, out, row, rows, stride, eps, D: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < D)
    v = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    v = normed(v, eps, D).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * D + column, v * w, mask=there)


@triton.jit
def _three_norms_kernel(
    x, w1, w2, w3, out1, out2, out3, rows, stride, eps,
    D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    _norm_slice(x, w1, out1, row, rows, stride, eps, D1, C1)
    _norm_slice(x + D1, w2, out2, row, rows, stride, eps, D2, C2)
    _norm_slice(x + D1 + D2, w3, out3, row, rows, stride, eps, D3, C3)


@triton.jit
def _norm_slice_backward(
    dout, x, weight, dx, row, rows, stride, eps,
    D: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes dx; what the rows add to the weight's gradient (ROWS, COLUMNS)."""
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < D)
    v = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    g = tl.load(dout + row * D + column, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    y, dv = through_norm(v, g * w, eps, D)
    tl.store(dx + row * WIDTH + column, dv, mask=there)
    return g * y


@triton.jit
def _three_norms_backward_kernel(
    dout1, dout2, dout3, x, w1, w2, w3, dx, parts, rows, stride, eps,
    D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = D1 + D2 + D3
    dw1 = tl.zeros((ROWS, C1), tl.float32)
    dw2 = tl.zeros((ROWS, C2), tl.float32)
    dw3 = tl.zeros((ROWS, C3), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        dw1 += _norm_slice_backward(dout1, x, w1, dx, row, rows, stride, eps, D1, C1, WIDTH)
        at = D1
        dw2 += _norm_slice_backward(
            dout2, x + at, w2, dx + at, row, rows, stride, eps, D2, C2, WIDTH
        )
        at += D2
        dw3 += _norm_slice_backward(
            dout3, x + at, w3, dx + at, row, rows, stride, eps, D3, C3, WIDTH
        )
    parts += tl.program_id(0) * WIDTH
    c1 = tl.arange(0, C1)
    tl.store(parts + c1, tl.sum(dw1, 0), mask=c1 < D1)
    c2 = tl.arange(0, C2)
    tl.store(parts + D1 + c2, tl.sum(dw2, 0), mask=c2 < D2)
    c3 = tl.arange(0, C3)
    tl.store(parts + D1 + D2 + c3, tl.sum(dw3, 0), mask=c3 < D3)


def rms_norms(x: Tensor, weights: Sequence[Tensor], eps: float) -> list[Tensor]:
    """x (N, D1 + D2 + ...), weights (D1), (D2), ... -> (N, D1), (N, D2), ..."""
    if len(weights) == 3:
        return list(_three_norms(x, *weights, eps, kind_of(x, *weights)))
    parts = x.split([len(weight) for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]


@operator("three_norms")
def _three_norms(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _like_slices(x, w1, w2, w3, eps, kind)
    if not x.numel():
        return outs
    rows, weights = flat(x), [w.contiguous() for w in (w1, w2, w3)]
    grid = (cdiv(len(rows), ROWS),)
    launch(
        _three_norms_kernel, grid, rows, *weights, *outs, len(rows), rows.stride(0), eps,
        **_widths(weights),
    )  # fmt: skip
    return outs


@_three_norms.register_fake
def _like_slices(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (x.new_empty(len(x), len(w), dtype=kind) for w in (w1, w2, w3))
    return one, two, three


def _widths(weights: Sequence[Tensor]) -> dict[str, int]:
    found = {"ROWS": ROWS}
    for i, weight in enumerate(weights, start=1):
        found |= {f"D{i}": len(weight), f"C{i}": next_power_of_2(len(weight))}
    return found


@operator("three_norms_backward")
def _three_norms_backward(
    d1: Tensor,
    d2: Tensor,
    d3: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dx, and the weights' gradients one behind the other (D1 + D2 + D3)."""
    dx, width = x.new_empty(x.shape), x.shape[1]
    if not x.numel():
        return dx, w1.new_zeros(width)
    rows, weights = flat(x), [w.contiguous() for w in (w1, w2, w3)]
    programs = walkers(x.device, Tile(ROWS, width, 4, programs=2), len(rows))
    parts = x.new_empty((programs, width), dtype=torch.float32)
    launch(
        _three_norms_backward_kernel, (programs,), d1.contiguous(), d2.contiguous(),
        d3.contiguous(), rows, *weights, dx, parts, len(rows), rows.stride(0), eps,
        **_widths(weights),
    )  # fmt: skip
    return dx, add_up(parts, w1.dtype)


@_three_norms_backward.register_fake
def _(
    d1: Tensor,
    d2: Tensor,
    d3: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w1.new_empty(x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights = ctx.saved_tensors
    dx, dweights = _three_norms_backward(*douts, x, *weights, ctx.eps)
    return dx, *dweights.split([len(weight) for weight in weights]), None, None


_three_norms.register_autograd(_gradients, setup_context=_keep)
