"""Operations that only a decode step needs, beside those of `hymba.ops.cpu.simd`: blocks of fused
multiply-adds, calls by address, and its records."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from hymba.engine.cpu.layout import LAYER, MODEL, ROW
from hymba.ops.cpu import simd
from hymba.ops.cpu.simd import (
    F16,
    F32,
    I8,
    I32,
    LANES,
    Builder,
    F32x16,
    Floats,
    Value,
    f32,
    i64,
    none,
    operation,
    record_at,
)

Block = types.UniTuple(Floats, LANES)  # 16 vectors


# ---- blocks --------------------------------------------------------------------------------


@operation(Block)
def no_sums(b: Builder) -> Value:
    zero = simd.ir_constant(F32x16, 0.0)
    return ir.Constant(ir.ArrayType(F32x16, LANES), [zero] * LANES)


def _add_products(b: Builder, sums: Value, x: Value, y: list[Value]) -> Value:
    out = ir.Constant(sums.type, ir.Undefined)
    for k in range(LANES):
        one = simd.ir_fma(b, y[k], x, b.extract_value(sums, k))
        out = b.insert_value(out, one, k)
    return out


@operation(Block, Block, Floats, i64, i64)
def add_products(b: Builder, sums: Value, x: Value, address: Value, stride: Value) -> Value:
    """sums[k] + x * the vector at address + k * stride, for 16 rows k of a matrix."""
    rows = []
    for _ in range(LANES):
        rows.append(simd.ir_load(b, address, F32x16, 4))
        address = b.add(address, stride)
    return _add_products(b, sums, x, rows)


@operation(Block, Block, Floats, i64, i64, i64)
def add_products_first(
    b: Builder, sums: Value, x: Value, address: Value, stride: Value, count: Value
) -> Value:
    """The same with the first `count` columns of each row."""
    rows = []
    for _ in range(LANES):
        rows.append(simd.ir_load_first(b, address, count))
        address = b.add(address, stride)
    return _add_products(b, sums, x, rows)


@operation(Floats, Block)
def totals(b: Builder, sums: Value) -> Value:
    """The sum of each of 16 vectors: halves are folded and laid side by side, four times."""
    vectors = [b.extract_value(sums, k) for k in range(LANES)]
    width = LANES // 2  # lanes that belong to one sum after the fold
    while width:
        half = len(vectors) // 2
        fold = []
        for k in range(half):
            x, y = vectors[k], vectors[k + half]
            low, high = _sides(LANES, width)
            mask = ir.VectorType(I32, LANES)
            one = b.shuffle_vector(x, y, ir.Constant(mask, low))
            two = b.shuffle_vector(x, y, ir.Constant(mask, high))
            fold.append(b.fadd(one, two))
        vectors, width = fold, width // 2
    order = ir.Constant(ir.VectorType(I32, LANES), _ORDER)
    return b.shuffle_vector(vectors[0], vectors[0], order)


def _sides(lanes: int, width: int) -> tuple[list[int], list[int]]:
    """Lanes of x and y, of each run of 2 * width the lower halves and the upper ones."""
    low = [k + j for k in range(0, 2 * lanes, 2 * width) for j in range(width)]
    return low, [k + width for k in low]


def _order() -> list[int]:
    """Where `totals`, which pairs vector k with k + half, leaves the sum of each vector."""
    at = [[k] * LANES for k in range(LANES)]
    width = LANES // 2
    while width:
        half = len(at) // 2
        low, _ = _sides(LANES, width)
        at = [[(at[k] + at[k + half])[lane] for lane in low] for k in range(half)]
        width //= 2
    return [at[0].index(k) for k in range(LANES)]


_ORDER = _order()


def _weigh(vectors: int) -> Any:
    @operation(none, i64, i64, i64, i64)
    def weigh(b: Builder, out: Value, shares: Value, rows: Value, stride: Value) -> None:
        """out += sum over 16 rows k of shares[k] * row k, so many vectors wide."""
        sums = [simd.ir_load(b, simd.ir_at(b, out, 64 * c), F32x16, 4) for c in range(vectors)]
        for k in range(LANES):
            share = simd.ir_splat(b, simd.ir_load(b, simd.ir_at(b, shares, 4 * k), F32, 4), F32x16)
            for c in range(vectors):
                row = simd.ir_load(b, simd.ir_at(b, rows, 64 * c), F32x16, 4)
                sums[c] = simd.ir_fma(b, row, share, sums[c])
            rows = b.add(rows, stride)
        for c in range(vectors):
            simd.ir_store(b, simd.ir_at(b, out, 64 * c), sums[c], 4)

    return weigh


weigh_one, weigh_four = _weigh(1), _weigh(4)


# ---- calls ---------------------------------------------------------------------------------


@operation(none, *[i64] * 8)
def call_meet(
    b: Builder,
    function: Value,
    weights: Value,
    groups: Value,
    x: Value,
    step: Value,
    rows: Value,
    y: Value,
    y_step: Value,
) -> None:
    """A `pointer` of product.py, by its address."""
    kind = ir.FunctionType(ir.VoidType(), [simd.I64] * 7)
    values = [weights, groups, x, step, rows, y, y_step]
    b.call(b.inttoptr(function, kind.as_pointer()), values)


# ---- single values, records ----------------------------------------------------------------


@operation(i64, i64)
def read_u8(b: Builder, address: Value) -> Value:
    return b.zext(simd.ir_load(b, address, I8), simd.I64)


@operation(f32, i64)
def read_f16(b: Builder, address: Value) -> Value:
    return b.fpext(simd.ir_load(b, address, F16, 2), F32)


@operation(none, i64, f32)
def write_bf16(b: Builder, address: Value, x: Value) -> None:
    """One value, rounded as `simd.store_bf16` rounds."""
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.add(b.add(bits, I32(0x7FFF)), odd)
    rounded = b.select(b.fcmp_unordered("uno", x, x), I32(0x7FC00000), rounded)
    simd.ir_store(b, address, b.trunc(b.lshr(rounded, I32(16)), simd.I16), 2)


model_at, layer_at, row_at = record_at(MODEL), record_at(LAYER), record_at(ROW)
