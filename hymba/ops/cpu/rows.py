"""What stands between the products of a prompt, row by row: norms, fusion, the MLP's gate, rotary
positions. float32, forward only.

What they compute is in hymba/ops/norm.py, swiglu.py and rotary.py. Each is one pass over its rows
by all threads, a piece is a run of rows, and no row knows of another. In torch the same are four to
six passes each, and its threads wait for each other after every one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba.ops.backend import dense_last
from hymba.ops.cpu.compiled import job, kernel
from hymba.ops.cpu.simd import (
    LANES,
    add,
    fma,
    load_first,
    mul,
    read_f32,
    read_i64,
    silu,
    splat,
    store_first,
    sub,
    total,
)
from hymba.ops.cpu.team import claim, finish, team, wait

PIECE = 1 << 14  # numbers: a thread's least share
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@kernel
def runs_of(rows: int, columns: int) -> tuple[int, int]:
    """(rows of a piece, pieces)"""
    run = max(1, PIECE // columns)
    return run, (rows + run - 1) // run


# ---- norms ---------------------------------------------------------------------------------


@kernel
def scale_of(x: int, size: int, eps: float) -> Any:
    """1 / root mean square"""
    sums, more = splat(ZERO), splat(ZERO)
    for c in range(0, size, 32):
        one, two = load_first(x + 4 * c, size - c), load_first(x + 4 * c + 64, size - c - 16)
        sums, more = fma(one, one, sums), fma(two, two, more)
    return ONE / np.sqrt(total(add(sums, more)) / np.float32(size) + eps)


@kernel
def _sum(x: int, y: int, to: int, size: int) -> None:
    for c in range(0, size, LANES):
        value = add(load_first(x + 4 * c, size - c), load_first(y + 4 * c, size - c))
        store_first(to + 4 * c, value, size - c)


@job
def _norm(thread: int, threads: int, phases: int, arguments: int) -> None:
    x, x_step = read_i64(arguments), read_i64(arguments + 8)
    more, more_step = read_i64(arguments + 16), read_i64(arguments + 24)
    sums, y = read_i64(arguments + 32), read_i64(arguments + 40)
    weight, eps = read_i64(arguments + 48), read_f32(arguments + 56)
    rows, size = read_i64(arguments + 64), read_i64(arguments + 72)
    run, pieces = runs_of(rows, size)
    while True:
        piece = claim(phases, 0)
        if piece >= pieces:
            break
        for row in range(piece * run, min(rows, (piece + 1) * run)):
            source, to = x + row * x_step, y + row * 4 * size
            if more:
                _sum(source, more + row * more_step, sums + row * 4 * size, size)
                source = sums + row * 4 * size
            scale = splat(scale_of(source, size, eps))
            for c in range(0, size, LANES):
                value = mul(load_first(source + 4 * c, size - c), scale)
                value = mul(value, load_first(weight + 4 * c, size - c))
                store_first(to + 4 * c, value, size - c)
        finish(phases, 0)
    wait(phases, 0, pieces)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normed(x, residual, weight, eps)


def _normed(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + more, and the sum (x itself where there is nothing more)."""
    size = x.shape[-1]
    rows, weight = _rows(x), weight.contiguous()
    others = None if more is None else _rows(more)
    y = torch.empty(x.shape)
    sums = x if others is None else torch.empty(x.shape)
    _run(
        _norm,
        len(rows),
        size,
        *(rows.data_ptr(), 4 * rows.stride(0)),
        *((0, 0) if others is None else (others.data_ptr(), 4 * others.stride(0))),
        *(sums.data_ptr(), y.data_ptr(), weight.data_ptr(), _bits(eps)),
    )
    return y, sums


@job
def _fuse(thread: int, threads: int, phases: int, arguments: int) -> None:
    x, x_step = read_i64(arguments), read_i64(arguments + 8)
    y, y_step = read_i64(arguments + 16), read_i64(arguments + 24)
    x_weight, y_weight = read_i64(arguments + 32), read_i64(arguments + 40)
    to, eps = read_i64(arguments + 48), read_f32(arguments + 56)
    rows, size = read_i64(arguments + 64), read_i64(arguments + 72)
    run, pieces = runs_of(rows, size)
    while True:
        piece = claim(phases, 0)
        if piece >= pieces:
            break
        for row in range(piece * run, min(rows, (piece + 1) * run)):
            one, two, out = x + row * x_step, y + row * y_step, to + row * 4 * size
            a, b = splat(scale_of(one, size, eps)), splat(scale_of(two, size, eps))
            for c in range(0, size, LANES):
                left = size - c
                first = mul(load_first(one + 4 * c, left), a)
                first = mul(first, load_first(x_weight + 4 * c, left))
                second = mul(load_first(two + 4 * c, left), b)
                second = mul(second, load_first(y_weight + 4 * c, left))
                store_first(out + 4 * c, mul(add(first, second), splat(HALF)), left)
        finish(phases, 0)
    wait(phases, 0, pieces)


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    one, two = _rows(attention), _rows(ssm)
    weights = attention_weight.contiguous(), ssm_weight.contiguous()
    out = torch.empty(attention.shape)
    _run(
        _fuse,
        len(one),
        attention.shape[-1],
        *(one.data_ptr(), 4 * one.stride(0), two.data_ptr(), 4 * two.stride(0)),
        *(*(x.data_ptr() for x in weights), out.data_ptr(), _bits(eps)),
    )
    return out


