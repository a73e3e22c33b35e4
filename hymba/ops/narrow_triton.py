# mypy: allow-untyped-defs, allow-incomplete-defs
"""A product of some rows and a narrow weight as a GPU kernel: what leads to dt, B and C of a step.

What bounds it: neither bytes nor arithmetic (132 outputs of 3200 inputs are 0.8 MB) but how long a
multiprocessor takes to fetch its share. A library cuts the columns into many programs, whose sums
a second kernel adds; and its stores are slow where a row's numbers are no multiple of eight.

    warp 0   | columns 0 to 63    | columns 256 to 319 | ...
    warp 1   | columns 64 to 127  | ...                         a tile of 16 rows, 16 outputs
    ...

Here a program has a small tile, and its warps take turns along the columns: each keeps a sum of its
own, fetched several turns ahead, and in the end they add them, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, chains, dense_last, launch, operator
from hymba.ops.chain_triton import wait
from hymba.ops.step_triton import dot_type


class Tiling(NamedTuple):
    """How the work is cut; module-wide so that a benchmark can try others."""

    rows: int = 16
    outputs: int = 16
    columns: int = 64  # of a warp's turn
    warps: int = 8
    stages: int = 3


TILING = Tiling()


@triton.jit(do_not_specialize=["S"])
def _narrow_linear_kernel(
    x, weight, out, S, F, stride_x, stride_w,
    D: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles are (warps, rows or outputs, columns)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.arange(0, WARPS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    rows, outputs = (row < S)[None, :, None], (output < F)[None, :, None]
    x += row[None, :, None] * stride_x
    weight += output[None, :, None] * stride_w
    acc = tl.zeros([WARPS, ROWS, OUTPUTS], tl.float32)
    wait(CHAINED)
    for begin in tl.range(0, D, WARPS * COLUMNS, num_stages=STAGES):
        column = begin + first
        a = tl.load(x + column, mask=rows & (column < D), other=0.0).to(DOT)
        w = tl.load(weight + column, mask=outputs & (column < D), other=0.0).to(DOT)
        acc = tl.dot(a, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")
    y = tl.sum(acc, 0)
    there = (row < S)[:, None] & (output < F)[None, :]
    tl.store(out + row[:, None] * F + output[None, :], y.to(out.dtype.element_ty), mask=there)


@operator("narrow_linear")
def narrow_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `hymba.ops.thin.narrow_linear`."""
    if x.is_cuda and x.dtype == torch.float32:
        return F.linear(x, weight)  # no tensor cores
    x, weight = dense_last(x), dense_last(weight)
    (rows, columns), features = x.shape, len(weight)
    out = x.new_empty(rows, features)
    if out.numel():
        tile = TILING
        launch(
            _narrow_linear_kernel,
            (cdiv(rows, tile.rows), cdiv(features, tile.outputs)),
            x, weight, out, rows, features, x.stride(0), weight.stride(0), D=columns,
            ROWS=tile.rows, OUTPUTS=tile.outputs, COLUMNS=tile.columns, WARPS=tile.warps,
            STAGES=tile.stages, DOT=dot_type(x), CHAINED=chains(x, rows), num_warps=tile.warps,
        )  # fmt: skip
    return out


@narrow_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))
