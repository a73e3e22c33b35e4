# mypy: allow-untyped-defs, allow-incomplete-defs
"""The selective scan on a GPU: Triton kernels, or the faster CUDA ones where they can be built.

Both are the same function of the same tensors, forward and backward, and are registered here once
as custom ops. The Triton twin is a program for each segment and block of channels that walks the
rows with its states in registers. Forward, for backward, saves the state before every 32 rows;
backward goes tile by tile from the end: forward over the tile to scratch memory, then back.

Bound: by the exponentials (16 a row and channel) forward, by instructions backward; the head of
cuda/scan.cuh has the count, and what the CUDA kernels reach. The Triton twin is 4 times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import scan_cuda
from hymba.ops.backend import cdiv, launch, next_power_of_2, operator, wants_grad
from hymba.ops.segments import Segments

TILE = scan_cuda.TILE
BLOCK = 32  # channels of a program; its states are BLOCK x n registers of one warp


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
    """As `selective_scan_reference` in scan.py. States are float32."""
    save = wants_grad(u, dt, A, B, C, D, z, dt_bias, initial_state)
    dt, B, C, z = (x.to(u.dtype) for x in (dt, B, C, z))  # autocast may mix them
    A = A.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    lengths = list(segments.lengths)
    y, final, _ = _scan(u, dt, A, B, C, D, z, dt_bias, lengths, initial_state, save)
    return y, final


@operator("selective_scan")
def _scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    lengths: Sequence[int],
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments(tuple(lengths))
    if not lengths:
        final = u.new_empty(0, *A.shape, dtype=torch.float32)
        return torch.empty_like(u), final, final.clone()
    u, dt, B, C, z = (scan_cuda.pairs(x) for x in (u, dt, B, C, z))
    if scan_cuda.supports(u, A.shape[1]):
        return scan_cuda.forward(u, dt, A, B, C, D, z, dt_bias, segments, state, save)
    return _forward(u, dt, A, B, C, D, z, dt_bias, segments, state, save)


@_scan.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    lengths: Sequence[int],
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    final = u.new_empty(len(lengths), *A.shape, dtype=torch.float32)
    saved = final.new_empty(_tiles(lengths) if save else 0, *A.shape)
    return torch.empty_like(u, memory_format=torch.contiguous_format), final, saved


def _tiles(lengths: Sequence[int]) -> int:
    return sum(-(-length // TILE) for length in lengths)


@operator("selective_scan_backward")
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    lengths: Sequence[int],
    saved: Tensor,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments = Segments(tuple(lengths))
    u, dt, B, C, z, dy = (scan_cuda.pairs(x) for x in (u, dt, B, C, z, dy))
    run = scan_cuda.backward if scan_cuda.supports(u, A.shape[1]) else _backward
    du, ddt, dA, dBC, dD, dz, dbias, dstate = run(
        dy, dfinal, u, dt, A, B, C, D, z, dt_bias, segments, saved, want_state
    )
    return du, ddt, dA, dBC, dD, dz, dbias, dstate


@_scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    lengths: Sequence[int],
    saved: Tensor,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dz = (x.new_empty(x.shape) for x in (u, dt, z))
    dBC = dfinal.new_empty(B.shape[0], 2 * B.shape[1])
    dD, dbias = dfinal.new_empty(D.shape), dfinal.new_empty(D.shape)
    dstate = dfinal.new_empty(len(lengths) if want_state else 0, *A.shape)
    return du, ddt, dfinal.new_empty(A.shape), dBC, dD, dz, dbias, dstate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, lengths, state, _ = inputs
    ctx.lengths = lengths
    ctx.state_rows = None if state is None else state.shape[0]
    ctx.set_materialize_grads(False)  # of what is saved they would be large
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    u, _, A, B, _, D, _, dt_bias = tensors
    if dy is None:
        dy = torch.zeros_like(u)
    if dfinal is None:
        dfinal = saved.new_zeros(len(ctx.lengths), *A.shape)
    want = ctx.state_rows is not None and ctx.needs_input_grad[9]
    grads = _scan_backward(dy, dfinal, *tensors, ctx.lengths, saved, want)
    du, ddt, dA, dBC, dD, dz, dbias, dstate = grads
    dB, dC = dBC.to(B.dtype).split(B.shape[1], dim=1)
    if want and ctx.state_rows == 1:
        dstate = dstate.sum(0, keepdim=True)
    dD, dbias = dD.to(D.dtype), dbias.to(dt_bias.dtype)
    return du, ddt, dA, dB, dC, dD, dz, dbias, None, dstate if want else None, None


_scan.register_autograd(_differentiate, setup_context=_keep)


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, E), final (S, E, n) and, to `save` for backward, the state before every TILE rows."""
    channels, n, count = u.shape[1], A.shape[1], segments.count
    table = scan_cuda.tables(segments.lengths, scan_cuda.UNCUT, u.device)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = u.new_empty(count, channels, n, dtype=torch.float32)
    saved = final.new_empty(table.tiles if save else 0, channels, n)
    strides = [x.stride(0) for x in (u, dt, z, B, C)]
    shared = state is None or state.shape[0] == 1
    launch(
        _scan_kernel,
        (cdiv(channels, BLOCK), count),
        *(u, dt, z, B, C, A, D, dt_bias, state, segments.offsets(u.device), table.first_tile),
        *(y, final, saved, channels, *strides, 0 if shared else channels * n),
        **{"n": n, "n_pad": next_power_of_2(n), "BLOCK": BLOCK, "TILE": TILE},
        **{"STATE": state is not None, "SAVE": save, "num_warps": 1},
    )
    return y, final, saved


