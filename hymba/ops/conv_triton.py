# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
"""Causal depthwise convolution and SiLU over segments, every row read once.

What bounds it: bytes. Forward reads x and writes out; backward reads x and dout and writes dx,
computing the sum before the SiLU again. How far from it: TODO.

A program walks down BLOCK_T rows of BLOCK_E channels with the last K - 1 inputs in registers
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

from hymba.ops.backend import launch
from hymba.ops.partials_triton import add_up
from hymba.ops.segments import Segments


class Tile(NamedTuple):
    rows: int  # BLOCK_T
    channels: int  # BLOCK_E
    group: int
    warps: int


def forward_tile(rows: int, channels: int) -> Tile:
    return Tile(32, min(512, max(16, triton.next_power_of_2(channels))), 4, 2)


def backward_tile(rows: int, channels: int) -> Tile:
    return Tile(64, min(256, max(16, triton.next_power_of_2(channels))), 4, 2)


# -------------------------------------------------------------------------------------- kernels


@triton.jit
def _where(e, channels, condition):
    """Channels that exist, or none: a mask, as one comparison."""
    return e < tl.where(condition, channels, 0)


@triton.jit
def _window(
    x, state, row, start, segment, e, channels, stride, state_stride,
    K: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The K - 1 inputs before `row`, of its segment or of what lies before that."""
    window = ()
    for i in tl.static_range(K - 1):
        before = row - (K - 1) + i
        at = tl.maximum(before, 0).to(tl.int64) * stride
        there = _where(e, channels, before >= start)
        value = tl.load(x + at + e, mask=there, other=0.0).to(tl.float32)
        if STATE:
            at = segment.to(tl.int64) * state_stride + (before - start + K - 1) * channels + e
            there = _where(e, channels, before < start)
            held = tl.load(state + at, mask=there, other=0.0).to(tl.float32)
            value += held.to(x.dtype.element_ty).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _forward_kernel(
    x, weight, bias, owners, offsets, state, out, final,
    rows, count, channels, stride, state_stride,
    K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_E)
    first = tl.program_id(0) // blocks * BLOCK_T
    last = tl.minimum(first + BLOCK_T, rows)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < channels
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + e * K + j, mask=inside, other=0.0).to(tl.float32),)
    base = tl.zeros((BLOCK_E,), tl.float32)
    if BIAS:
        base += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)

    segment = tl.load(owners + first)
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    window = _window(
        x, state, first, start, segment, e, channels, stride, state_stride, K, STATE
    )
    x_here = x + first.to(tl.int64) * stride + e
    out_here = out + first.to(tl.int64) * channels + e
    ahead = ()
    for u in tl.static_range(GROUP):
        there = _where(e, channels, first + u < last)
        ahead = ahead + (tl.load(x_here + u * stride, mask=there),)
    for group in range(0, last - first, GROUP):
        now = ahead
        ahead = ()
        for u in tl.static_range(GROUP):
            t = group + GROUP + u
            there = _where(e, channels, first + t < last)
            ahead = ahead + (tl.load(x_here + t * stride, mask=there),)
        for u in tl.static_range(GROUP):
            t = group + u
            row = first + t
            line = window + (now[u].to(tl.float32),)
            y = base
            for j in tl.static_range(K):
                y += taps[j] * line[j]
            there = _where(e, channels, row < last)
            tl.store(out_here + t * channels, y * tl.sigmoid(y), mask=there)
            window = line[1:]
            if (row + 1 == end) & (row < last):
                for i in tl.static_range(K - 1):
                    at = (segment.to(tl.int64) * (K - 1) + i) * channels + e
                    tl.store(final + at, window[i], mask=inside)
                segment += 1
                more = segment < count
                end = tl.load(offsets + segment + 1, mask=more, other=-1)
                window = _window(
                    x, state, row + 1, row + 1, segment, e, tl.where(more, channels, 0),
                    stride, state_stride, K, STATE,
                )  # fmt: skip


