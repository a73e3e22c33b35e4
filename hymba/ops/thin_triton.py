# mypy: allow-untyped-defs, allow-incomplete-defs
"""Thin products as GPU kernels; see `hymba.ops.thin` for what they compute.

What bounds them: the bytes of the weight, read once, and beside them the time in which nothing is
on its way: between two kernels, and from a kernel's start to its first bytes. Against both:

    kernel A   | weights --------> | waits | rows, sums, store |
    kernel B                | weights -------> | waits for A   | rows, sums, store |

A weight does not depend on the kernel before. So a program asks for its whole share of the weight,
some outputs with all their columns, into registers, before it waits (on Hopper, where a kernel can
be put in place while the one before it ends); only then it reads the rows. What stands before the
product, a norm or two, is computed again in every program: rows are few and in the second-level
cache. No sum is shared between programs, so results are the same every time.

Rows meet the weight one at a time: multiply-adds of float32 hide behind the bytes for one row, and
hardly for two. How far from it, on an H200, one row of the 1.5B: 73 % of read bandwidth into the
branches, 74 % into the MLP, 49 and 59 % out of them, 91 % in the head; products of a library with
the kernels around them 54, 44, 23, 38 and 54 %. With four rows these kernels lose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, chains, dense_last, launch, next_power_of_2, operator
from hymba.ops.chain_triton import wait
from hymba.ops.narrow_triton import narrow_linear as narrow_linear  # of `thin` too
from hymba.ops.thin import MOST_ROWS

PROCESSORS = 132  # of an H100 or H200


class Cut(NamedTuple):
    """What a program holds of a weight: its warps, and numbers of each thread at most."""

    warps: int
    numbers: int


class Tiling(NamedTuple):
    """How the work is cut; module-wide so that a benchmark can try others."""

    narrow: Cut = Cut(4, 64)  # weights of up to 2048 columns
    middle: Cut = Cut(2, 256)  # up to 4096
    wide: Cut = Cut(8, 64)
    single: Cut = Cut(4, 64)  # where a program for each output is not too many
    waves: int = 2  # programs for each multiprocessor at least, if outputs suffice
    chain: bool = True  # starts while the kernel before it ends


TILING = Tiling()


def tile_of(
    rows: int, features: int, columns: int, tensors: int, tiling: Tiling
) -> tuple[int, int]:
    """(outputs of a program, its warps) for weights of so many rows, of so many columns padded."""
    cut = tiling.narrow if columns <= 2048 else tiling.middle if columns <= 4096 else tiling.wide
    if features < 2 * PROCESSORS * tiling.waves:
        cut = tiling.single
    if rows > 1 and cut.numbers > 128:  # beside a second row they would not fit in registers
        cut = Cut(2 * cut.warps, cut.numbers // 2)
    outputs = max(1, cut.numbers * 32 * cut.warps // (columns * tensors))
    while outputs > 1 and features < outputs * PROCESSORS * tiling.waves:
        outputs //= 2
    return outputs, cut.warps


@triton.jit
def _weights(weight, output, column, F, stride, D: tl.constexpr):
    """Rows `output` of a weight (F, D), read once and never again."""
    at = weight + output.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (output < F)[:, None] & (column < D)[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _row(x, row, S, stride, column, D: tl.constexpr):
    """A row, zeros behind D; all zeros where there is no such row."""
    mask = column < tl.where(row < S, D, 0)
    return tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, kind: tl.constexpr):
    return x.to(kind).to(tl.float32)


@triton.jit
def _normed(x, weight, eps, D: tl.constexpr, kind: tl.constexpr):
    """RMSNorm of a row, rounded before the weight and after it, as `rms_norm` does."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return _rounded(_rounded(x * scale, kind) * weight.to(tl.float32), kind)


@triton.jit
def _product(weight, x, kind: tl.constexpr):
    return _rounded(tl.sum(weight.to(tl.float32) * x[None, :], 1), kind)


