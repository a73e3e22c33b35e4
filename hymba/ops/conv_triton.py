# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Causal depthwise convolution and SiLU over segments, every row read once.

What bounds it: bytes. Forward reads x and writes out; backward reads x and dout and writes dx,
computing the sum before the SiLU again. How far from it, on an H200: 67 to 85 % of copy bandwidth
forward, 40 to 68 % backward (8192 to 32768 rows).

A program walks down some rows of BLOCK_E channels with the last K - 1 inputs in registers
(`window`), so a tap costs a multiply-add and no load; GROUP rows are fetched ahead of the walk.
Where a segment ends, the window is what it leaves, and the next segment's state takes its place.

Backward walks the same way. A segment's state and inputs are one line of K - 1 + T places, and row
r touches places r .. r + K - 1; `carry` holds what places r .. r + K - 2 have got so far. Place r
is complete after row r and is written: to dx, or, the first K - 1 of a segment, to the state's
gradient. So that dx is complete a program walks up to K - 1 rows into the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, dense_last, launch, next_power_of_2, operator
from hymba.ops.partials_triton import add_up, processors
from hymba.ops.segments import Segments


class Tile(NamedTuple):
    rows: int  # of a program
    channels: int  # of a program
    group: int  # rows fetched ahead
    warps: int
    registers: int | None = None  # of a thread, at most


def forward_tile(rows: int, channels: int, device: torch.device) -> Tile:
    return Tile(rows_each(rows, channels, device, 56), block(channels), 4, 1)


def backward_tile(rows: int, channels: int, device: torch.device) -> Tile:
    return Tile(rows_each(rows, channels, device, 32), block(channels), 2, 1, 128)


def block(channels: int) -> int:
    """Four for each thread of a warp: more do not fit into its registers."""
    return min(128, max(16, next_power_of_2(channels)))


def rows_each(rows: int, channels: int, device: torch.device, programs: int) -> int:
    """Rows of a program, where each multiprocessor is to have so many programs. A multiple of 16,
    so that kernels are compiled once."""
    most = max(1, processors(device) * programs // cdiv(channels, block(channels)))
    return cdiv(cdiv(rows, most), 16) * 16


# -------------------------------------------------------------------------------------- kernels
# Widths and strides are constants of a model, and of the kernels: addresses are then immediate
# offsets, which a walk this short of arithmetic can tell.


@triton.jit
def _sigmoid(y):
    """A reciprocal root, squared: a division would be several times as many instructions."""
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * y))
    return root * root