@triton.jit
def _backward_kernel(
    dout, dfinal, x, weight, bias, owners, offsets, state, dx, dstate, parts,
    rows, count, channels, dout_stride, stride, state_stride,
    K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    FINAL: tl.constexpr, DSTATE: tl.constexpr, SUM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_E)
    chunk = tl.program_id(0) // blocks
    first = chunk * BLOCK_T
    last = tl.minimum(first + BLOCK_T, rows)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < channels
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
    window = _window(
        x, state, first, start, segment, e, channels, stride, state_stride, K, STATE
    )
    carry = ()
    for _ in tl.static_range(K - 1):
        carry = carry + (zero,)
    x_ahead = ()
    d_ahead = ()
    x_here = x + first.to(tl.int64) * stride + e
    d_here = dout + first.to(tl.int64) * dout_stride + e
    dx_here = dx + first.to(tl.int64) * channels + e
    for t in tl.static_range(GROUP):
        there = _where(e, channels, first + t < stop)
        x_ahead = x_ahead + (tl.load(x_here + t * stride, mask=there, other=0.0),)
        d_ahead = d_ahead + (tl.load(d_here + t * dout_stride, mask=there, other=0.0),)
    for group in range(0, stop - first, GROUP):
        x_now = x_ahead
        d_now = d_ahead
        x_ahead = ()
        d_ahead = ()
        for u in tl.static_range(GROUP):
            t = group + GROUP + u
            there = _where(e, channels, first + t < stop)
            x_ahead = x_ahead + (tl.load(x_here + t * stride, mask=there, other=0.0),)
            d_ahead = d_ahead + (tl.load(d_here + t * dout_stride, mask=there, other=0.0),)
        for u in tl.static_range(GROUP):
            t = group + u
            row = first + t
            line = window + (x_now[u].to(tl.float32),)
            y = base
            for j in tl.static_range(K):
                y += taps[j] * line[j]
            s = tl.sigmoid(y)
            g = d_now[u].to(tl.float32) * s * (1 + y * (1 - s))
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
            target = row - (K - 1)
            mine = (target >= tl.maximum(first, start)) & (target < last)
            there = _where(e, channels, mine)
            tl.store(dx_here + (t - (K - 1)) * channels, places[0], mask=there)
            if DSTATE:
                if (target < start) & (start >= first) & (start < last):
                    at = (segment.to(tl.int64) * (K - 1) + row - start) * channels + e
                    tl.store(dstate + at, places[0], mask=inside)
            window = line[1:]
            carry = places[1:]
            if (row + 1 == end) & (row < stop):
                for i in tl.static_range(K - 1):
                    value = carry[i]
                    at = (segment.to(tl.int64) * (K - 1) + i) * channels + e
                    if FINAL:
                        value += tl.load(dfinal + at, mask=inside, other=0.0).to(tl.float32)
                    target = end - (K - 1) + i
                    mine = (target >= tl.maximum(first, start)) & (target < last)
                    there = _where(e, channels, mine)
                    tl.store(dx_here + (t - (K - 2) + i) * channels, value, mask=there)
                    if DSTATE:
                        mine = (target < start) & (start >= first) & (start < last)
                        place = segment.to(tl.int64) * (K - 1) + (target - start + K - 1)
                        tl.store(dstate + place * channels + e, value, mask=_where(e, channels, mine))
                segment += 1
                more = segment < count
                start = end
                end = tl.load(offsets + segment + 1, mask=more, other=-1)
                window = _window(
                    x, state, start, start, segment, e, tl.where(more, channels, 0),
                    stride, state_stride, K, STATE,
                )  # fmt: skip
                carry = ()
                for _ in tl.static_range(K - 1):
                    carry = carry + (zero,)
    if SUM:
        at = chunk.to(tl.int64) * (K + 1) * channels + e
        for j in tl.static_range(K):
            tl.store(parts + at + j * channels, dtaps[j], mask=inside)
        tl.store(parts + at + K * channels, dbias, mask=inside)


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


@torch.library.custom_op("hymba::causal_conv", mutates_args=())
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
    x, state, weight = _rows(x), _states(initial_state), weight.contiguous()
    tile = forward_tile(rows, channels)
    launch(
        _forward_kernel, _grid(tile, rows, channels), x, weight, weight if bias is None else bias,
        segments.owners(x.device), segments.offsets(x.device), x if state is None else state,
        out, final, rows, segments.count, channels, x.stride(0), _state_stride(state),
        K=weight.shape[1], BIAS=bias is not None, STATE=_has_places(state),
        BLOCK_T=tile.rows, BLOCK_E=tile.channels, GROUP=tile.group, num_warps=tile.warps,
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


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


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
    return (triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.channels),)


@torch.library.custom_op("hymba::causal_conv_backward", mutates_args=())
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
    tile = backward_tile(rows, channels)
    chunks = triton.cdiv(rows, tile.rows) if want_weights else 0
    parts = x.new_empty((chunks, K + 1, channels), dtype=torch.float32)
    dstate = x.new_empty(
        (segments.count if want_state else 0, K - 1, channels), dtype=torch.float32
    )
    if x.numel():
        x, dout, weight = _rows(x), _rows(dout), weight.contiguous()
        launch(
            _backward_kernel, _grid(tile, rows, channels), dout,
            dout if dfinal is None else dfinal.contiguous(), x, weight,
            weight if bias is None else bias, segments.owners(x.device),
            segments.offsets(x.device), x if state is None else state, dx, dstate, parts,
            rows, segments.count, channels, dout.stride(0), x.stride(0), _state_stride(state),
            K=K, BIAS=bias is not None, STATE=_has_places(state), FINAL=dfinal is not None,
            DSTATE=want_state, SUM=want_weights, BLOCK_T=tile.rows, BLOCK_E=tile.channels,
            GROUP=tile.group, num_warps=tile.warps,
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
    keeps = want_state and initial_state is not None and initial_state.numel() > 0
    dstate = torch.empty_like(initial_state) if keeps else x.new_empty(0)
    return x.new_empty(x.shape), dweights, dstate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.lengths, state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, state)


def _gradients(
    ctx: Any, dout: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
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
