"""Products of small float32 matrices whose sums stay in registers, and their transposition.

    c = x y  or  fades * c + x y        x (TALL, depth), y (depth, SPAN), c (TALL, SPAN)

One step of `multiply` is a column of x times a row of y: TALL numbers, each meeting WIDE vectors.
Each sum goes from the first product to the last, so it does not depend on what is beside it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.simd import (
    F32,
    FEATURES,
    I32,
    LANES,
    Builder,
    F32x16,
    Floats,
    Value,
    i64,
    ir_at,
    ir_constant,
    ir_fma,
    ir_load,
    ir_splat,
    ir_store,
    none,
    operation,
)

TALL = 4
WIDE = 4 if "avx512f" in FEATURES else 1  # vectors: what the registers hold
SPAN = WIDE * LANES

Sums = types.UniTuple(Floats, TALL * WIDE)


@operation(Sums)
def _no_sums(b: Builder) -> Value:
    return ir.Constant(ir.ArrayType(F32x16, TALL * WIDE), [ir_constant(F32x16, 0.0)] * TALL * WIDE)


def _rows(b: Builder, first: Value, step: Value) -> list[Value]:
    """Addresses."""
    found = [first]
    for _ in range(1, TALL):
        found.append(b.add(found[-1], step))
    return found


@operation(Sums, i64, i64, i64)
def _faded_sums(b: Builder, c: Value, step: Value, fades: Value) -> Value:
    """What stands in rows of c, each times its fade."""
    sums = ir.Constant(ir.ArrayType(F32x16, TALL * WIDE), ir.Undefined)
    for r, row in enumerate(_rows(b, c, step)):
        fade = ir_splat(b, ir_load(b, ir_at(b, fades, 4 * r), F32, 4), F32x16)
        for j in range(WIDE):
            value = b.fmul(ir_load(b, ir_at(b, row, 64 * j), F32x16, 4), fade)
            sums = b.insert_value(sums, value, r * WIDE + j)
    return sums


@operation(Sums, Sums, i64, i64, i64)
def _add_outer(b: Builder, sums: Value, x: Value, step: Value, y: Value) -> Value:
    """sums + a column of x times a row of y"""
    row = [ir_load(b, ir_at(b, y, 64 * j), F32x16, 4) for j in range(WIDE)]
    for r, place in enumerate(_rows(b, x, step)):
        one = ir_splat(b, ir_load(b, place, F32, 4), F32x16)
        for j in range(WIDE):
            value = ir_fma(b, one, row[j], b.extract_value(sums, r * WIDE + j))
            sums = b.insert_value(sums, value, r * WIDE + j)
    return sums


@operation(none, Sums, i64, i64)
def _put(b: Builder, sums: Value, c: Value, step: Value) -> None:
    for r, row in enumerate(_rows(b, c, step)):
        for j in range(WIDE):
            ir_store(b, ir_at(b, row, 64 * j), b.extract_value(sums, r * WIDE + j), 4)


@kernel
def multiply(
    x: int, x_step: int, y: int, y_step: int, depth: int, c: int, c_step: int, fades: int
) -> None:
    """fades: an address of TALL numbers, or 0 for what is in c not to count."""
    sums = _faded_sums(c, c_step, fades) if fades else _no_sums()
    for k in range(depth):
        sums = _add_outer(sums, x + 4 * k, x_step, y + k * y_step)
    _put(sums, c, c_step)


@operation(none, i64, i64, i64, i64)
def transpose(b: Builder, x: Value, x_step: Value, y: Value, y_step: Value) -> None:
    """16 x 16 numbers: blocks beside the diagonal change places, of 8, 4, 2 and 1."""
    rows = []
    for _ in range(LANES):
        rows.append(ir_load(b, x, F32x16, 4))
        x = b.add(x, x_step)
    for size in (8, 4, 2, 1):
        for k in range(LANES):
            if not k & size:
                low, high = rows[k], rows[k + size]
                one = [lane + LANES - size if lane & size else lane for lane in range(LANES)]
                two = [lane + LANES if lane & size else lane + size for lane in range(LANES)]
                kind = ir.VectorType(I32, LANES)
                rows[k] = b.shuffle_vector(low, high, ir.Constant(kind, one))
                rows[k + size] = b.shuffle_vector(low, high, ir.Constant(kind, two))
    for row in rows:
        ir_store(b, y, row, 4)
        y = b.add(y, y_step)
