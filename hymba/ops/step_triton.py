# mypy: allow-untyped-defs, allow-incomplete-defs
"""The decode step of a layer's branches as GPU kernels; see `hymba.ops.step` for what they compute.

What bounds them: bytes, of which the SSM states are nearly all (read and written once, 4 bytes a
number; at 128 rows of 3200 channels and 16 states 52 MB); at few rows the time to start a kernel.
So one kernel does all that stands between x_proj and the output: the three norms and the small
product for dt are computed again in every program, from the second-level cache, while its states
are on their way. How far from it, on an H200: `ssm_step` of 128 rows of the 1.5B took 20.4 us,
and torch reads and writes the same states in 15.0; the rest are instructions, many of the norms.

A program has a few rows and a block of channels: its states (rows, channels, n) are, for each row,
one contiguous piece of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, chains, dense_last, launch, next_power_of_2, operator
from hymba.ops.chain_triton import wait

LOG2E = tl.constexpr(1.4426950408889634)

# Rows and channels of a program, and its warps. One warp meets no barrier between its loads.
CONV_TILE = 8, 128, 4
STATE_TILE = 1, 128, 4


FEW_ROWS = 32  # as many programs as run at once, in `ssm_step`


def ssm_tile(rows: int) -> tuple[int, int, int]:
    """Many rows at once share what is computed for channels, few leave more programs."""
    return (4, 8, 1) if rows <= FEW_ROWS else (8, 8, 1)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) as max(x, 0) + log(1 + t), t = exp(-|x|), with log(1 + t) / t a polynomial,
    right to 2e-7 of it on [0, 1]: a logarithm and a division cost three times as much."""
    t = tl.exp2(-tl.abs(x) * LOG2E)
    p = 0.005232691299 * t - 0.029505226761
    p = p * t + 0.078225933015
    p = p * t - 0.136632442474
    p = p * t + 0.191060066223
    p = p * t - 0.248429819942
    p = p * t + 0.333190977573
    p = p * t - 0.499994933605
    p = p * t + 0.999999940395
    return tl.maximum(x, 0.0) + t * p