@triton.jit(do_not_specialize=["S", "F"])
def _linear_kernel(
    x, weight, out, S, F, stride_x, stride_w,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    output, column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    w = _weights(weight, output, column, F, stride_w, D)
    kind: tl.constexpr = out.dtype.element_ty
    wait(CHAINED)
    for row in tl.static_range(ROWS):
        y = _product(w, _row(x, row, S, stride_x, column, D), kind)
        tl.store(out + row * F + output, y.to(kind), mask=output < tl.where(row < S, F, 0))


@triton.jit(do_not_specialize=["S", "F"])
def _norm_linear_kernel(
    x, norm_weight, weight, out, S, F, eps, stride_x, stride_w,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    output, column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    w = _weights(weight, output, column, F, stride_w, D)
    scales = tl.load(norm_weight + column, mask=column < D, other=0.0)
    kind: tl.constexpr = out.dtype.element_ty
    wait(CHAINED)
    for row in tl.static_range(ROWS):
        v = _normed(_row(x, row, S, stride_x, column, D), scales, eps, D, kind)
        y = _product(w, v, kind)
        tl.store(out + row * F + output, y.to(kind), mask=output < tl.where(row < S, F, 0))


@triton.jit(do_not_specialize=["S", "F"])
def _norm_swiglu_kernel(
    x, norm_weight, gate_weight, up_weight, out, S, F, eps, stride_x, stride_g, stride_u,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    output, column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    wg = _weights(gate_weight, output, column, F, stride_g, D)
    wu = _weights(up_weight, output, column, F, stride_u, D)
    scales = tl.load(norm_weight + column, mask=column < D, other=0.0)
    kind: tl.constexpr = out.dtype.element_ty
    wait(CHAINED)
    for row in tl.static_range(ROWS):
        v = _normed(_row(x, row, S, stride_x, column, D), scales, eps, D, kind)
        gate, up = _product(wg, v, kind), _product(wu, v, kind)
        y = gate * tl.sigmoid(gate) * up
        tl.store(out + row * F + output, y.to(kind), mask=output < tl.where(row < S, F, 0))


@triton.jit
def _store_sum(out, residual, y, row, output, S, F, stride_r, kind: tl.constexpr):
    there = output < tl.where(row < S, F, 0)
    y += tl.load(residual + row * stride_r + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * F + output, y.to(kind), mask=there)


@triton.jit(do_not_specialize=["S", "F"])
def _linear_add_kernel(
    x, weight, residual, out, S, F, stride_x, stride_w, stride_r,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    output, column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    w = _weights(weight, output, column, F, stride_w, D)
    kind: tl.constexpr = out.dtype.element_ty
    wait(CHAINED)
    for row in tl.static_range(ROWS):
        y = _product(w, _row(x, row, S, stride_x, column, D), kind)
        _store_sum(out, residual, y, row, output, S, F, stride_r, kind)


@triton.jit(do_not_specialize=["S", "F"])
def _fuse_linear_kernel(
    a, b, a_weight, b_weight, weight, residual, out,
    S, F, eps, stride_a, stride_b, stride_w, stride_r,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    output, column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    w = _weights(weight, output, column, F, stride_w, D)
    kind: tl.constexpr = out.dtype.element_ty
    wait(CHAINED)  # also for these, which may be a sign or a scalar times a norm's weights
    a_scales = tl.load(a_weight + column, mask=column < D, other=0.0)
    b_scales = tl.load(b_weight + column, mask=column < D, other=0.0)
    for row in tl.static_range(ROWS):
        v = _normed(_row(a, row, S, stride_a, column, D), a_scales, eps, D, kind)
        v += _normed(_row(b, row, S, stride_b, column, D), b_scales, eps, D, kind)
        y = _product(w, _rounded(v, kind) * 0.5, kind)  # halving is exact
        _store_sum(out, residual, y, row, output, S, F, stride_r, kind)


def _run(
    kernel: Any,
    rows: int,
    weight: Tensor,
    tensors: int,
    *args: Any,
    strides: list[int],
    **options: Any,
) -> None:
    """Launch a kernel of `args`, then S, F, and floats and strides, cut for its weight (F, D)."""
    if rows > MOST_ROWS:
        raise ValueError(f"thin products are for {MOST_ROWS} rows at most, not {rows}")
    features, width = weight.shape
    columns = max(16, next_power_of_2(width))
    outputs, warps = tile_of(rows, features, columns, tensors, TILING)
    launch(
        kernel, (cdiv(features, outputs),), *args, *strides, D=width,
        ROWS=next_power_of_2(rows), COLUMNS=columns, OUTPUTS=outputs,
        CHAINED=TILING.chain and chains(weight), num_warps=warps, **options,
    )  # fmt: skip


@operator("linear")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `hymba.ops.thin.linear`."""
    x, weight = dense_last(x), dense_last(weight)
    (rows, _), features = x.shape, len(weight)
    out = x.new_empty(rows, features)
    if out.numel():
        _run(
            _linear_kernel, rows, weight, 1, x, weight, out, rows, features,
            strides=[x.stride(0), weight.stride(0)],
        )  # fmt: skip
    return out


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@operator("norm_linear")
def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """As `hymba.ops.thin.norm_linear`."""
    x, weight = dense_last(x), dense_last(weight)
    (rows, _), features = x.shape, len(weight)
    out = x.new_empty(rows, features)
    if out.numel():
        _run(
            _norm_linear_kernel, rows, weight, 1,
            x, norm_weight.contiguous(), weight, out, rows, features, eps,
            strides=[x.stride(0), weight.stride(0)],
        )  # fmt: skip
    return out


@norm_linear.register_fake
def _(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@operator("norm_swiglu")
def norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up_weight: Tensor
) -> Tensor:
    """As `hymba.ops.thin.norm_swiglu`."""
    x, gate_weight, up_weight = (dense_last(t) for t in (x, gate_weight, up_weight))
    (rows, _), features = x.shape, len(gate_weight)
    out = x.new_empty(rows, features)
    if out.numel():
        _run(
            _norm_swiglu_kernel, rows, gate_weight, 2,
            x, norm_weight.contiguous(), gate_weight, up_weight, out, rows, features, eps,
            strides=[x.stride(0), gate_weight.stride(0), up_weight.stride(0)],
        )  # fmt: skip
    return out


@norm_swiglu.register_fake
def _(x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(len(x), len(gate_weight))


@operator("fuse_linear")
def fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    weight: Tensor,
    residual: Tensor,
) -> Tensor:
    """As `hymba.ops.thin.fuse_linear`."""
    a, b, weight, residual = (dense_last(x) for x in (attention, ssm, weight, residual))
    rows, features = residual.shape
    out = residual.new_empty(rows, features)
    if out.numel():
        _run(
            _fuse_linear_kernel, rows, weight, 1,
            a, b, attention_weight.contiguous(), ssm_weight.contiguous(), weight, residual, out,
            rows, features, eps,
            strides=[a.stride(0), b.stride(0), weight.stride(0), residual.stride(0)],
            enable_fp_fusion=False,  # a product fused with the sum is not rounded
        )  # fmt: skip
    return out


@fuse_linear.register_fake
def _(*args: Any) -> Tensor:
    return args[-1].new_empty(args[-1].shape)


@operator("linear_add")
def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As `hymba.ops.thin.linear_add`."""
    x, weight, residual = dense_last(x), dense_last(weight), dense_last(residual)
    rows, features = residual.shape
    out = residual.new_empty(rows, features)
    if out.numel():
        _run(
            _linear_add_kernel, rows, weight, 1, x, weight, residual, out, rows, features,
            strides=[x.stride(0), weight.stride(0), residual.stride(0)],
        )  # fmt: skip
    return out


@linear_add.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)
