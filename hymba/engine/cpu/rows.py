"""What stands between the products of a step: each piece is some columns of one row.

    begin   a token's embedding, and the cosines and sines of its position
    norm    the residual stream, normed     |  made ready for the product that reads it,
    fuse    what the branches made, joined  |  codes and scales with it

A norm's sum is made anew in each piece, in the same order: that is cheaper than to wait for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hymba.engine.cpu.layout import CONCAT, MEAN, SPAN
from hymba.engine.cpu.product import look_up, make_ready
from hymba.engine.cpu.vectors import row_at
from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.rows import scale_of
from hymba.ops.cpu.simd import (
    choose,
    fma,
    load,
    load_first,
    mul,
    read_f32,
    splat,
    store,
    write_f32,
)
from hymba.ops.cpu.team import claim, finish, wait

ROW_BYTES = 24
HALF = np.float32(0.5)


@kernel
def row(model: Any, index: int) -> Any:
    return row_at(model.row + index * ROW_BYTES)


@kernel
def pieces_of(columns: int, rows: int, threads: int) -> Any:
    """In how many pieces each row is cut: about two for each thread, none below SPAN columns."""
    return max(1, min((columns + SPAN - 1) // SPAN, 2 * threads // rows))


@kernel
def columns_of(columns: int, pieces: int, piece: int) -> Any:
    """(start, end) of a piece, in whole spans."""
    spans = (columns + SPAN - 1) // SPAN
    return SPAN * (spans * piece // pieces), SPAN * (spans * (piece + 1) // pieces)


# ---- begin ---------------------------------------------------------------------------------


@kernel
def begin(model: Any, phases: int, phase: int, threads: int) -> None:
    each = pieces_of(model.hidden, model.rows, threads)
    pieces = model.rows * each
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        index = piece // each
        start, end = columns_of(model.hidden, each, piece % each)
        token = row(model, index).token
        look_up(model.embedding, token, start, end, model.x + index * model.x_stride)
        if start == 0:
            _turns(model, row(model, index).length, model.turns + index * model.turns_stride)
        finish(phases, phase)
    wait(phases, phase, pieces)


@kernel
def _turns(model: Any, length: int, out: int) -> None:
    """Cosines, then sines, of a position, whose angles are float32 as everywhere."""
    half = model.head_dim // 2
    position = np.float32(length + model.meta_tokens)
    for i in range(half):
        angle = np.float64(position * read_f32(model.frequencies + 4 * i))
        write_f32(out + 4 * i, np.float32(math.cos(angle)))
        write_f32(out + 4 * (half + i), np.float32(math.sin(angle)))


# ---- norm ----------------------------------------------------------------------------------


@kernel
def norm(
    model: Any, phases: int, phase: int, threads: int, x: int, weight: int, matrix: Any
) -> None:
    """Rows of the residual stream, normed, into model.input."""
    each = pieces_of(model.hidden, model.rows, threads)
    pieces = model.rows * each
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        start, end = columns_of(model.hidden, each, piece % each)
        source = x + piece // each * model.x_stride
        target = model.input.address + piece // each * model.input.stride
        scale = splat(scale_of(source, model.hidden, model.eps))
        for c in range(start, end, 16):
            value = mul(load(source + 4 * c), scale)
            store(target + 4 * c, mul(value, load(weight + 4 * c)))
        make_ready(matrix, target, target + 4 * model.input.columns, start, end)
        finish(phases, phase)
    wait(phases, phase, pieces)


# ---- fuse ----------------------------------------------------------------------------------


@kernel
def fuse(model: Any, layer: Any, phases: int, phase: int, threads: int) -> None:
    """model.mix -> model.input, for out_proj."""
    columns = layer.out_proj.columns
    each = pieces_of(columns, model.rows, threads)
    pieces = model.rows * each
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        start, end = columns_of(columns, each, piece % each)
        mix = model.mix + piece // each * model.mix_stride
        target = model.input.address + piece // each * model.input.stride
        if layer.fusion == MEAN:
            _mean(model, layer, mix, target, start, end)
        elif layer.fusion == CONCAT:
            _concat(model, layer, mix, target, start, end)
        else:
            for c in range(start, end, 16):
                store(target + 4 * c, load_first(mix + 4 * c, columns - c))
        make_ready(layer.out_proj, target, target + 4 * model.input.columns, start, end)
        finish(phases, phase)
    wait(phases, phase, pieces)


@kernel
def _mean(model: Any, layer: Any, mix: int, out: int, start: int, end: int) -> None:
    width, second = layer.width, mix + 4 * layer.width
    padded = (width + SPAN - 1) // SPAN * SPAN
    scale, other = scale_of(mix, width, model.eps), scale_of(second, width, model.eps)
    a, b = splat(scale * HALF), splat(other * HALF)
    for c in range(start, end, 16):
        weight = layer.norms + 4 * c
        x = mul(mul(load_first(mix + 4 * c, width - c), a), load(weight))
        y = mul(load_first(second + 4 * c, width - c), b)
        store(out + 4 * c, fma(y, load(weight + 4 * padded), x))


@kernel
def _concat(model: Any, layer: Any, mix: int, out: int, start: int, end: int) -> None:
    width = layer.width
    scale = splat(scale_of(mix, width, model.eps))
    other = splat(scale_of(mix + 4 * width, width, model.eps))
    for c in range(start, end, 16):
        x = load_first(mix + 4 * c, 2 * width - c)
        x = mul(x, choose(scale, other, width - c))
        store(out + 4 * c, mul(x, load(layer.norms + 4 * c)))
