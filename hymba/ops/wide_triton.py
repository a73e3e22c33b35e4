# mypy: allow-untyped-defs, allow-incomplete-defs
"""Wide products as GPU kernels; see `hymba.ops.wide` for what they compute.

What bounds them: the bytes of the weight, read once; the rows come from the second-level cache, for
each program all of them. All rows are one tile, so that a program reads its share of the weight
once; a weight of few outputs is cut along its columns too, and a second kernel adds the parts,
always in the same order, to the residual.

    kernel A   | fetches weights | waits | rows and weights, tile by tile, store |
    kernel B                     | fetches weights -----------------------> | waits | ...

A weight does not depend on the kernel before: on Hopper a kernel that is put in place while the one
before it ends has its weight brought into the second-level cache, one instruction a row, and only
then waits. So the memory works while one kernel ends and the next one starts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import wide
from hymba.ops.backend import chains, dense_last, launch, operator
from hymba.ops.chain_triton import wait
from hymba.ops.step_triton import dot_type
from hymba.ops.swiglu_triton import swiglu
from hymba.ops.wide import MOST_ROWS


class Tiling(NamedTuple):
    """How the work is cut. A program has some outputs of a weight, of each weight if there are two,
    and one of `splits` parts of its columns."""

    outputs: int
    columns: int  # of a turn
    warps: int
    stages: int  # turns on their way
    splits: int = 1
    flipped: bool = True  # the weight is the product's left side, whose tiles are 64 high
    ahead: int = 1 << 20  # columns that are fetched before the wait


def tile_of(rows: int, features: int, columns: int, tensors: int) -> Tiling:
    """For rows, a power of two from 16 on, and so many weights (features, columns)."""
    if features < 4096:
        return Tiling(64, 64, 4, 4, splits=5)
    return Tiling(64 // tensors, 64, 4, 4)


@triton.jit
def _fetch(weight, output, F, stride, first, count, FETCH: tl.constexpr):
    """Ask for some columns of a weight's rows to be brought into the second-level cache."""
    if FETCH:
        begin = weight + tl.minimum(output, F - 1).to(tl.int64) * stride + first
        size = tl.full(output.shape, 2, tl.int32) * count
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
            [begin.to(tl.int64, bitcast=True), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _tile(at, column, D, there, policy: tl.constexpr, EVEN: tl.constexpr):
    mask = there if EVEN else there & (column < D)[None, :]
    return tl.load(at + column[None, :], mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def _dot(a, w, acc, DOT: tl.constexpr, FLIPPED: tl.constexpr):
    a, w = a.to(DOT), w.to(DOT)
    if FLIPPED:
        acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _zeros(ROWS: tl.constexpr, OUTPUTS: tl.constexpr, FLIPPED: tl.constexpr):
    if FLIPPED:
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    return acc


@triton.jit(do_not_specialize=["S", "ahead"])
def _linear_kernel(
    x, weight, residual, out, S, F, D, each, ahead, stride_x, stride_w, stride_r,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, ADD: tl.constexpr, FLIPPED: tl.constexpr, DOT: tl.constexpr,
    FETCH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs i with part j of the columns, into part j of out (parts, S, F)."""
    row, output = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, D)
    _fetch(weight, output, F, stride_w, first, tl.minimum(last - first, ahead), FETCH)
    a_at = x + row[:, None] * stride_x
    w_at = weight + output.to(tl.int64)[:, None] * stride_w
    rows, outputs = (row < S)[:, None], (output < F)[:, None]
    acc = _zeros(ROWS, OUTPUTS, FLIPPED)
    wait(CHAINED)
    for begin in tl.range(first, last, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        a = _tile(a_at, column, D, rows, "", EVEN)
        w = _tile(w_at, column, D, outputs, "evict_first", EVEN)
        acc = _dot(a, w, acc, DOT, FLIPPED)
    y = tl.trans(acc) if FLIPPED else acc
    there = rows & (output < F)[None, :]
    if ADD:
        r = tl.load(residual + row[:, None] * stride_r + output[None, :], mask=there, other=0.0)
        y += r.to(tl.float32)
    at = out + (tl.program_id(1) * S + row)[:, None] * F + output[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["S", "ahead"])
def _swiglu_kernel(
    x, gate_weight, up_weight, out, S, F, D, ahead, stride_x, stride_g, stride_u,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, FLIPPED: tl.constexpr, DOT: tl.constexpr,
    FETCH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row, output = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    _fetch(gate_weight, output, F, stride_g, 0, tl.minimum(D, ahead), FETCH)
    _fetch(up_weight, output, F, stride_u, 0, tl.minimum(D, ahead), FETCH)
    a_at = x + row[:, None] * stride_x
    g_at = gate_weight + output.to(tl.int64)[:, None] * stride_g
    u_at = up_weight + output.to(tl.int64)[:, None] * stride_u
    rows, outputs = (row < S)[:, None], (output < F)[:, None]
    gate, up = _zeros(ROWS, OUTPUTS, FLIPPED), _zeros(ROWS, OUTPUTS, FLIPPED)
    wait(CHAINED)
    for begin in tl.range(0, D, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        a = _tile(a_at, column, D, rows, "", EVEN)
        gate = _dot(a, _tile(g_at, column, D, outputs, "evict_first", EVEN), gate, DOT, FLIPPED)
        up = _dot(a, _tile(u_at, column, D, outputs, "evict_first", EVEN), up, DOT, FLIPPED)
    kind: tl.constexpr = out.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    y = (gate * tl.sigmoid(gate) * up).to(kind)
    y = tl.trans(y) if FLIPPED else y
    there = rows & (output < F)[None, :]
    tl.store(out + row[:, None] * F + output[None, :], y, mask=there)


@triton.jit(do_not_specialize=["S"])
def _sum_kernel(
    parts, residual, out, S, F, stride_r,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (s, i): some outputs of row s of all parts (parts, S, F)."""
    wait(CHAINED)
    row, output = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = output < F
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        y += tl.load(parts + (part * S + row) * F + output, mask=there, other=0.0)
    if ADD:
        r = tl.load(residual + row * stride_r + output, mask=there, other=0.0)
        y += r.to(tl.float32)
    tl.store(out + row * F + output, y.to(out.dtype.element_ty), mask=there)


BLOCK, WARPS = 512, 2  # of the sums


def _meta(x: Tensor, tile: Tiling, width: int, *weights: Tensor) -> dict[str, Any]:
    """What kernels are made for. A fetch takes whole groups of 16 bytes."""
    starts = [n for w in weights for n in (w.data_ptr(), w.stride(0) * w.element_size())]
    whole = chains(x) and x.element_size() == 2 and not any(n % 16 for n in [2 * width, *starts])
    return {
        "ROWS": max(16, triton.next_power_of_2(len(x))),
        "OUTPUTS": tile.outputs,
        "COLUMNS": tile.columns,
        "STAGES": tile.stages,
        "EVEN": width % tile.columns == 0,
        "FLIPPED": tile.flipped,
        "DOT": dot_type(x),
        "FETCH": whole and tile.ahead > 0,
        "CHAINED": chains(x),
        "num_warps": tile.warps,
    }


def _product(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """x (S, D), weight (F, D), residual (S, F) -> (S, F), of a kernel or two."""
    x, weight = dense_last(x), dense_last(weight)
    (rows, width), features = x.shape, len(weight)
    out = x.new_empty(rows, features)
    if not out.numel():
        return out
    tile = tile_of(max(16, triton.next_power_of_2(rows)), features, width, 1)
    each = triton.cdiv(triton.cdiv(width, tile.columns), tile.splits) * tile.columns
    splits = triton.cdiv(width, each)
    added = out if residual is None else dense_last(residual)
    add, meta = residual is not None, _meta(x, tile, width, weight)
    into = out if splits == 1 else x.new_empty(splits, rows, features, dtype=torch.float32)
    launch(
        _linear_kernel, (triton.cdiv(features, tile.outputs), splits), x, weight, added, into,
        rows, features, width, each, tile.ahead, x.stride(0), weight.stride(0), added.stride(0),
        ADD=add and splits == 1, **meta,
    )  # fmt: skip
    if splits > 1:
        launch(
            _sum_kernel, (rows, triton.cdiv(features, BLOCK)), into, added, out, rows, features,
            added.stride(0), SPLITS=splits, BLOCK=BLOCK, ADD=add, CHAINED=chains(x),
            num_warps=WARPS,
        )  # fmt: skip
    return out


def _is_plain(x: Tensor) -> bool:
    """Without tensor cores, or beyond one tile of rows, a library is faster."""
    return len(x) > MOST_ROWS or (x.is_cuda and x.dtype == torch.float32)


@operator("wide_linear")
def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `hymba.ops.wide.wide_linear`."""
    return wide.wide_linear(x, weight) if _is_plain(x) else _product(x, weight, None)


@wide_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@operator("wide_add")
def wide_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As `hymba.ops.wide.wide_add`."""
    if _is_plain(x):
        return wide.wide_add(x, weight, residual)
    return _product(x, weight, residual)


@wide_add.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


@operator("wide_swiglu")
def wide_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As `hymba.ops.wide.wide_swiglu`."""
    if _is_plain(x):
        return swiglu(F.linear(x, gate_weight), F.linear(x, up_weight))
    x, gate_weight, up_weight = (dense_last(t) for t in (x, gate_weight, up_weight))
    (rows, width), features = x.shape, len(gate_weight)
    out = x.new_empty(rows, features)
    if out.numel():
        tile = tile_of(max(16, triton.next_power_of_2(rows)), features, width, 2)
        launch(
            _swiglu_kernel, (triton.cdiv(features, tile.outputs),), x, gate_weight, up_weight, out,
            rows, features, width, tile.ahead,
            x.stride(0), gate_weight.stride(0), up_weight.stride(0),
            **_meta(x, tile, width, gate_weight, up_weight),
        )  # fmt: skip
    return out


@wide_swiglu.register_fake
def _(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(gate_weight))