@triton.jit
def _mask(e, condition, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Channels that exist, or none; one comparison, or only the condition where all exist."""
    if E % BLOCK_E == 0:
        return tl.zeros_like(e) < tl.where(condition, 1, 0)
    else:
        return e < tl.where(condition, E, 0)


@triton.jit
def _window(
    x, state, row, start, segment, e, there, state_stride,
    E: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The K - 1 inputs before `row`, of its segment or of what lies before that."""
    window = ()
    for i in tl.static_range(K - 1):
        before = row - (K - 1) + i
        at = tl.maximum(before, 0).to(tl.int64) * STRIDE
        inside = e < tl.where(there & (before >= start), E, 0)
        value = tl.load(x + at + e, mask=inside, other=0.0).to(tl.float32)
        if STATE:
            at = segment.to(tl.int64) * state_stride + (before - start + K - 1) * E + e
            inside = e < tl.where(there & (before < start), E, 0)
            held = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
            value += held.to(x.dtype.element_ty).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, owners, offsets, state, out, final, rows, count, state_stride, each,
    E: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    BIAS: tl.constexpr, STATE: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    first = tl.program_id(0) // BLOCKS * each
    last = tl.minimum(first + each, rows)
    e = tl.program_id(0) % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    x_here = x + first.to(tl.int64) * STRIDE + e
    ahead = ()
    for u in tl.static_range(GROUP):
        there = _mask(e, first + u < last, E, BLOCK_E)
        ahead = ahead + (tl.load(x_here + u * STRIDE, mask=there),)
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + e * K + j, mask=inside, other=0.0).to(tl.float32),)
    base = tl.zeros((BLOCK_E,), tl.float32)
    if BIAS:
        base += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)

    segment = tl.load(owners + first)
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    window = _window(x, state, first, start, segment, e, True, state_stride, E, K, STATE, STRIDE)
    end = tl.where(end <= last, end, -1)  # of interest only if it is met here
    out_here = out + first.to(tl.int64) * E + e
    for group in range(0, last - first, GROUP):
        now = ahead
        ahead = ()
        x_here += GROUP * STRIDE
        for u in tl.static_range(GROUP):
            there = _mask(e, first + group + GROUP + u < last, E, BLOCK_E)
            ahead = ahead + (tl.load(x_here + u * STRIDE, mask=there),)
        for u in tl.static_range(GROUP):
            row = first + group + u
            line = window + (now[u].to(tl.float32),)
            y = base
            for j in tl.static_range(K):
                y += taps[j] * line[j]
            tl.store(out_here + u * E, y * _sigmoid(y), mask=_mask(e, row < last, E, BLOCK_E))
            window = line[1:]
            if row + 1 == end:
                for i in tl.static_range(K - 1):
                    at = (segment.to(tl.int64) * (K - 1) + i) * E + e
                    tl.store(final + at, window[i], mask=inside)
                segment += 1
                more = segment < count
                window = _window(
                    x, state, end, end, segment, e, more, state_stride, E, K, STATE, STRIDE
                )
                end = tl.load(offsets + segment + 1, mask=more, other=-1)
                end = tl.where(end <= last, end, -1)
        out_here += GROUP * E


