"""Products with matrices in few bits, on the layout of hymba/ops/packed.py: y = x W^T.

    x (N, columns) float32  ->  y (N, rows) float32

Weights are read once, as they lie, and never made wide in memory. Two ways:

    quantised   each group of a row of x becomes int8 with a scale of its own (its largest number is
                127): four byte products an instruction, exact sums in int32, one float32 sum over
                the groups. Relative error about 5e-3, of the order of the weights' own rounding.
    exact       x stays float32 and the codes are widened in registers: 3e-7, at 80 % of the speed
                where memory is the limit and a quarter where computing is.

A step of one row is bound by memory and reads near its limit. For many rows a tile of 32 weights'
rows stays in the second-level cache while four rows of x after the other meet it, so the weights
still come from memory once (once for each `PANEL` rows). All rows go the same way through the same
sums: a row's result does not depend on what stands beside it, bit by bit.

Stored codes are unsigned (code + zero); sums begin at -zero * sum(group of x), which undoes that.
Lanes are rows of weights: nothing is summed across lanes.

An x in int8 (`quantise`) is, for a row,  int8 (groups * G) | scales float32 | starts int32,  one
of each a group, and takes `activation_bytes`. What is not finite in x makes its row's results not
finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from torch import Tensor

from hymba.ops.backend import dense_last
from hymba.ops.cpu.compiled import job, kernel
from hymba.ops.cpu.simd import (
    F32,
    I32,
    Builder,
    F32x16,
    Floats,
    I8x16,
    I32x16,
    Value,
    i64,
    ir_absolute,
    ir_at,
    ir_call,
    ir_constant,
    ir_dot4,
    ir_fma,
    ir_half,
    ir_load,
    ir_splat,
    ir_store,
    none,
    operation,
    prefetch,
    read_f32,
    read_i64,
    write_f32,
)
from hymba.ops.cpu.team import Room, claim, finish, guided, guided_count, team, wait
from hymba.ops.packed import HALF, TILE, Packed, unpack
from hymba.schemes import SCHEMES

PANEL = 1024  # rows of x for which weights are read once: what a third-level cache holds
PIECE = 1 << 16  # bytes of weights, for one row of x: a thread's least share
AHEAD = 1152  # bytes: how far in front weights are asked for
TINY = 1e-36  # a group whose numbers are all smaller is zero: 127 / it would be infinite


# ---- one group of columns, as IR -----------------------------------------------------------


def group_quantiser(bits: int, group: int) -> Any:
    """One group of x -> int8, its scale, and where sums begin."""
    zero = 1 << bits - 1

    @operation(none, i64, i64, i64, i64)
    def quantise_group(b: Builder, x: Value, codes: Value, scale: Value, start: Value) -> None:
        vectors = [ir_load(b, ir_at(b, x, 4 * i), F32x16, 4) for i in range(0, group, HALF)]
        # As integers: the same order for what is not negative, and NaN above all.
        sizes = [b.bitcast(ir_absolute(b, v), I32x16) for v in vectors]
        most = sizes[0]
        for v in sizes[1:]:
            most = ir_call(b, "llvm.smax.v16i32", I32x16, most, v)
        largest = b.bitcast(ir_call(b, "llvm.vector.reduce.smax.v16i32", I32, most), F32)
        present = b.fcmp_ordered(">", largest, F32(TINY))
        inverse = b.select(present, b.fdiv(F32(127.0), largest), F32(0.0))
        inverse = ir_splat(b, inverse, F32x16)
        total = ir_constant(I32x16, 0)
        for i, v in enumerate(vectors):
            near = ir_call(b, "llvm.rint.v16f32", F32x16, b.fmul(v, inverse))
            whole = b.fptosi(near, I32x16)
            ir_store(b, ir_at(b, codes, HALF * i), b.trunc(whole, I8x16))
            total = b.add(total, whole)
        total = ir_call(b, "llvm.vector.reduce.add.v16i32", I32, total)
        ir_store(b, scale, b.fdiv(largest, F32(127.0)), 4)
        ir_store(b, start, b.mul(total, I32(-zero)), 4)

    return quantise_group


def _columns(b: Builder, bits: int, group: int, weights: Value) -> Any:
    """For each piece of 64 bytes: (first column, its vectors of both halves)."""
    half = HALF * group * bits // 8
    for piece in range(half // 64):
        places = (ir_at(b, weights, half * h + 64 * piece) for h in range(2))
        yield piece * 32 // bits, [ir_load(b, place, I32x16) for place in places]


def _scales(b: Builder, bits: int, group: int, weights: Value) -> list[Value]:
    """Of the rows of both halves."""
    return [ir_half(b, ir_at(b, weights, 4 * group * bits + 2 * HALF * h)) for h in range(2)]


def _rows(b: Builder, first: Value, step: Value, count: int) -> list[Value]:
    """Addresses."""
    places = [first]
    for _ in range(1, count):
        places.append(b.add(places[-1], step))
    return places


def _quantised_group(bits: int, group: int, rows: int) -> Any:
    """sums of `rows` rows of x, both halves, + one group's part."""
    sums_type = types.UniTuple(Floats, 2 * rows)

    @operation(sums_type, sums_type, i64, i64, i64, i64, i64)
    def quantised_group(
        b: Builder, sums: Value, weights: Value, x: Value, scale: Value, start: Value, step: Value
    ) -> Value:
        places = _rows(b, x, step, rows)
        begins = [ir_load(b, place, I32, 4) for place in _rows(b, start, step, rows)]
        parts = [[ir_splat(b, begin, I32x16)] * 2 for begin in begins]
        low = ir_constant(I32x16, 0x0F0F0F0F)
        for column, codes in _columns(b, bits, group, weights):
            steps = [(column, codes)]
            if bits == 4:
                tops = [b.lshr(v, ir_constant(I32x16, 4)) for v in codes]
                steps = [(column, [b.and_(v, low) for v in codes])]
                steps.append((column + 4, [b.and_(v, low) for v in tops]))
            for at, four in steps:
                for r in range(rows):
                    mine = ir_splat(b, ir_load(b, ir_at(b, places[r], at), I32), I32x16)
                    for h in range(2):
                        parts[r][h] = ir_dot4(b, parts[r][h], four[h], mine, bits == 4)
        scales = _scales(b, bits, group, weights)
        result = ir.Constant(sums.type, ir.Undefined)
        for r, place in enumerate(_rows(b, scale, step, rows)):
            mine = ir_splat(b, ir_load(b, place, F32, 4), F32x16)
            for h in range(2):
                part = b.fmul(b.sitofp(parts[r][h], F32x16), mine)
                value = ir_fma(b, part, scales[h], b.extract_value(sums, 2 * r + h))
                result = b.insert_value(result, value, 2 * r + h)
        return result

    return quantised_group