def _backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    saved: Tensor,
    want_state: bool,
) -> tuple[Tensor, ...]:
    """du, ddt, dA, dB and dC side by side, dD, dz, dbias, dstate (S, E, n), which is empty where
    nobody wants it."""
    (rows, channels), n, count = u.shape, A.shape[1], segments.count
    table = scan_cuda.tables(segments.lengths, scan_cuda.UNCUT, u.device)
    du, ddt, dz = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(3))
    blocks, n_pad = cdiv(channels, BLOCK), next_power_of_2(n)
    wide = saved.new_empty
    dBC = wide(blocks, rows, 2 * n)
    dA, dstate = wide(count, channels, n), wide(count if want_state else 0, channels, n)
    dD, dbias = wide(count, channels), wide(count, channels)
    scratch = wide(count, blocks, TILE + 1, BLOCK, n_pad)
    strides = [x.stride(0) for x in (u, dt, z, B, C, dy)]
    launch(
        _scan_backward_kernel,
        (blocks, count),
        *(u, dt, z, B, C, A, D, dt_bias, dy, dfinal.contiguous(), saved, scratch),
        *(segments.offsets(u.device), table.first_tile),
        *(du, ddt, dz, dBC, dA, dD, dbias, dstate, rows, channels, *strides),
        **{"n": n, "n_pad": n_pad, "BLOCK": BLOCK, "TILE": TILE},
        **{"STATE": want_state, "num_warps": 1},
    )
    return du, ddt, dA.sum(0), dBC.sum(0), dD.sum(0), dz, dbias.sum(0), dstate


@triton.jit
def _softplus(x):
    """log(1 + e^x). Near zero the logarithm of 1 + e is inexact; there the series is not."""
    e = tl.exp(tl.minimum(x, 20.0))
    series = e * (1 + e * (-0.5 + e * (1.0 / 3 + e * (-0.25 + e * 0.2))))
    return tl.where(x > 20, x, tl.where(e < 0.0625, series, tl.log(1 + e)))


@triton.jit
def _rates(A, at, mask):
    """A log2(e); -inf is allowed, but 0 times it is not."""
    return tl.maximum(tl.load(A + at, mask, other=0.0) * 1.4426950408889634, -3.4e38)


@triton.jit
def _scan_kernel(
    u, dt, z, B, C, A, D, bias, state, offsets, first_tile, y, final, saved,
    channels, su, sdt, sz, sB, sC, s_state,
    n: tl.constexpr, n_pad: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    STATE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, n_pad)
    here, some = e < channels, k < n
    at, both = e[:, None] * n + k[None, :], here[:, None] & some[None, :]  # (BLOCK, n)
    a2 = _rates(A, at, both)
    d = tl.load(D + e, here, other=0.0).to(tl.float32)
    b0 = tl.load(bias + e, here, other=0.0).to(tl.float32)
    h = tl.zeros((BLOCK, n_pad), tl.float32)
    if STATE:
        h = tl.load(state + s.to(tl.int64) * s_state + at, both, other=0.0)
    first, end = tl.load(offsets + s), tl.load(offsets + s + 1)
    tile = tl.load(first_tile + s).to(tl.int64)
    for t in range(first, end):
        row = tl.cast(t, tl.int64)
        if SAVE:
            if (t - first) % TILE == 0:
                tl.store(saved + tile * channels * n + at, h, both)
                tile += 1
        x = tl.load(u + row * su + e, here, other=0.0).to(tl.float32)
        delta = _softplus(tl.load(dt + row * sdt + e, here, other=0.0).to(tl.float32) + b0)
        gate = tl.load(z + row * sz + e, here, other=0.0).to(tl.float32)
        b = tl.load(B + row * sB + k, some, other=0.0).to(tl.float32)
        c = tl.load(C + row * sC + k, some, other=0.0).to(tl.float32)
        h = tl.exp2(delta[:, None] * a2) * h + (delta * x)[:, None] * b[None, :]
        out = tl.sum(h * c[None, :], 1) + d * x
        tl.store(
            y + row * channels + e, (out * gate * tl.sigmoid(gate)).to(y.dtype.element_ty), here
        )
    tl.store(final + s.to(tl.int64) * channels * n + at, h, both)