@triton.jit(do_not_specialize=["S"])
def _conv_step_kernel(
    x, weight, bias, state, slots, out, S, E,
    stride_x, stride_s, stride_sk, STRIDE_WE: tl.constexpr, STRIDE_WK: tl.constexpr,
    TAPS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles are (rows, taps, channels); the last tap is the new input, the others are state."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    tap = tl.arange(0, BLOCK_K)[None, :, None]
    w = tl.load(weight + e * STRIDE_WE + tap * STRIDE_WK, mask=(e < E) & (tap < TAPS), other=0.0)
    if BIAS:
        acc = tl.load(bias + e, mask=e < E, other=0.0)
    else:
        acc = tl.zeros([1, 1, BLOCK], tl.float32)
    wait(CHAINED)
    slot = tl.load(slots + row, mask=row < S, other=0).to(tl.int64)
    row, slot = row[:, None, None], slot[:, None, None]
    inside = (row < S) & (e < E)
    new = tl.load(x + row * stride_x + e, mask=inside, other=0.0)  # (rows, 1, channels)
    at = state + slot * stride_s + tap * stride_sk + e
    old = tl.load(at, mask=inside & (tap < TAPS - 1), other=0.0).to(x.dtype.element_ty)
    inputs = tl.where(tap == TAPS - 1, new.to(tl.float32), old.to(tl.float32))
    acc = acc.to(tl.float32) + tl.sum(inputs * w.to(tl.float32), 1)[:, None, :]
    moved = inside & (tap > 0) & (tap < TAPS)
    tl.debug_barrier()  # one thread's input is stored where another's was
    tl.store(at - stride_sk, inputs.to(state.dtype.element_ty), mask=moved)
    tl.store(out + row * E + e, (acc * _sigmoid(acc)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rows(x, weight, WIDTH, eps, dtype: tl.constexpr):
    """RMSNorm of x (rows, width), zeros behind WIDTH: rounded to dtype before the weight and after
    it, as `rms_norm` does."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    normed = (x * scale[:, None]).to(dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _load_rows(x, row, column, stride, mask):
    at = x + row[:, None] * stride + column[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(x, i, WIDTH):
    """As it is: to convert it would be to wait for it."""
    return tl.load(x + i, mask=i < WIDTH, other=0.0)


@triton.jit
def _load_decays(A, e, n, E, STATES: tl.constexpr):
    mask = (e < E)[:, None] & (n < STATES)[None, :]
    return tl.load(A + e[:, None] * STATES + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_states(state, slots, row, e, n, S, mask, stride_s, STATES: tl.constexpr):
    """States (rows, channels, n), where they lie, and which there are."""
    slot = tl.load(slots + row, mask=row < S, other=0).to(tl.int64)
    at = state + slot[:, None, None] * stride_s + (e[:, None] * STATES + n[None, :])[None, :, :]
    mask_h = mask[:, :, None] & (n < STATES)[None, None, :]
    return tl.load(at, mask=mask_h, other=0.0), at, mask_h


@triton.jit
def _advance(h, x, dt, A, B, C, D, z):
    """One step of states h (rows, channels, n) -> those after it, and the gated output; x, dt and
    z (rows, channels), A (channels, n), B and C (rows, n), D (channels)."""
    delta = _softplus(dt)
    h *= tl.exp2(delta[:, :, None] * (A * LOG2E)[None, :, :])
    h += (delta * x)[:, :, None] * B[:, None, :]
    out = tl.sum(h * C[:, None, :], 2) + x * D.to(tl.float32)[None, :]
    return h, out * z * _sigmoid(z)


@triton.jit(do_not_specialize=["S"])
def _state_step_kernel(
    u, dt, A, B, C, D, z, dt_bias, state, slots, y,
    S, E, stride_u, stride_dt, stride_B, stride_C, stride_z, stride_s,
    STATES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    bias, skip = _load_vector(dt_bias, e, E), _load_vector(D, e, E)
    wait(CHAINED)
    mask = (row < S)[:, None] & (e < E)[None, :]
    mask_n = (row < S)[:, None] & (n < STATES)[None, :]
    h, at, mask_h = _load_states(state, slots, row, e, n, S, mask, stride_s, STATES)
    b = _load_rows(B, row, n, stride_B, mask_n)
    c = _load_rows(C, row, n, stride_C, mask_n)
    step = _load_rows(dt, row, e, stride_dt, mask)
    x = _load_rows(u, row, e, stride_u, mask)
    gate = _load_rows(z, row, e, stride_z, mask)
    a = _load_decays(A, e, n, E, STATES)
    h, out = _advance(h.to(tl.float32), x, step + bias.to(tl.float32)[None, :], a, b, c, skip, gate)
    tl.store(at, h.to(state.dtype.element_ty), mask=mask_h)
    tl.store(y + row[:, None] * E + e[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_weights(
    dt_weight, dt_norm, B_norm, C_norm, dt_bias, D, e, r, n, E,
    STRIDE_W: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    mask = (e < E)[:, None] & (r < RANK)[None, :]
    w = tl.load(dt_weight + e[:, None] * STRIDE_W + r[None, :], mask=mask, other=0.0)
    norm = _load_vector(dt_norm, r, RANK)
    norm_b, norm_c = _load_vector(B_norm, n, STATES), _load_vector(C_norm, n, STATES)
    return w, norm, norm_b, norm_c, _load_vector(dt_bias, e, E), _load_vector(D, e, E)


@triton.jit(do_not_specialize=["S"])
def _ssm_step_kernel(
    u, low, dt_weight, dt_bias, dt_norm, B_norm, C_norm, A, D, z, state, slots, y,
    S, E, stride_u, stride_z, stride_s, eps,
    STRIDE_LOW: tl.constexpr, STRIDE_W: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask = (row < S)[:, None] & (e < E)[None, :]
    mask_r = (row < S)[:, None] & (r < RANK)[None, :]
    mask_n = (row < S)[:, None] & (n < STATES)[None, :]
    w, weight_dt, weight_b, weight_c, bias, skip = _load_weights(
        dt_weight, dt_norm, B_norm, C_norm, dt_bias, D, e, r, n, E, STRIDE_W, RANK, STATES
    )
    wait(CHAINED)
    h, at, mask_h = _load_states(state, slots, row, e, n, S, mask, stride_s, STATES)
    thin = _load_rows(low, row, r, STRIDE_LOW, mask_r)
    b = _load_rows(low + RANK, row, n, STRIDE_LOW, mask_n)
    c = _load_rows(low + RANK + STATES, row, n, STRIDE_LOW, mask_n)
    x = _load_rows(u, row, e, stride_u, mask)
    gate = _load_rows(z, row, e, stride_z, mask)
    a = _load_decays(A, e, n, E, STATES)

    NARROW: tl.constexpr = low.dtype.element_ty
    thin = _norm_rows(thin, weight_dt, RANK, eps, NARROW)
    b = _norm_rows(b, weight_b, STATES, eps, NARROW)
    c = _norm_rows(c, weight_c, STATES, eps, NARROW)
    dt = tl.dot(thin.to(DOT), tl.trans(w.to(DOT)), input_precision="ieee")  # (rows, channels)
    dt = dt.to(NARROW).to(tl.float32)
    h, out = _advance(h.to(tl.float32), x, dt + bias.to(tl.float32)[None, :], a, b, c, skip, gate)
    tl.store(at, h.to(state.dtype.element_ty), mask=mask_h)
    tl.store(y + row[:, None] * E + e[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _turned(x, row_at, cos, sin, head, pair, mask, stride_h, HALF: tl.constexpr):
    """Both halves (heads, h/2) of the heads of one row, turned."""
    at = x + row_at + head[:, None] * stride_h + pair[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_and_store_kernel(
    q, k, v, cos, sin, store_k, store_v, slots, places, q_out, k_out,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_cos, stride_sin,
    stride_sk, stride_skg, stride_skp, stride_sv, stride_svg, stride_svp,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    wait(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    there = pair < HALF
    c = tl.load(cos + row * stride_cos + pair, mask=there, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * stride_sin + pair, mask=there, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, BLOCK_H)
    mask = (head < HEADS)[:, None] & there[None, :]
    first, second = _turned(q, row * stride_q, c, s, head, pair, mask, stride_qh, HALF)
    at = q_out + (row * HEADS + head[:, None]) * (2 * HALF) + pair[None, :]
    tl.store(at, first.to(q_out.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(q_out.dtype.element_ty), mask=mask)
    if GROUPS > 0:
        slot = tl.load(slots + row).to(tl.int64)
        place = tl.load(places + row).to(tl.int64)
        group = tl.arange(0, BLOCK_G)
        mask = (group < GROUPS)[:, None] & there[None, :]
        first, second = _turned(k, row * stride_k, c, s, group, pair, mask, stride_kh, HALF)
        first, second = first.to(k_out.dtype.element_ty), second.to(k_out.dtype.element_ty)
        at = k_out + (row * GROUPS + group[:, None]) * (2 * HALF) + pair[None, :]
        tl.store(at, first, mask=mask)
        tl.store(at + HALF, second, mask=mask)
        group = group.to(tl.int64)[:, None]
        at = store_k + slot * stride_sk + place * stride_skp + group * stride_skg + pair[None, :]
        tl.store(at, first.to(store_k.dtype.element_ty), mask=mask)
        tl.store(at + HALF, second.to(store_k.dtype.element_ty), mask=mask)
        column = tl.arange(0, BLOCK_V)[None, :]
        mask = (group < GROUPS) & (column < WIDTH_V)
        value = tl.load(v + row * stride_v + group * stride_vh + column, mask=mask, other=0.0)
        at = store_v + slot * stride_sv + place * stride_svp + group * stride_svg + column
        tl.store(at, value.to(tl.float32).to(store_v.dtype.element_ty), mask=mask)


def _in_place(state: Tensor, *strides: int) -> None:
    """The numbers of a slot lie as the kernels take it: a copy would be written to in vain."""
    if state.stride()[-len(strides) :] != strides:
        raise ValueError(f"the state of a slot must be contiguous, got strides {state.stride()}")


def _grid(
    rows: int, channels: int, tile: tuple[int, int, int]
) -> tuple[tuple[int, int], dict[str, int]]:
    at_once, block, warps = tile
    cut = {"ROWS": at_once, "BLOCK": block, "num_warps": warps}
    return (cdiv(channels, block), cdiv(rows, at_once)), cut


@operator("conv_step", ("state",))
def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """As `hymba.ops.step.conv_step`."""
    x = dense_last(x)
    rows, channels = x.shape
    out = x.new_empty(rows, channels)
    if rows == 0:
        return out
    _in_place(state, 1)
    at_once, block, warps = CONV_TILE
    at_once = min(at_once, next_power_of_2(rows))
    grid, cut = _grid(rows, channels, (at_once, block, warps))
    launch(
        _conv_step_kernel, grid,
        x, weight, weight if bias is None else bias, state, slots, out, rows, channels,
        x.stride(0), *state.stride()[:2],
        STRIDE_WE=weight.stride(0), STRIDE_WK=weight.stride(1), TAPS=weight.shape[1],
        BIAS=bias is not None, BLOCK_K=next_power_of_2(weight.shape[1]),
        CHAINED=chains(x, rows), **cut,
    )  # fmt: skip
    return out


@conv_step.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator("state_step", ("state",))
def state_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """As `hymba.ops.step.state_step`."""
    u, dt, B, C, z = (dense_last(x) for x in (u, dt, B, C, z))
    rows, channels = u.shape
    y = u.new_empty(rows, channels)
    if rows == 0:
        return y
    _in_place(state, A.shape[1], 1)
    grid, cut = _grid(rows, channels, STATE_TILE)
    launch(
        _state_step_kernel, grid,
        u, dt, A.contiguous(), B, C, D, z, dt_bias, state, slots, y, rows, channels,
        u.stride(0), dt.stride(0), B.stride(0), C.stride(0), z.stride(0), state.stride(0),
        STATES=A.shape[1], BLOCK_N=next_power_of_2(A.shape[1]),
        CHAINED=chains(u, rows), **cut,
    )  # fmt: skip
    return y


@state_step.register_fake
def _(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape)


@operator("ssm_step", ("state",))
def ssm_step(
    u: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    dt_norm: Tensor,
    B_norm: Tensor,
    C_norm: Tensor,
    A: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """As `hymba.ops.step.ssm_step`."""
    u, low, dt_weight, z = (dense_last(x) for x in (u, low, dt_weight, z))
    (rows, channels), (_, rank) = u.shape, dt_weight.shape
    y = u.new_empty(rows, channels)
    if rows == 0:
        return y
    _in_place(state, A.shape[1], 1)
    grid, cut = _grid(rows, channels, ssm_tile(rows))
    launch(
        _ssm_step_kernel, grid,
        u, low, dt_weight, dt_bias, dt_norm, B_norm, C_norm, A.contiguous(), D, z, state, slots, y,
        rows, channels, u.stride(0), z.stride(0), state.stride(0), eps,
        # Constants of a model, and no multiples of 16: known, their rows load in wider pieces.
        STRIDE_LOW=low.stride(0), STRIDE_W=dt_weight.stride(0),
        RANK=rank, BLOCK_R=max(16, next_power_of_2(rank)),
        STATES=A.shape[1], BLOCK_N=next_power_of_2(A.shape[1]),
        DOT=dot_type(low), CHAINED=chains(u, rows), **cut,
    )  # fmt: skip
    return y


@ssm_step.register_fake
def _(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape)


def dot_type(x: Tensor) -> tl.dtype:
    """What goes into matrix products; the interpreter knows no bfloat16."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return kinds.get(x.dtype, tl.float32) if x.is_cuda else tl.float32


@operator("rope_and_store", ("store_k", "store_v"))
def rope_operator(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    store_k: Tensor | None,
    store_v: Tensor | None,
    slots: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """The turned k is empty where there is none: an operator cannot return None."""
    q = dense_last(q)
    rows, heads, width = q.shape
    q_out = q.new_empty(q.shape)
    groups, value_width, k_out = 0, 1, q.new_empty(0)
    strides = [0] * 10
    if k is not None and v is not None and store_k is not None and store_v is not None:
        k, v = dense_last(k), dense_last(v)
        groups, value_width, k_out = k.shape[1], v.shape[2], k.new_empty(k.shape)
        strides = [*k.stride()[:2], *v.stride()[:2], *store_k.stride()[:3], *store_v.stride()[:3]]
        if store_k.stride(-1) != 1 or store_v.stride(-1) != 1:
            raise ValueError("the numbers of a place in a store must lie side by side")
    else:
        k = v = store_k = store_v = q  # not read, not written
    if rows == 0:
        return q_out, k_out
    launch(
        _rope_and_store_kernel, (rows,),
        q, k, v, cos, sin, store_k, store_v, slots, places, q_out, k_out,
        *q.stride()[:2], *strides[:4], cos.stride(0), sin.stride(0), *strides[4:],
        HEADS=heads, GROUPS=groups, HALF=width // 2, WIDTH_V=value_width,
        BLOCK_H=next_power_of_2(heads), BLOCK_G=next_power_of_2(max(1, groups)),
        BLOCK_P=next_power_of_2(width // 2), BLOCK_V=next_power_of_2(value_width),
        CHAINED=chains(q, rows), num_warps=4,
    )  # fmt: skip
    return q_out, k_out


@rope_operator.register_fake
def _(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def rope_and_store(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    store_k: Tensor | None,
    store_v: Tensor | None,
    slots: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """As `hymba.ops.step.rope_and_store`."""
    turned, k_turned = rope_operator(q, k, v, cos, sin, store_k, store_v, slots, places)
    return turned, None if k is None else k_turned
