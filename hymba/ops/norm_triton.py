# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMSNorm, alone and behind a residual, and the fusion of two branches.

What bounds them: bytes. Forward reads and writes each row once; backward reads x and the gradient
and writes one. How far from it, on an H200: 80 to 89 % of copy bandwidth forward,
76 to 78 % backward.

A program holds whole rows in registers, so it sees a row's square sum before it writes anything,
and backward computes the statistics again instead of keeping them. Roundings are those of the plain
ops: the normed row is cast to x's dtype and then multiplied by the weight. The weight's gradient
is a sum over rows: as many programs as the device runs at once walk over the rows and keep one sum
each, which `add_up` adds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, chains, dense_last, launch, next_power_of_2, operator
from hymba.ops.chain_triton import wait
from hymba.ops.norm import kind_of
from hymba.ops.partials_triton import add_up, processors


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int = 1  # rows fetched ahead of a walk, through shared memory
    programs: int = 1  # of a walk, on each multiprocessor


def forward_tile(width: int, tensors: int) -> Tile:
    """For a program that reads and writes `tensors` of so many columns."""
    columns = next_power_of_2(width)
    rows = max(1, 2048 // columns)
    return Tile(rows, columns, min(max(rows * columns // 512, 1), 16))


def backward_tile(width: int, tensors: int, size: int) -> Tile:
    """For a walk that reads rows of so many tensors, `size` bytes an element. Its stages have to
    fit in shared memory."""
    columns = next_power_of_2(width)
    rows = max(1, 2048 // columns)
    stages = max(1, min(4, 160_000 // (tensors * rows * columns * size)))
    if columns <= 2048:
        return Tile(rows, columns, 4, stages, 3)
    return Tile(rows, columns, 16, min(stages, 3), 1)


def flat(x: Tensor) -> Tensor:
    """x (..., D) as (N, D), as a view wherever the kernels can read it."""
    return dense_last(x.reshape(-1, x.shape[-1]))


def walkers(device: torch.device, tile: Tile, rows: int) -> int:
    """Programs of a backward pass: as many as run at once, or as there is work for."""
    return min(cdiv(rows, tile.rows), processors(device) * tile.programs)


# ---------------------------------------------------------------------------------- kernels


@triton.jit
def normed(x, eps, D: tl.constexpr):
    """x (ROWS, COLUMNS) in float32, zero behind column D."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


# Several sums in one reduction: the warps of a program wait for each other once, not at every sum.
@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_fours(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _gradient(x, g, squares, products, eps, D: tl.constexpr):
    """Normed x, and dL/dx of sum(g * normed x), from the sums of x * x and g * x of each row."""
    scale = tl.rsqrt(squares / D + eps)[:, None]
    return x * scale, scale * (g - x * ((products / D)[:, None] * scale * scale))


@triton.jit
def through_norm(x, g, eps, D: tl.constexpr):
    """As `_gradient`, with the sums."""
    squares, products = tl.reduce((x * x, g * x), 1, _add_pairs)
    return _gradient(x, g, squares, products, eps, D)


@triton.jit
def _rms_norm_kernel(
    x, added, weight, out, total, rows, stride, added_stride, eps,
    ADD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < D)
    w = tl.load(weight + column, mask=column < D, other=0.0)
    wait(CHAINED)
    v = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
    kind = x.dtype.element_ty
    if ADD:
        v += tl.load(added + row * added_stride + column, mask=there, other=0.0).to(tl.float32)
        kind = total.dtype.element_ty
        tl.store(total + row * D + column, v.to(kind), mask=there)
        v = v.to(kind).to(tl.float32)
    v = normed(v, eps, D).to(kind).to(tl.float32)
    tl.store(out + row * D + column, v * w.to(tl.float32), mask=there)


@triton.jit
def _rms_norm_backward_kernel(
    dout, dtotal, x, weight, dx, parts, rows, dout_stride, dtotal_stride, stride, eps,
    ADD: tl.constexpr, SUM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        there = (row < rows) & (column < D)
        v = tl.load(x + row * stride + column, mask=there, other=0.0).to(tl.float32)
        g = tl.load(dout + row * dout_stride + column, mask=there, other=0.0).to(tl.float32)
        y, dv = through_norm(v, g * w, eps, D)
        if ADD:
            more = tl.load(dtotal + row * dtotal_stride + column, mask=there, other=0.0)
            dv += more.to(tl.float32)
        tl.store(dx + row * D + column, dv, mask=there)
        if SUM:
            dweight += g * y
    if SUM:
        at = tl.program_id(0) * D + column
        tl.store(parts + at, tl.sum(dweight, 0)[None, :], mask=column < D)


@triton.jit
def _fuse_kernel(
    a, b, a_weight, b_weight, out, rows, a_stride, b_stride, eps,
    ROUNDED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < D)
    wait(CHAINED)  # also for the weights, which may be a sign or a scalar times a norm's
    wa = tl.load(a_weight + column, mask=column < D, other=0.0)
    wb = tl.load(b_weight + column, mask=column < D, other=0.0)
    va = tl.load(a + row * a_stride + column, mask=there, other=0.0).to(tl.float32)
    vb = tl.load(b + row * b_stride + column, mask=there, other=0.0).to(tl.float32)
    wa, wb = wa.to(tl.float32), wb.to(tl.float32)
    va = normed(va, eps, D).to(a.dtype.element_ty).to(tl.float32) * wa
    vb = normed(vb, eps, D).to(b.dtype.element_ty).to(tl.float32) * wb
    # Every product and the sum are rounded, as in the plain op, unless they are wider than what is
    # given (under autocast); halving is exact.
    if ROUNDED:
        kind = out.dtype.element_ty
        va, vb = va.to(kind).to(tl.float32), vb.to(kind).to(tl.float32)
    tl.store(out + row * D + column, (va + vb) * 0.5, mask=there)


@triton.jit
def _fuse_backward_kernel(
    dout, a, b, a_weight, b_weight, da, db, parts, rows, dout_stride, a_stride, b_stride, eps,
    SUM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    wa = tl.load(a_weight + column, mask=column < D, other=0.0).to(tl.float32)
    wb = tl.load(b_weight + column, mask=column < D, other=0.0).to(tl.float32)
    dwa = tl.zeros((ROWS, COLUMNS), tl.float32)
    dwb = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        there = (row < rows) & (column < D)
        g = tl.load(dout + row * dout_stride + column, mask=there, other=0.0).to(tl.float32) * 0.5
        va = tl.load(a + row * a_stride + column, mask=there, other=0.0).to(tl.float32)
        vb = tl.load(b + row * b_stride + column, mask=there, other=0.0).to(tl.float32)
        ga, gb = g * wa, g * wb
        aa, ga_a, bb, gb_b = tl.reduce((va * va, ga * va, vb * vb, gb * vb), 1, _add_fours)
        ya, dva = _gradient(va, ga, aa, ga_a, eps, D)
        tl.store(da + row * D + column, dva, mask=there)
        yb, dvb = _gradient(vb, gb, bb, gb_b, eps, D)
        tl.store(db + row * D + column, dvb, mask=there)
        if SUM:
            dwa += g * ya
            dwb += g * yb
    if SUM:
        at = tl.program_id(0) * 2 * D + column
        tl.store(parts + at, tl.sum(dwa, 0)[None, :], mask=column < D)
        tl.store(parts + at + D, tl.sum(dwb, 0)[None, :], mask=column < D)


# ------------------------------------------------------------------------------------- RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    return _rms_norm(x, weight, eps, kind_of(x, weight))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> rms_norm(x + residual), x + residual."""
    return _add_rms_norm(x, residual, weight, eps, kind_of(x, residual, weight))


@operator("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape, dtype=kind)
    _norm_rows(x, None, weight, out, None, eps)
    return out


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=kind)


@operator("add_rms_norm")
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, total = _like_sum(x, residual, weight, eps, kind)
    _norm_rows(x, residual, weight, out, total, eps)
    return out, total


@_add_rms_norm.register_fake
def _like_sum(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=kind), total


def _norm_rows(
    x: Tensor, added: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float
) -> None:
    D = x.shape[-1]
    if not x.numel():
        return
    rows = flat(x)
    more = rows if added is None else flat(added)
    tile = forward_tile(D, 4)
    launch(
        _rms_norm_kernel, (cdiv(len(rows), tile.rows),), rows, more,
        weight.contiguous(), out,
        out if total is None else total, len(rows), rows.stride(0), more.stride(0), eps,
        ADD=added is not None, D=D, ROWS=tile.rows, COLUMNS=tile.columns,
        CHAINED=chains(rows, len(rows)), num_warps=tile.warps,
    )  # fmt: skip


@operator("rms_norm_backward")
def _rms_norm_backward(
    dout: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and, where wanted, dweight; x is the sum where there was one."""
    D = x.shape[-1]
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    rows, g = flat(x), flat(dout)
    more = g if dtotal is None else flat(dtotal)
    tile = backward_tile(D, 4, x.element_size())
    programs = walkers(x.device, tile, len(rows))
    parts = x.new_empty((programs if want_weight else 0, D), dtype=torch.float32)
    launch(
        _rms_norm_backward_kernel, (programs,), g, more, rows, weight.contiguous(), dx, parts,
        len(rows), g.stride(0), more.stride(0), rows.stride(0), eps,
        ADD=dtotal is not None, SUM=want_weight, D=D, ROWS=tile.rows, COLUMNS=tile.columns,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return dx, add_up(parts, weight.dtype) if want_weight else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(
    dout: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float, want_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if want_weight else 0)


def _keep_for_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want = ctx.needs_input_grad[1]
    dx, dweight = _rms_norm_backward(dout, None, x, weight, ctx.eps, want)
    return dx, dweight if want else None, None, None


def _keep_for_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps, _ = inputs
    ctx.kinds = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_gradients(
    ctx: Any, dout: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    d, dweight, want = dtotal, None, ctx.needs_input_grad[2]
    if dout is not None:
        d, dweight = _rms_norm_backward(dout, dtotal, total, weight, ctx.eps, want)
    # One tensor serves both summands.
    dx, dresidual = (None if d is None else d.to(kind) for kind in ctx.kinds)
    return dx, dresidual, dweight if want else None, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep_for_rms_norm)
_add_rms_norm.register_autograd(_add_gradients, setup_context=_keep_for_add)


# ------------------------------------------------------------------------------- head fusion


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Mean of the two normed branches, all (N, E)."""
    given = attention, ssm, attention_weight, ssm_weight
    return _fuse_heads(*given, eps, kind_of(*given))


@operator("fuse_heads")
def _fuse_heads(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float, kind: torch.dtype
) -> Tensor:
    out = a.new_empty(a.shape, dtype=kind)
    if not a.numel():
        return out
    D, rows, others = a.shape[-1], flat(a), flat(b)
    tile = forward_tile(D, 3)
    launch(
        _fuse_kernel, (cdiv(len(rows), tile.rows),), rows, others, a_weight.contiguous(),
        b_weight.contiguous(), out, len(rows), rows.stride(0), others.stride(0), eps,
        ROUNDED=kind in (torch.promote_types(a.dtype, a_weight.dtype), torch.float32), D=D,
        ROWS=tile.rows, COLUMNS=tile.columns, CHAINED=chains(rows, len(rows)),
        num_warps=tile.warps,
        enable_fp_fusion=False,  # a product fused with the sum is not rounded
    )  # fmt: skip
    return out


@_fuse_heads.register_fake
def _(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float, kind: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape, dtype=kind)


@operator("fuse_heads_backward")
def _fuse_heads_backward(
    dout: Tensor,
    a: Tensor,
    b: Tensor,
    a_weight: Tensor,
    b_weight: Tensor,
    eps: float,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """da, db and, where wanted, the weights' gradients (2, E)."""
    da, db, D = a.new_empty(a.shape), b.new_empty(b.shape), a.shape[-1]
    if not a.numel():
        return da, db, a_weight.new_zeros(2, D)
    rows, others, g = flat(a), flat(b), flat(dout)
    tile = backward_tile(D, 5, a.element_size())
    programs = walkers(a.device, tile, len(rows))
    parts = a.new_empty((programs if want_weights else 0, 2, D), dtype=torch.float32)
    launch(
        _fuse_backward_kernel, (programs,), g, rows, others, a_weight.contiguous(),
        b_weight.contiguous(), da, db, parts, len(rows), g.stride(0), rows.stride(0),
        others.stride(0), eps, SUM=want_weights, D=D, ROWS=tile.rows, COLUMNS=tile.columns,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return da, db, add_up(parts, a_weight.dtype) if want_weights else a_weight.new_empty(0)


@_fuse_heads_backward.register_fake
def _(
    dout: Tensor,
    a: Tensor,
    b: Tensor,
    a_weight: Tensor,
    b_weight: Tensor,
    eps: float,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (2, a.shape[-1]) if want_weights else (0,)
    return a.new_empty(a.shape), b.new_empty(b.shape), a_weight.new_empty(shape)


def _keep_for_fusion(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _fusion_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    want = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    da, db, weights = _fuse_heads_backward(dout, *ctx.saved_tensors, ctx.eps, want)
    return da, db, *(weights.unbind() if want else (None, None)), None, None


_fuse_heads.register_autograd(_fusion_gradients, setup_context=_keep_for_fusion)