def _exact_group(bits: int, group: int, rows: int) -> Any:
    """The same for x in float32. Two sums a row and half, so that additions need not wait."""
    sums_type = types.UniTuple(Floats, 2 * rows)
    flip = -(1 << 31) | sum(1 << (bits * k + bits - 1) for k in range(32 // bits - 1))

    @operation(sums_type, sums_type, i64, i64, i64)
    def exact_group(b: Builder, sums: Value, weights: Value, x: Value, step: Value) -> Value:
        places = _rows(b, x, step, rows)
        nought = ir_constant(F32x16, 0.0)
        parts = [[[nought, nought] for _ in range(2)] for _ in range(rows)]
        for column, codes in _columns(b, bits, group, weights):
            signed = [b.xor(v, ir_constant(I32x16, flip)) for v in codes]
            for k in range(32 // bits):  # bits k * bits and up: which column, see ops/packed.py
                at = column + (k if bits == 8 else k // 2 + 4 * (k % 2))
                up, down = (ir_constant(I32x16, n) for n in (32 - bits * (k + 1), 32 - bits))
                wide = [b.sitofp(b.ashr(b.shl(v, up), down), F32x16) for v in signed]
                for r in range(rows):
                    mine = ir_splat(b, ir_load(b, ir_at(b, places[r], 4 * at), F32, 4), F32x16)
                    for h in range(2):
                        parts[r][h][k % 2] = ir_fma(b, wide[h], mine, parts[r][h][k % 2])
        scales = _scales(b, bits, group, weights)
        result = ir.Constant(sums.type, ir.Undefined)
        for r in range(rows):
            for h in range(2):
                part = b.fadd(*parts[r][h])
                value = ir_fma(b, part, scales[h], b.extract_value(sums, 2 * r + h))
                result = b.insert_value(result, value, 2 * r + h)
        return result

    return exact_group


def _sums(rows: int) -> tuple[Any, Any]:
    """zeros() -> sums, and put(sums, y, step): both halves of each row of y."""
    sums_type = types.UniTuple(Floats, 2 * rows)

    @operation(sums_type)
    def zeros(b: Builder) -> Value:
        return ir.Constant(ir.ArrayType(F32x16, 2 * rows), [ir_constant(F32x16, 0.0)] * 2 * rows)

    @operation(none, sums_type, i64, i64)
    def put(b: Builder, sums: Value, y: Value, step: Value) -> None:
        for r, place in enumerate(_rows(b, y, step, rows)):
            for h in range(2):
                ir_store(b, ir_at(b, place, 64 * h), b.extract_value(sums, 2 * r + h), 4)

    return zeros, put


# ---- tiles ---------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """For a number of bits and a group; all are to be called in kernels. Addresses throughout.

    `one`, `two` and `four` are for so many rows of x at once: they write 32 numbers of y a row."""

    quantise: Any  # (x, groups, to): a row of float32 -> int8; nothing where `exact`
    one: Any  # (tile, groups, x, x_step, y, y_step)
    two: Any
    four: Any
    tiles: Any  # (weights, first, last, groups, x, y): one row of x, some tiles, no rest in y


@cache
def kernels(bits: int, group: int, exact: bool = False) -> Kernels:
    """x is float32 where `exact`, else what `quantise` made. Groups are multiples of 16."""
    if group % 16 or bits not in (4, 8):
        raise ValueError(f"no kernel for {bits} bits in groups of {group}")
    tile_bytes = 4 * group * bits + 2 * TILE
    quantise_group = group_quantiser(bits, group)

    @kernel
    def quantise(x: int, groups: int, to: int) -> None:
        for g in range(groups):
            scale = to + groups * group + 4 * g
            quantise_group(x + 4 * group * g, to + group * g, scale, scale + 4 * groups)

    one, two, four = (_tile(bits, group, rows, exact) for rows in (1, 2, 4))

    @kernel
    def tiles(weights: int, first: int, last: int, groups: int, x: int, y: int) -> None:
        for t in range(first, last):
            one(weights + t * groups * tile_bytes, groups, x, 0, y + 4 * TILE * t, 0)

    return Kernels(quantise, one, two, four, tiles)


def _tile(bits: int, group: int, rows: int, exact: bool) -> Any:
    """One tile, `rows` rows of x. Only a single row waits for memory, so only it looks ahead."""
    zeros, put = _sums(rows)
    add = _adding_exact(bits, group, rows) if exact else _adding_quantised(bits, group, rows)
    group_bytes = 4 * group * bits + 2 * TILE
    ahead = AHEAD if rows == 1 else 0

    @kernel
    def tile(weights: int, groups: int, x: int, x_step: int, y: int, y_step: int) -> None:
        sums = zeros()
        for g in range(groups):
            if ahead:
                for line in range(0, group_bytes, 64):
                    prefetch(weights + ahead + line)
            sums = add(sums, weights, x, g, groups, x_step)
            weights += group_bytes
        put(sums, y, y_step)

    return tile


def _adding_quantised(bits: int, group: int, rows: int) -> Any:
    quantised_group = _quantised_group(bits, group, rows)

    @kernel
    def add(sums: Any, weights: int, x: int, g: int, groups: int, x_step: int) -> Any:
        scale = x + groups * group + 4 * g
        start = scale + 4 * groups
        return quantised_group(sums, weights, x + group * g, scale, start, x_step)

    return add


def _adding_exact(bits: int, group: int, rows: int) -> Any:
    exact_group = _exact_group(bits, group, rows)

    @kernel
    def add(sums: Any, weights: int, x: int, g: int, groups: int, x_step: int) -> Any:
        return exact_group(sums, weights, x + 4 * group * g, x_step)

    return add


def activation_bytes(groups: int, group: int) -> int:
    """What a row of x takes in int8, a multiple of 64."""
    return -(-groups * (group + 8) // 64) * 64


# ---- the whole product, by a team ----------------------------------------------------------


def any_rows(bits: int, group: int, exact: bool) -> Any:
    """A kernel: some groups of a tile and any number of rows, four at a time."""
    made = kernels(bits, group, exact)
    one, two, four = made.one, made.two, made.four

    @kernel
    def meet(tile: int, groups: int, x: int, step: int, count: int, y: int, y_step: int) -> None:
        done = 0
        while done + 4 <= count:
            four(tile, groups, x + done * step, step, y + done * y_step, y_step)
            done += 4
        if done + 2 <= count:
            two(tile, groups, x + done * step, step, y + done * y_step, y_step)
            done += 2
        if done < count:
            one(tile, groups, x + done * step, step, y + done * y_step, y_step)

    return meet


def _product(bits: int, group: int, exact: bool) -> Callable[[int, int, int, int], None]:
    """A job: phase 0 puts x in int8, row by row; then a phase for each panel of rows of x."""
    made = kernels(bits, group, exact)
    quantise, one, meet = made.quantise, made.one, any_rows(bits, group, exact)
    tile_bytes = 4 * group * bits + 2 * TILE

    @kernel
    def meet_last(
        tile: int,
        groups: int,
        x: int,
        step: int,
        count: int,
        y: int,
        rows: int,
        have: int,
        line: int,
    ) -> None:
        """The same for a tile of which only `have` rows are there, by way of a line of its own."""
        for row in range(count):
            one(tile, groups, x + row * step, step, line, 0)
            for i in range(have):
                write_f32(y + row * 4 * rows + 4 * i, read_f32(line + 4 * i))

    def product(thread: int, threads: int, phases: int, arguments: int) -> None:
        x, x_step = read_i64(arguments), read_i64(arguments + 8)
        count, room = read_i64(arguments + 16), read_i64(arguments + 24)
        y, weights = read_i64(arguments + 32), read_i64(arguments + 40)
        rows, groups = read_i64(arguments + 48), read_i64(arguments + 56)
        line, codes = room + thread * 4 * TILE, room + threads * 4 * TILE
        step = x_step
        if not exact:
            step = (groups * (group + 8) + 63) // 64 * 64
            while True:
                row = claim(phases, 0)
                if row >= count:
                    break
                quantise(x + row * x_step, groups, codes + row * step)
                finish(phases, 0)
            wait(phases, 0, count)
            x = codes
        tiles, stream = (rows + TILE - 1) // TILE, groups * tile_bytes
        phase, first = 0, 0
        while first < count:
            phase += 1
            panel = min(PANEL, count - first)
            least = max(1, PIECE // (stream * panel))
            pieces = guided_count(tiles, threads, least)
            source, target = x + first * step, y + first * 4 * rows
            while True:
                piece = claim(phases, phase)
                if piece >= pieces:
                    break
                begin, end = guided(tiles, threads, least, piece)
                for t in range(begin, end):
                    tile, to, have = weights + t * stream, target + 4 * TILE * t, rows - TILE * t
                    if have >= TILE:
                        meet(tile, groups, source, step, panel, to, 4 * rows)
                    else:
                        meet_last(tile, groups, source, step, panel, to, rows, have, line)
                finish(phases, phase)
            wait(phases, phase, pieces)
            first += panel

    return product


# numba keeps what it compiled only for functions of a module, so the known schemes are written out.
_int4, _int8 = (
    kernel(_product(s.bits, s.group, False)) for s in (SCHEMES["int4"], SCHEMES["int8"])
)
_exact4, _exact8 = (
    kernel(_product(s.bits, s.group, True)) for s in (SCHEMES["int4"], SCHEMES["int8"])
)


@job
def _int4_job(thread: int, threads: int, phases: int, arguments: int) -> None:
    _int4(thread, threads, phases, arguments)


@job
def _int8_job(thread: int, threads: int, phases: int, arguments: int) -> None:
    _int8(thread, threads, phases, arguments)


@job
def _exact4_job(thread: int, threads: int, phases: int, arguments: int) -> None:
    _exact4(thread, threads, phases, arguments)


@job
def _exact8_job(thread: int, threads: int, phases: int, arguments: int) -> None:
    _exact8(thread, threads, phases, arguments)


@cache
def _job(bits: int, group: int, exact: bool) -> job:
    known = {
        SCHEMES["int4"]: (_int4_job, _exact4_job),
        SCHEMES["int8"]: (_int8_job, _exact8_job),
    }
    for scheme, jobs in known.items():
        if (scheme.bits, scheme.group) == (bits, group):
            return jobs[exact]
    return job(_product(bits, group, exact))


_room = Room()


def packed_linear(x: Tensor, packed: Packed, exact: bool | None = None) -> Tensor:
    """x (N, columns) -> (N, rows), in x's dtype; no gradient flows. See above for `exact`, which
    HYMBA_EXACT=1 asks for everywhere."""
    tiles, rows, columns, scheme = packed
    if x.shape[1] != columns:
        raise ValueError(f"packed_linear: x has {x.shape[1]} columns where {columns} are needed")
    if scheme.kind != "int":
        raise ValueError(f"packed_linear: {scheme.name} has no whole codes")
    exact = exact_asked() if exact is None else exact
    groups, count = scheme.groups(columns), len(x)
    wide = x.detach().float() if x.dtype != torch.float32 else x
    if columns % scheme.group:
        wide = F.pad(wide, (0, groups * scheme.group - columns))
    wide = dense_last(wide)
    y = torch.empty(count, rows)
    if count:
        made = team()
        work = tiles.numel() * (count + 3) // 4
        threads = min(made.threads, work // (2 * PIECE) + 1)
        room = threads * 4 * TILE
        if not exact:
            room += count * activation_bytes(groups, scheme.group)
        made.run(
            _job(scheme.bits, scheme.group, exact),
            *(wide.data_ptr(), 4 * wide.stride(0), count, _room.at_least(room)),
            *(y.data_ptr(), tiles.data_ptr(), rows, groups),
            phases=1 + -(-count // PANEL),
            threads=threads,
        )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


@cache
def exact_asked() -> bool:
    return os.environ.get("HYMBA_EXACT", "0") not in ("", "0")


def packed_linear_int8_reference(x: Tensor, packed: Packed) -> Tensor:
    """The slow twin of the quantised way: x to int8 by groups, sums of integers, then of floats.
    x (N, columns) float32 -> (N, rows)."""
    codes, scales = unpack(packed)
    group = packed.scheme.group
    padded = F.pad(x.float(), (0, codes.shape[1] - packed.columns)).view(len(x), -1, group)
    largest = padded.abs().amax(-1, keepdim=True)
    # A number divided by a tensor is a product with its reciprocal in torch, and rounds otherwise.
    inverse = torch.where(largest > TINY, torch.full_like(largest, 127) / largest, 0.0)
    whole = (padded * inverse).round().double()  # (N, groups, G)
    wide = codes.view(packed.rows, -1, group).double()
    sums = torch.einsum("ngc,rgc->nrg", whole, wide)
    return (sums * (largest[..., 0] / 127)[:, None].double() * scales.double()).sum(-1).float()