@triton.jit
def _conv_backward_kernel(
    dout, dfinal, x, weight, bias, owners, offsets, state, dx, dstate, parts,
    rows, count, state_stride, each,
    E: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr,
    BIAS: tl.constexpr, STATE: tl.constexpr,
    FINAL: tl.constexpr, DSTATE: tl.constexpr, SUM: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    chunk = tl.program_id(0) // BLOCKS
    first = chunk * each
    last = tl.minimum(first + each, rows)
    e = tl.program_id(0) % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    zero = tl.zeros((BLOCK_E,), tl.float32)
    taps = ()
    dtaps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + e * K + j, mask=inside, other=0.0).to(tl.float32),)
        dtaps = dtaps + (zero,)
    dbias = zero
    base = zero
    if BIAS:
        base += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)

    segment = tl.load(owners + first)
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    # Rows up to which this program walks, so that its last row of dx is complete.
    stop = tl.minimum(last + K - 1, tl.load(offsets + tl.load(owners + last - 1) + 1))
    low = tl.maximum(first, start)  # dx from here on is this program's and this segment's
    # Places of the state are complete before row `young`, if the segment begins here.
    young = tl.where(start >= first, start + K - 1, 0)
    window = _window(x, state, first, start, segment, e, True, state_stride, E, K, STATE, STRIDE)
    carry = ()
    for _ in tl.static_range(K - 1):
        carry = carry + (zero,)
    x_here = x + first.to(tl.int64) * STRIDE + e
    d_here = dout + first.to(tl.int64) * DOUT_STRIDE + e
    dx_here = dx + (first.to(tl.int64) - (K - 1)) * E + e
    x_ahead = ()
    d_ahead = ()
    for u in tl.static_range(GROUP):
        there = _mask(e, first + u < stop, E, BLOCK_E)
        x_ahead = x_ahead + (tl.load(x_here + u * STRIDE, mask=there, other=0.0),)
        d_ahead = d_ahead + (tl.load(d_here + u * DOUT_STRIDE, mask=there, other=0.0),)
    for group in range(0, stop - first, GROUP):
        x_now = x_ahead
        d_now = d_ahead
        x_ahead = ()
        d_ahead = ()
        x_here += GROUP * STRIDE
        d_here += GROUP * DOUT_STRIDE
        for u in tl.static_range(GROUP):
            there = _mask(e, first + group + GROUP + u < stop, E, BLOCK_E)
            x_ahead = x_ahead + (tl.load(x_here + u * STRIDE, mask=there, other=0.0),)
            d_ahead = d_ahead + (tl.load(d_here + u * DOUT_STRIDE, mask=there, other=0.0),)
        for u in tl.static_range(GROUP):
            row = first + group + u
            line = window + (x_now[u].to(tl.float32),)
            y = base
            for j in tl.static_range(K):
                y += taps[j] * line[j]
            s = _sigmoid(y)
            g = d_now[u].to(tl.float32) * (s + y * (s - s * s))
            if SUM:
                own = tl.where(row < last, g, 0.0)
                dbias += own
                sums = ()
                for j in tl.static_range(K):
                    sums = sums + (dtaps[j] + own * line[j],)
                dtaps = sums
            places = ()
            for j in tl.static_range(K - 1):
                places = places + (carry[j] + taps[j] * g,)
            places = places + (taps[K - 1] * g,)
            mine = (row >= low + K - 1) & (row < last + K - 1)
            tl.store(dx_here + u * E, places[0], mask=_mask(e, mine, E, BLOCK_E))
            if DSTATE:
                if row < young:
                    at = (segment.to(tl.int64) * (K - 1) + row - start) * E + e
                    tl.store(dstate + at, places[0], mask=inside)
            window = line[1:]
            carry = places[1:]
            if row + 1 == end:
                for i in tl.static_range(K - 1):  # what no later row adds to: places of rows + i
                    value = carry[i]
                    at = (segment.to(tl.int64) * (K - 1) + i) * E + e
                    if FINAL:
                        value += tl.load(dfinal + at, mask=inside, other=0.0).to(tl.float32)
                    place = end + i
                    mine = (place >= low + K - 1) & (place < last + K - 1)
                    there = _mask(e, mine, E, BLOCK_E)
                    tl.store(dx_here + (u + 1 + i) * E, value, mask=there)
                    if DSTATE:
                        at = (segment.to(tl.int64) * (K - 1) + place - start) * E + e
                        tl.store(dstate + at, value, mask=_mask(e, place < young, E, BLOCK_E))
                segment += 1
                more = segment < count
                start = end
                low = tl.maximum(first, start)
                young = tl.where(start < last, start + K - 1, 0)
                window = _window(
                    x, state, start, start, segment, e, more, state_stride, E, K, STATE, STRIDE
                )
                end = tl.load(offsets + segment + 1, mask=more, other=-1)
                carry = ()
                for _ in tl.static_range(K - 1):
                    carry = carry + (zero,)
        dx_here += GROUP * E
    if SUM:
        at = chunk.to(tl.int64) * (K + 1) * E + e
        for j in tl.static_range(K):
            tl.store(parts + at + j * E, dtaps[j], mask=inside)
        tl.store(parts + at + K * E, dbias, mask=inside)


# ------------------------------------------------------------------------------------------ op


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, E), weight (E, K), bias (E), initial_state (S or 1, K-1, E).

    Returns out (N, E) and the last K-1 inputs of each segment (S, K-1, E)."""
    return _causal_conv(x, weight, bias, list(segments.lengths), initial_state)


@operator("causal_conv")
def _causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    segments, (rows, channels) = Segments(tuple(lengths)), x.shape
    out, final = _like(x, weight, bias, lengths, initial_state)
    if not x.numel():
        return out, final
    x, state, weight = dense_last(x), _states(initial_state), weight.contiguous()
    tile = forward_tile(rows, channels, x.device)
    launch(
        _conv_forward_kernel, _grid(tile, rows, channels), x, weight,
        weight if bias is None else bias, segments.owners(x.device),
        segments.offsets(x.device), x if state is None else state, out, final,
        rows, segments.count, _state_stride(state), tile.rows,
        E=channels, K=weight.shape[1], STRIDE=x.stride(0),
        BIAS=bias is not None, STATE=_has_places(state), BLOCK_E=tile.channels,
        GROUP=tile.group, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    return out, final


@_causal_conv.register_fake
def _like(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    left = len(lengths), weight.shape[1] - 1, x.shape[1]
    return x.new_empty(x.shape), x.new_empty(left)


def _states(state: Tensor | None) -> Tensor | None:
    """One contiguous (K-1, E) after the other, or a single one."""
    if state is None:
        return None
    one = state[:1] if state.stride(0) == 0 else state
    return one.contiguous()


def _state_stride(state: Tensor | None) -> int:
    """From one segment's to the next; 0 where one serves all."""
    return 0 if state is None or len(state) == 1 else state.stride(0)