# ---- gate, rotation ------------------------------------------------------------------------


@job
def _gate(thread: int, threads: int, phases: int, arguments: int) -> None:
    gate, gate_step = read_i64(arguments), read_i64(arguments + 8)
    up, up_step = read_i64(arguments + 16), read_i64(arguments + 24)
    to, rows, size = read_i64(arguments + 32), read_i64(arguments + 40), read_i64(arguments + 48)
    run, pieces = runs_of(rows, size)
    while True:
        piece = claim(phases, 0)
        if piece >= pieces:
            break
        for row in range(piece * run, min(rows, (piece + 1) * run)):
            for c in range(0, size, LANES):
                value = silu(load_first(gate + row * gate_step + 4 * c, size - c))
                value = mul(value, load_first(up + row * up_step + 4 * c, size - c))
                store_first(to + row * 4 * size + 4 * c, value, size - c)
        finish(phases, 0)
    wait(phases, 0, pieces)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    one, two, out = _rows(gate), _rows(up), torch.empty(gate.shape)
    _run(
        _gate,
        len(one),
        gate.shape[-1],
        *(one.data_ptr(), 4 * one.stride(0), two.data_ptr(), 4 * two.stride(0)),
        out.data_ptr(),
    )
    return out


@kernel
def turn(source: int, target: int, cos: int, sin: int, width: int, scale: float) -> None:
    """scale * source with its pairs (i, i + width/2) turned."""
    half, s = width // 2, splat(scale)
    for i in range(0, half, LANES):
        count = half - i
        x, y = load_first(source + 4 * i, count), load_first(source + 4 * (half + i), count)
        c, d = load_first(cos + 4 * i, count), load_first(sin + 4 * i, count)
        store_first(target + 4 * i, mul(sub(mul(x, c), mul(y, d)), s), count)
        store_first(target + 4 * (half + i), mul(add(mul(y, c), mul(x, d)), s), count)


@job
def _rotate(thread: int, threads: int, phases: int, arguments: int) -> None:
    x, x_step, x_head = read_i64(arguments), read_i64(arguments + 8), read_i64(arguments + 16)
    cos, sin, heads = read_i64(arguments + 24), read_i64(arguments + 32), read_i64(arguments + 40)
    width, to = read_i64(arguments + 48), read_i64(arguments + 56)
    rows, size = read_i64(arguments + 64), read_i64(arguments + 72)
    run, pieces = runs_of(rows, size)
    while True:
        piece = claim(phases, 0)
        if piece >= pieces:
            break
        for row in range(piece * run, min(rows, (piece + 1) * run)):
            at = row * 2 * width
            for head in range(heads):
                source, target = (
                    x + row * x_step + head * x_head,
                    to + 4 * (row * size + head * width),
                )
                turn(source, target, cos + at, sin + at, width, ONE)
        finish(phases, 0)
    wait(phases, 0, pieces)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, heads, width = x.shape
    x, cos, sin = dense_last(x), cos.contiguous(), sin.contiguous()
    out = torch.empty(rows, heads, width)
    _run(
        _rotate,
        rows,
        heads * width,
        *(x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1), cos.data_ptr(), sin.data_ptr()),
        *(heads, width, out.data_ptr()),
    )
    return out


# ---- calls ---------------------------------------------------------------------------------


def _run(what: job, rows: int, columns: int, *arguments: int) -> None:
    """A job over rows; it finds both numbers behind its other arguments."""
    if rows and columns:
        made = team()
        threads = min(made.threads, 1 + rows * columns // (2 * PIECE))
        made.run(what, *arguments, rows, columns, threads=threads)


def _rows(x: Tensor) -> Tensor:
    """(..., columns) -> (rows, columns), each row's numbers side by side."""
    return dense_last(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def _bits(x: float) -> int:
    """A float32 among int64 arguments: in the low half, where kernels read it."""
    return int(np.float32(x).view(np.int32))
