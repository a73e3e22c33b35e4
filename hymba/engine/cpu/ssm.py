"""The SSM branch of a decode step, in two phases of pieces that any thread may take.

    convolve  some channels: u = silu(conv), the kept inputs move on by one, where they lie, and
              what these channels give to x_proj's outputs
    scan      some channels: dt from its low rank, states h = exp(dt A) h + dt u B where they lie,
              y = (C h + D u) silu(gate)

A piece has all rows, so that weights are read once. A channel's n states are vectors of 16, the
last one partly used where n is no multiple. The sums of x_proj's parts are made anew by each piece
of the scan, in the same order: that is cheaper than to wait for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hymba.engine.cpu.layout import SPAN
from hymba.engine.cpu.product import TILE, make_ready, multiply, multiply_columns
from hymba.engine.cpu.rows import row, scale_of
from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.simd import (
    add,
    exp,
    fma,
    load,
    load_first,
    mul,
    read_f32,
    silu,
    softplus,
    splat,
    store,
    store_first,
    total,
    write_f32,
)

CHANNELS = 4 * SPAN  # in a piece of the convolution
SCAN_TILES = 4  # of 32 channels, in a piece of the scan
ZERO = np.float32(0)


# ---- convolution and x_proj ----------------------------------------------------------------


@kernel
def conv_pieces(ssm: Any) -> Any:
    return (ssm.channels + CHANNELS - 1) // CHANNELS


@kernel
def convolve(model: Any, ssm: Any, piece: int, scratch: int) -> None:
    start, end = piece * CHANNELS, min((piece + 1) * CHANNELS, ssm.channels)
    for index in range(model.rows):
        kept = ssm.conv + row(model, index).slot * ssm.conv_slot
        proj, u = model.proj + index * model.proj_stride, model.u + index * model.u_stride
        _convolve(ssm, kept, proj + ssm.u_at, u, start, end)
    low = model.low + piece * model.low_part
    values, room = model.u + 4 * start, 2 * CHANNELS
    multiply_columns(
        ssm.x_proj,
        start,
        end,
        values,
        model.u_stride,
        scratch,
        room,
        model.rows,
        low,
        model.low_stride,
    )


@kernel
def _convolve(ssm: Any, kept: int, proj: int, u: int, start: int, end: int) -> None:
    """kept (K-1, E), the oldest first; u is zeros behind the last channel, to a whole group."""
    taps, wide, channels = ssm.taps, 4 * ssm.padded, ssm.channels
    for i in range(start, (end + SPAN - 1) // SPAN * SPAN, 16):
        count, weight = channels - i, ssm.conv_weight + 4 * i
        sums = load(ssm.conv_bias + 4 * i)
        for k in range(taps - 1):
            at = kept + 4 * (k * channels + i)
            x = load_first(at, count)
            sums = fma(x, load(weight + k * wide), sums)
            if k:
                store_first(at - 4 * channels, x, count)
        x = load_first(proj + 4 * i, count)
        if taps > 1:
            store_first(kept + 4 * ((taps - 2) * channels + i), x, count)
        store(u + 4 * i, silu(fma(x, load(weight + (taps - 1) * wide), sums)))


# ---- scan ----------------------------------------------------------------------------------


@kernel
def scan_pieces(ssm: Any) -> Any:
    return (ssm.dt_proj.tiles + SCAN_TILES - 1) // SCAN_TILES


@kernel
def scan(model: Any, ssm: Any, piece: int, scratch: int) -> None:
    """scratch, for each row: dt's low rank and that in int8 | B | C"""
    tile = piece * SCAN_TILES
    tile_end = min(tile + SCAN_TILES, ssm.dt_proj.tiles)
    start, end = TILE * tile, min(TILE * tile_end, ssm.channels)
    padded = (ssm.rank + SPAN - 1) // SPAN * SPAN
    stride = 8 * padded + 8 * ssm.states_padded
    for index in range(model.rows):
        low = model.low + index * model.low_stride
        _low(model, ssm, low, scratch + index * stride, padded)
    ready = scratch + 4 * padded
    multiply(
        ssm.dt_proj, tile, tile_end, scratch, ready, stride, model.rows, model.dt, model.dt_stride
    )
    for index in range(model.rows):
        u, dt = model.u + index * model.u_stride, model.dt + index * model.dt_stride
        states = ssm.state + row(model, index).slot * ssm.state_slot
        B = scratch + index * stride + 8 * padded
        y = model.mix + index * model.mix_stride + ssm.y_at
        gate = model.proj + index * model.proj_stride + ssm.gate_at
        _scan(ssm, u, dt, B, B + 4 * ssm.states_padded, states, start, end)
        for i in range(start, end, 16):
            count = end - i
            out = fma(load_first(u + 4 * i, count), load(ssm.D + 4 * i), load(dt + 4 * i))
            out = mul(out, silu(load_first(gate + 4 * i, count)))
            store_first(y + 4 * i, out, count)


@kernel
def _low(model: Any, ssm: Any, low: int, scratch: int, padded: int) -> None:
    """A row of what x_proj gave, its parts added up; its three norms, dt's ready for dt_proj."""
    rank, states = ssm.rank, ssm.states
    size, parts = rank + 2 * states, conv_pieces(ssm)
    B = scratch + 8 * padded
    whole = B + 8 * ssm.states_padded  # for now: where the next row begins, or behind the last
    for c in range(0, 4 * size, 64):
        sums = load(low + c)
        for part in range(1, parts):
            sums = add(sums, load(low + part * model.low_part + c))
        store(whole + c, sums)
    _norm(whole, rank, ssm.dt_norm, model.eps, scratch, padded)
    make_ready(ssm.dt_proj, scratch, scratch + 4 * padded, 0, rank)
    at = whole + 4 * rank
    _norm(at, states, ssm.B_norm, model.eps, B, ssm.states_padded)
    at += 4 * states
    _norm(at, states, ssm.C_norm, model.eps, B + 4 * ssm.states_padded, ssm.states_padded)


@kernel
def _norm(x: int, size: int, weight: int, eps: float, out: int, padded: int) -> None:
    scale = splat(scale_of(x, size, eps))
    for c in range(0, padded, 16):
        value = mul(load_first(x + 4 * c, size - c), scale)
        store(out + 4 * c, mul(value, load(weight + 4 * c)))


@kernel
def _scan(ssm: Any, u: int, dt: int, B: int, C: int, states: int, start: int, end: int) -> None:
    """dt is what dt_proj gave, and becomes C h."""
    n, padded = ssm.states, ssm.states_padded
    whole = 4 * (n // 16 * 16)
    for i in range(start, end, 16):
        at = dt + 4 * i
        store(at, softplus(add(load(at), load(ssm.dt_bias + 4 * i))))
    for i in range(start, end):
        step = read_f32(dt + 4 * i)
        rate, drive, sums = splat(step), splat(step * read_f32(u + 4 * i)), splat(ZERO)
        state, A = states + 4 * i * n, ssm.A + 4 * i * padded
        for c in range(0, whole, 64):
            h = mul(load(state + c), exp(mul(rate, load(A + c))))
            h = fma(drive, load(B + c), h)
            store(state + c, h)
            sums = fma(h, load(C + c), sums)
        if whole < 4 * n:
            h = mul(load_first(state + whole, n % 16), exp(mul(rate, load(A + whole))))
            h = fma(drive, load(B + whole), h)
            store_first(state + whole, h, n % 16)
            sums = fma(h, load(C + whole), sums)
        write_f32(dt + 4 * i, total(sums))