def _has_places(state: Tensor | None) -> bool:
    return state is not None and state.numel() > 0


def _grid(tile: Tile, rows: int, channels: int) -> tuple[int]:
    return (cdiv(rows, tile.rows) * cdiv(channels, tile.channels),)


@operator("causal_conv_backward")
def _causal_conv_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    initial_state: Tensor | None,
    want_weights: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradients of taps and bias (K+1, E), and of the state."""
    segments, (rows, channels), K = Segments(tuple(lengths)), x.shape, weight.shape[1]
    dx, state = x.new_empty(x.shape), _states(initial_state)
    want_state = want_state and _has_places(state)
    if not x.numel():
        shape = initial_state.shape if want_state and initial_state is not None else (0,)
        dweights = weight.new_zeros((K + 1, channels) if want_weights else 0)
        return dx, dweights, x.new_zeros(shape)
    tile = backward_tile(rows, channels, x.device)
    chunks = cdiv(rows, tile.rows) if want_weights else 0
    parts = x.new_empty((chunks, K + 1, channels), dtype=torch.float32)
    dstate = x.new_empty(
        (segments.count if want_state else 0, K - 1, channels), dtype=torch.float32
    )
    x, dout, weight = dense_last(x), dense_last(dout), weight.contiguous()
    launch(
        _conv_backward_kernel, _grid(tile, rows, channels), dout,
        dout if dfinal is None else dfinal.contiguous(), x, weight,
        weight if bias is None else bias, segments.owners(x.device),
        segments.offsets(x.device), x if state is None else state, dx, dstate, parts,
        rows, segments.count, _state_stride(state), tile.rows,
        E=channels, K=K, STRIDE=x.stride(0), DOUT_STRIDE=dout.stride(0),
        BIAS=bias is not None, STATE=_has_places(state), FINAL=dfinal is not None,
        DSTATE=want_state, SUM=want_weights, BLOCK_E=tile.channels,
        GROUP=tile.group, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    dweights = add_up(parts, weight.dtype) if want_weights else weight.new_empty(0)
    return dx, dweights, _sum_states(dstate, initial_state) if want_state else x.new_empty(0)


def _sum_states(dstate: Tensor, state: Tensor | None) -> Tensor:
    """dstate (S, K-1, E) in the state's shape and dtype."""
    assert state is not None
    if len(state) == 1 and len(dstate) > 1:
        return dstate.sum(0, keepdim=True).to(state.dtype)
    return dstate.to(state.dtype)


@_causal_conv_backward.register_fake
def _(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    initial_state: Tensor | None,
    want_weights: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweights = weight.new_empty((weight.shape[1] + 1, x.shape[1]) if want_weights else 0)
    dstate = x.new_empty(0)
    if want_state and initial_state is not None and initial_state.numel() > 0:
        dstate = torch.empty_like(initial_state)
    return x.new_empty(x.shape), dweights, dstate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.lengths, state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, state)


def _gradients(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state = ctx.saved_tensors
    _, want_weight, want_bias, _, want_state = ctx.needs_input_grad
    if dout is None:
        dout = torch.zeros_like(x)
    dx, dweights, dstate = _causal_conv_backward(
        dout, dfinal, x, weight, bias, ctx.lengths, state, want_weight or want_bias, want_state
    )
    dweight = dweights[:-1].T if want_weight else None
    dbias = dweights[-1].to(bias.dtype) if want_bias else None
    if want_state and not dstate.numel():  # one tap, no state
        dstate = torch.zeros_like(state)
    return dx, dweight, dbias, None, dstate if want_state else None


_causal_conv.register_autograd(_gradients, setup_context=_keep)
