"""The selective scan and the causal convolution before it for a CPU: float32, forward only.

What they compute is in hymba/ops/scan.py and hymba/ops/conv.py. A piece of work is a segment and a
block of channels, walked row by row:

    lanes are 16 channels; a state is one vector for each of the n numbers, kept in the first-level
    cache; B and C of a row are single numbers for all lanes; nothing is summed across lanes

    h_s = 2^(dt A_s log2 e) h_s + (dt u) B_s        y = sum_s C_s h_s       16 instructions for each
                                                                             s, 13 of them the power

so softplus, D and the gate are vectors too, and every number of u, dt, z is read once. Rows lie
kilobytes apart, further than a CPU looks ahead by itself: the walk asks for lines `AHEAD` rows in
front. A row's numbers do not depend on how segments are cut or what is beside them.

Letters: N rows, S segments, E channels, n states a channel, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba.ops.backend import dense_last
from hymba.ops.cpu.compiled import job, kernel
from hymba.ops.cpu.simd import (
    LANES,
    Builder,
    F32x16,
    Floats,
    I32x16,
    Value,
    add,
    broadcast,
    fma,
    ir_constant,
    ir_fma,
    ir_larger,
    load,
    load_first,
    mul,
    operation,
    prefetch,
    read_f32,
    read_i32,
    read_i64,
    silu,
    softplus,
    splat,
    store,
    store_first,
    write_f32,
)
from hymba.ops.cpu.team import Room, claim, finish, team, wait
from hymba.ops.segments import Segments

AHEAD = 6  # rows
GROUP = 8 * LANES  # channels of a piece of the convolution
VECTOR = 4 * LANES  # bytes
# 2^r for |r| <= 1/2, relative error 2e-9, and exactly 1 at 0: a fitted polynomial.
POWER = (1.0, 0.693147206, 0.240226469, 0.0555032878, 0.00961848896, 0.00133999312, 1.5345812e-4)


@operation(Floats, Floats)
def power_of_2(b: Builder, x: Value) -> Value:
    """2^x for x < 128; what is below -126 counts as that; NaN stays."""
    x = ir_larger(b, x, ir_constant(F32x16, -126.0))
    # Added to 1.5 * 2^23 a number is rounded, and stands as an integer in the low bits.
    shifted = b.fadd(x, ir_constant(F32x16, 12582912.0))
    r = b.fsub(x, b.fsub(shifted, ir_constant(F32x16, 12582912.0)))
    p = ir_constant(F32x16, POWER[-1])
    for c in POWER[-2::-1]:
        p = ir_fma(b, p, r, ir_constant(F32x16, c))
    up = b.shl(b.bitcast(shifted, I32x16), ir_constant(I32x16, 23))
    return b.bitcast(b.add(b.bitcast(p, I32x16), up), F32x16)


# ---- the scan ------------------------------------------------------------------------------


@kernel
def _turned(source: int, to: int, channels: int, states: int, times: Any) -> None:
    """source (channels, states) float32 -> to (states, 16), other channels zero."""
    for s in range(states):
        store(to + VECTOR * s, splat(np.float32(0)))
        for c in range(channels):
            write_f32(to + VECTOR * s + 4 * c, times * read_f32(source + 4 * (c * states + s)))


def _walk(whole: bool) -> Any:
    """One segment, 16 channels; or fewer, where not `whole`."""

    @kernel
    def get(address: int, channels: int) -> Any:
        return load(address) if whole else load_first(address, channels)

    @kernel
    def walk(
        first: int, rows: int, at: int, channels: int, states: int, h: int, A: int, arguments: int
    ) -> None:
        """first, rows: of the segment; at: bytes before the channels in a row."""
        u, u_step = read_i64(arguments) + at, read_i64(arguments + 8)
        dt, dt_step = read_i64(arguments + 16) + at, read_i64(arguments + 24)
        z, z_step = read_i64(arguments + 32) + at, read_i64(arguments + 40)
        B, B_step = read_i64(arguments + 48), read_i64(arguments + 56)
        C, C_step = read_i64(arguments + 64), read_i64(arguments + 72)
        y, y_step = read_i64(arguments + 80) + at, read_i64(arguments + 88)
        D = get(read_i64(arguments + 96) + at, channels)
        bias = get(read_i64(arguments + 104) + at, channels)
        for t in range(first, first + rows):
            prefetch(u + (t + AHEAD) * u_step)
            prefetch(dt + (t + AHEAD) * dt_step)
            prefetch(z + (t + AHEAD) * z_step)
            step = softplus(add(get(dt + t * dt_step, channels), bias))
            x = get(u + t * u_step, channels)
            step_x, out = mul(step, x), mul(D, x)
            for s in range(states):
                decay = power_of_2(mul(step, load(A + VECTOR * s)))
                new = mul(step_x, broadcast(B + t * B_step + 4 * s))
                new = fma(decay, load(h + VECTOR * s), new)
                store(h + VECTOR * s, new)
                out = fma(new, broadcast(C + t * C_step + 4 * s), out)
            out = mul(out, silu(get(z + t * z_step, channels)))
            if whole:
                store(y + t * y_step, out)
            else:
                store_first(y + t * y_step, out, channels)

    return walk


_walk_whole, _walk_part = _walk(True), _walk(False)
LOG2_E = np.float32(math.log2(math.e))
ONE = np.float32(1)


@job
def _scan(thread: int, threads: int, phases: int, arguments: int) -> None:
    A, initial = read_i64(arguments + 112), read_i64(arguments + 120)
    initial_step, final = read_i64(arguments + 128), read_i64(arguments + 136)
    offsets, segments = read_i64(arguments + 144), read_i64(arguments + 152)
    channels, states = read_i64(arguments + 160), read_i64(arguments + 168)
    h = read_i64(arguments + 176) + thread * 2 * VECTOR * states
    rates = h + VECTOR * states
    blocks = (channels + LANES - 1) // LANES
    while True:
        piece = claim(phases, 0)
        if piece >= blocks * segments:
            break
        segment, block = piece // blocks, piece % blocks
        c = block * LANES
        count = min(LANES, channels - c)
        _turned(A + 4 * c * states, rates, count, states, LOG2_E)
        if initial:
            start = initial + segment * initial_step + 4 * c * states
            _turned(start, h, count, states, ONE)
        else:
            for s in range(states):
                store(h + VECTOR * s, splat(np.float32(0)))
        first, end = read_i32(offsets + 4 * segment), read_i32(offsets + 4 * segment + 4)
        if count == LANES:
            _walk_whole(first, end - first, 4 * c, count, states, h, rates, arguments)
        else:
            _walk_part(first, end - first, 4 * c, count, states, h, rates, arguments)
        left = final + 4 * (segment * channels + c) * states
        for i in range(count):
            for s in range(states):
                write_f32(left + 4 * (i * states + s), read_f32(h + VECTOR * s + 4 * i))
        finish(phases, 0)
    wait(phases, 0, blocks * segments)


_room = Room()


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
    """As `selective_scan_reference` in hymba/ops/scan.py, for A <= 0 and no gradient."""
    (channels, states), count = A.shape, segments.count
    made = team()
    y = torch.empty(len(u), channels)
    final = torch.empty(count, channels, states)
    # Named, because what a conversion makes must live until the end.
    rows = [dense_last(x.float()) for x in (u, dt, z, B, C)]
    whole = [x.float().contiguous() for x in (D, dt_bias, A)]
    start = None if initial_state is None else initial_state.float().contiguous()
    offsets = segments.offsets("cpu")
    if len(u):
        made.run(
            _scan,
            *(number for x in (*rows, y) for number in (x.data_ptr(), 4 * x.stride(0))),
            *(x.data_ptr() for x in whole),
            *((0, 0) if start is None else (start.data_ptr(), _step(start))),
            *(final.data_ptr(), offsets.data_ptr(), count, channels, states),
            _room.at_least(made.threads * 2 * VECTOR * states),
            threads=_useful(made.threads, len(u) * channels * states),
        )
    return y.to(u.dtype), final


def _step(state: Tensor) -> int:
    """Bytes from one segment's state to the next one's; 0 where all share one."""
    return 4 * state[0].numel() if len(state) > 1 else 0


def _useful(threads: int, numbers: int) -> int:
    """How many threads so much work wants."""
    return min(threads, 1 + numbers // 50_000)


# ---- the convolution -----------------------------------------------------------------------


@kernel
def _before(x: int, x_step: int, state: int, state_step: int, taps: int, t: int) -> int:
    """Address of row t of a segment; those before its first are in the state."""
    return x + t * x_step if t >= 0 else state + (taps - 1 + t) * state_step


def _slide(whole: bool) -> Any:
    """One row, 16 channels; or fewer, where not `whole`."""

    @kernel
    def get(address: int, channels: int) -> Any:
        return load(address) if whole else load_first(address, channels)

    @kernel
    def slide(
        t: int,
        at: int,
        channels: int,
        x: int,
        x_step: int,
        state: int,
        state_step: int,
        weight: int,
        bias: int,
        taps: int,
        to: int,
    ) -> None:
        total = splat(np.float32(0))
        if bias:
            total = get(bias + at, channels)
        for k in range(taps):
            row = _before(x, x_step, state, state_step, taps, t - taps + 1 + k)
            total = fma(get(row + at, channels), get(weight + k * state_step + at, channels), total)
        total = silu(total)
        if whole:
            store(to + at, total)
        else:
            store_first(to + at, total, channels)

    return slide


_slide_whole, _slide_part = _slide(True), _slide(False)


@job
def _conv(thread: int, threads: int, phases: int, arguments: int) -> None:
    x, x_step = read_i64(arguments), read_i64(arguments + 8)
    weight, bias = read_i64(arguments + 16), read_i64(arguments + 24)
    states, states_step = read_i64(arguments + 32), read_i64(arguments + 40)
    y, final = read_i64(arguments + 48), read_i64(arguments + 56)
    offsets, segments = read_i64(arguments + 64), read_i64(arguments + 72)
    channels, taps = read_i64(arguments + 80), read_i64(arguments + 88)
    groups, step = (channels + GROUP - 1) // GROUP, 4 * channels
    while True:
        piece = claim(phases, 0)
        if piece >= groups * segments:
            break
        segment, begin = piece // groups, piece % groups * GROUP
        end = min(channels, begin + GROUP)
        first, last = read_i32(offsets + 4 * segment), read_i32(offsets + 4 * segment + 4)
        start, state, to = x + first * x_step, states + segment * states_step, y + first * step
        rows = last - first
        for t in range(rows):
            for c in range(begin, end, LANES):
                if c + LANES <= end:
                    _slide_whole(
                        *(t, 4 * c, LANES, start, x_step, state, step),
                        *(weight, bias, taps, to + t * step),
                    )
                else:
                    _slide_part(
                        *(t, 4 * c, end - c, start, x_step, state, step),
                        *(weight, bias, taps, to + t * step),
                    )
        for k in range(taps - 1):
            row = _before(start, x_step, state, step, taps, rows - taps + 1 + k)
            left = final + (segment * (taps - 1) + k) * step
            for c in range(begin, end, LANES):
                count = min(LANES, end - c)
                store_first(left + 4 * c, load_first(row + 4 * c, count), count)
        finish(phases, 0)
    wait(phases, 0, groups * segments)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `causal_conv_reference` in hymba/ops/conv.py, for no gradient."""
    channels, taps = weight.shape
    made, count = team(), segments.count
    y, final = torch.empty(len(x), channels), torch.empty(count, taps - 1, channels)
    wide = dense_last(x.float())
    columns = weight.float().t().contiguous()  # (K, E)
    start = x.new_zeros(1, taps - 1, channels) if initial_state is None else initial_state
    start = start.to(x.dtype).float().contiguous()
    more = None if bias is None else bias.float().contiguous()
    offsets = segments.offsets("cpu")
    if len(x):
        made.run(
            _conv,
            *(wide.data_ptr(), 4 * wide.stride(0), columns.data_ptr()),
            *(0 if more is None else more.data_ptr(), start.data_ptr(), _step(start)),
            *(y.data_ptr(), final.data_ptr(), offsets.data_ptr(), count, channels, taps),
            threads=_useful(made.threads, len(x) * channels * taps),
        )
    return y.to(x.dtype), final.to(x.dtype)