@triton.jit
def _scan_backward_kernel(
    u, dt, z, B, C, A, D, bias, dy, dfinal, saved, scratch, offsets, first_tile,
    du, ddt, dz, dBC, dA, dD, dbias, dstate,
    rows, channels, su, sdt, sz, sB, sC, sdy,
    n: tl.constexpr, n_pad: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    s, block = tl.program_id(1), tl.program_id(0)
    e = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, n_pad)
    here, some = e < channels, k < n
    at, both = e[:, None] * n + k[None, :], here[:, None] & some[None, :]  # (BLOCK, n)
    mine = s.to(tl.int64) * channels
    a2 = _rates(A, at, both)
    d = tl.load(D + e, here, other=0.0).to(tl.float32)
    b0 = tl.load(bias + e, here, other=0.0).to(tl.float32)
    first, end = tl.load(offsets + s), tl.load(offsets + s + 1)
    tile0, tile1 = tl.load(first_tile + s), tl.load(first_tile + s + 1)
    # This program's: the state before each row of a tile, (BLOCK, n_pad) each.
    own = scratch + (s * tl.num_programs(0) + block).to(tl.int64) * ((TILE + 1) * BLOCK * n_pad)
    own += tl.arange(0, BLOCK)[:, None] * n_pad + k[None, :]
    partial = dBC + block.to(tl.int64) * rows * 2 * n
    G = tl.load(dfinal + mine * n + at, both, other=0.0)
    sum_A = tl.zeros((BLOCK, n_pad), tl.float32)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for back in range(0, tile1 - tile0):
        tile = tile1 - 1 - back
        begin = first + (tile - tile0) * TILE
        size = tl.minimum(end - begin, TILE)
        h = tl.load(saved + tl.cast(tile, tl.int64) * channels * n + at, both, other=0.0)
        for i in range(0, size):
            row = tl.cast(begin + i, tl.int64)
            tl.store(own + i * (BLOCK * n_pad), h)
            x = tl.load(u + row * su + e, here, other=0.0).to(tl.float32)
            delta = _softplus(tl.load(dt + row * sdt + e, here, other=0.0).to(tl.float32) + b0)
            b = tl.load(B + row * sB + k, some, other=0.0).to(tl.float32)
            h = tl.exp2(delta[:, None] * a2) * h + (delta * x)[:, None] * b[None, :]
        tl.debug_barrier()
        for j in range(0, size):
            i = size - 1 - j
            row = tl.cast(begin + i, tl.int64)
            x = tl.load(u + row * su + e, here, other=0.0).to(tl.float32)
            before = tl.load(dt + row * sdt + e, here, other=0.0).to(tl.float32) + b0
            gate = tl.load(z + row * sz + e, here, other=0.0).to(tl.float32)
            b = tl.load(B + row * sB + k, some, other=0.0).to(tl.float32)
            c = tl.load(C + row * sC + k, some, other=0.0).to(tl.float32)
            pull = tl.load(dy + row * sdy + e, here, other=0.0).to(tl.float32)
            delta, sig = _softplus(before), tl.sigmoid(gate)
            h0 = tl.load(own + i * (BLOCK * n_pad))
            out = tl.sum(h * c[None, :], 1) + d * x
            tl.store(
                dz + row * channels + e,
                (pull * out * sig * (1 + gate * (1 - sig))).to(dz.dtype.element_ty),
                here,
            )
            pull = pull * gate * sig
            g = c[None, :] * pull[:, None] + G
            tl.store(partial + row * 2 * n + k, tl.sum(g * (delta * x)[:, None], 0), some)
            tl.store(partial + row * 2 * n + n + k, tl.sum(h * pull[:, None], 0), some)
            through = tl.sum(g * b[None, :], 1)
            G = g * tl.exp2(delta[:, None] * a2)
            w = G * h0  # dL / d(delta A)
            slope = (x * through + tl.sum(w * a2, 1) * 0.6931471805599453) * tl.sigmoid(before)
            tl.store(ddt + row * channels + e, slope.to(ddt.dtype.element_ty), here)
            grad = delta * through + d * pull
            tl.store(du + row * channels + e, grad.to(du.dtype.element_ty), here)
            sum_A += delta[:, None] * w
            sum_D += pull * x
            sum_bias += slope
            h = h0
        tl.debug_barrier()
    tl.store(dA + mine * n + at, sum_A, both)
    tl.store(dD + mine + e, sum_D, here)
    tl.store(dbias + mine + e, sum_bias, here)
    if STATE:
        tl.store(dstate + mine * n + at, G, both)
