"""Products of a step: rows of activations, made ready once, with a matrix, tile by tile of 32 rows.

Activations of a row: float32 values (columns) | ready. Values are written first; then `make_ready`
puts any whole groups of them in int8 (hymba/ops/cpu/tiles.py says how that is laid out). Products
with float32 values, exact ones and those with float32 weights, read the values.

What a row gives does not depend on the rows beside it, bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hymba.engine.cpu.layout import DENSE, INT4, INT4_EXACT, INT8, INT8_EXACT
from hymba.engine.cpu.vectors import (
    add_products,
    add_products_first,
    call_meet,
    no_sums,
    read_f16,
    read_u8,
    totals,
)
from hymba.ops.cpu.compiled import kernel, pointer
from hymba.ops.cpu.simd import add, fma, load, load_first, read_f32, splat, store, total, write_f32
from hymba.ops.cpu.team import claim, finish, guided, guided_count, wait
from hymba.ops.cpu.tiles import any_rows, group_quantiser

TILE = 32
LEAST = 64 << 10  # bytes of weights in a piece
ZERO = np.float32(0)
_quantise4, _quantise8 = group_quantiser(4, 32), group_quantiser(8, 64)


# ---- activations ---------------------------------------------------------------------------


@kernel
def make_ready(matrix: Any, values: int, ready: int, start: int, end: int) -> None:
    """Put columns start .. end, multiples of 64 but the last, of a row in int8 for a matrix."""
    if in_int8(matrix):
        first, last = start // matrix.group, (end + matrix.group - 1) // matrix.group
        _quantise(matrix, values, ready, first, min(last, matrix.groups), matrix.groups)


@kernel
def in_int8(matrix: Any) -> bool:
    return matrix.kind == INT4 or matrix.kind == INT8


@kernel
def _quantise(matrix: Any, values: int, ready: int, first: int, last: int, groups: int) -> None:
    """Groups first .. last of a row that has so many."""
    size = matrix.group
    for g in range(first, last):
        x, codes, scale = values + 4 * size * g, ready + size * g, ready + size * groups + 4 * g
        if matrix.kind == INT4:
            _quantise4(x, codes, scale, scale + 4 * groups)
        else:
            _quantise8(x, codes, scale, scale + 4 * groups)


# ---- tiles ---------------------------------------------------------------------------------


_meet_int4, _meet_int8 = any_rows(4, 32, False), any_rows(8, 64, False)
_meet_int4_exact, _meet_int8_exact = any_rows(4, 32, True), any_rows(8, 64, True)


@pointer
def _int4(weights: int, groups: int, x: int, step: int, rows: int, y: int, y_step: int) -> None:
    _meet_int4(weights, groups, x, step, rows, y, y_step)


@pointer
def _int8(weights: int, groups: int, x: int, step: int, rows: int, y: int, y_step: int) -> None:
    _meet_int8(weights, groups, x, step, rows, y, y_step)


@pointer
def _exact4(weights: int, groups: int, x: int, step: int, rows: int, y: int, y_step: int) -> None:
    _meet_int4_exact(weights, groups, x, step, rows, y, y_step)


@pointer
def _exact8(weights: int, groups: int, x: int, step: int, rows: int, y: int, y_step: int) -> None:
    _meet_int8_exact(weights, groups, x, step, rows, y, y_step)


MEET = {INT4: _int4, INT8: _int8, INT4_EXACT: _exact4, INT8_EXACT: _exact8}


@kernel
def multiply(
    matrix: Any,
    tile: int,
    tile_end: int,
    values: int,
    ready: int,
    stride: int,
    rows: int,
    y: int,
    y_stride: int,
) -> None:
    """y of tiles tile .. tile_end, for rows of activations `stride` apart. Whole tiles are written:
    zeros for rows that the matrix has not."""
    x = ready if in_int8(matrix) else values
    for t in range(tile, tile_end):
        at, out = matrix.address + t * matrix.tile_bytes, y + 4 * TILE * t
        if matrix.kind == DENSE:
            for row in range(rows):
                source, target = x + row * stride, out + row * y_stride
                _dense(matrix, TILE * t, 0, matrix.columns, source, target)
        else:
            call_meet(matrix.meet, at, matrix.groups, x, stride, rows, out, y_stride)


@kernel
def multiply_columns(
    matrix: Any,
    start: int,
    end: int,
    values: int,
    stride: int,
    ready: int,
    ready_stride: int,
    rows: int,
    y: int,
    y_stride: int,
) -> None:
    """All tiles, and columns start .. end of the matrix alone, as if it had no others: start is a
    multiple of a group. values: of these columns. ready: room for them in int8."""
    if matrix.kind == DENSE:
        for row in range(rows):
            for t in range(matrix.tiles):
                source, target = values + row * stride, y + row * y_stride + 4 * TILE * t
                _dense(matrix, TILE * t, start, end, source, target)
        return
    groups, first = (end - start + matrix.group - 1) // matrix.group, start // matrix.group
    x, step = values, stride
    if in_int8(matrix):
        x, step = ready, ready_stride
        for row in range(rows):
            _quantise(matrix, values + row * stride, ready + row * step, 0, groups, groups)
    for t in range(matrix.tiles):
        at = matrix.address + t * matrix.tile_bytes + first * matrix.group_bytes
        call_meet(matrix.meet, at, groups, x, step, rows, y + 4 * TILE * t, y_stride)


@kernel
def _dense(matrix: Any, row: int, start: int, end: int, x: int, y: int) -> None:
    """32 float32 rows, columns start .. end, which x begins with: 16 rows at once where there are
    so many, then one by one."""
    stride, count = 4 * matrix.columns, end - start
    last, whole = row + TILE, count // 16 * 16
    while row + 16 <= min(last, matrix.rows):
        sums, at = no_sums(), matrix.address + row * stride + 4 * start
        for c in range(0, 4 * whole, 64):
            sums = add_products(sums, load(x + c), at + c, stride)
        if whole < count:
            c = 4 * whole
            sums = add_products_first(
                sums, load_first(x + c, count - whole), at + c, stride, count - whole
            )
        store(y, totals(sums))
        row, y = row + 16, y + 64
    while row < last:
        one, at = splat(ZERO), matrix.address + row * stride + 4 * start
        for c in range(0, count if row < matrix.rows else 0, 16):
            one = fma(load_first(x + 4 * c, count - c), load_first(at + 4 * c, count - c), one)
        write_f32(y, total(one))
        row, y = row + 1, y + 4


# ---- a phase -------------------------------------------------------------------------------


@kernel
def product(
    phases: int,
    phase: int,
    threads: int,
    matrix: Any,
    x: Any,
    rows: int,
    y: int,
    y_stride: int,
    before: int,
) -> None:
    """The whole product, by all threads. before: what is added to it, in rows like those of y but
    elsewhere; 0 for nothing."""
    least = max(1, LEAST // matrix.tile_bytes)
    pieces = guided_count(matrix.tiles, threads, least)
    ready = x.address + 4 * x.columns
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        start, end = guided(matrix.tiles, threads, least, piece)
        multiply(matrix, start, end, x.address, ready, x.stride, rows, y, y_stride)
        if before:
            for row in range(rows):
                at = row * y_stride
                for c in range(at + 4 * TILE * start, at + 4 * TILE * end, 64):
                    store(y + c, add(load(y + c), load(before + c)))
        finish(phases, phase)
    wait(phases, phase, pieces)


# ---- looking a row up ----------------------------------------------------------------------


@kernel
def look_up(matrix: Any, row: int, start: int, end: int, y: int) -> None:
    """Columns start .. end of a row, as float32; zeros behind the last."""
    for column in range(start, end):
        value = ZERO
        if column < matrix.columns:
            value = _element(matrix, row, column)
        write_f32(y + 4 * column, value)


@kernel
def _element(matrix: Any, row: int, column: int) -> Any:
    if matrix.kind == DENSE:
        return read_f32(matrix.address + 4 * (row * matrix.columns + column))
    four = matrix.kind == INT4 or matrix.kind == INT4_EXACT
    group = matrix.group
    half = 8 * group if four else 16 * group  # bytes
    at = matrix.address + row // TILE * matrix.tile_bytes + column // group * matrix.group_bytes
    lane, inner = row % TILE, column % group
    scale = read_f16(at + 2 * half + 2 * lane)
    at += lane // 16 * half + 4 * (lane % 16)
    if four:
        byte = read_u8(at + 64 * (inner // 8) + inner % 4)
        code = (byte >> 4 if inner % 8 >= 4 else byte & 15) - 8
    else:
        code = read_u8(at + 64 * (inner // 4) + inner % 4) - 128
    return np.float32(code) * scale
