"""Vectors, raw memory and atomics for numba's compiled functions, emitted as LLVM IR: no compiler
on the user's machine.

    Floats  16 x float32          Ints  16 x int32

Addresses are int64. A CPU with narrower registers gets the same code: LLVM cuts the vectors in two
or four. Only `dot4`, sums of four byte products, asks for instructions by name (AVX-512 VNNI,
AVX-VNNI, AVX2, ARM's dot products) and has a form for any CPU. Loads ask for no alignment but that
of one element. Plain loops are no alternative: LLVM does not vectorise them for packed weights, and
they ran at a fortieth of the speed.

Names that begin with `ir_` build IR inside an operation; all others are called in kernels. Errors
of `exp`, `softplus` and `silu` are some 1e-7, relative; infinities saturate and NaN stays NaN.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable
from typing import Any, TypeAlias

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from hymba.ops.cpu.compiled import name_apart

LANES = 16

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
F32x16, F16x16 = ir.VectorType(F32, LANES), ir.VectorType(F16, LANES)
I32x16, I16x16, I8x16 = (ir.VectorType(kind, LANES) for kind in (I32, I16, I8))
I8x64 = ir.VectorType(I8, 4 * LANES)

Builder: TypeAlias = Any  # llvmlite has no types
Value: TypeAlias = Any


class Vector(types.Type):
    """A vector as numba sees it: one LLVM value in a register."""

    def __init__(self, name: str, form: Any):
        self.form = form
        super().__init__(name)


Floats, Ints = Vector("F32x16", F32x16), Vector("I32x16", I32x16)
i32, i64, f32, none = types.int32, types.int64, types.float32, types.void


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        super().__init__(manager, kind, kind.form)


# What the CPU has, or is told to have (numba's own variables: a test of the narrower paths).


def _features() -> set[str]:
    told = os.environ.get("NUMBA_CPU_FEATURES")
    if told is not None:
        return {word[1:] for word in told.split(",") if word.startswith("+")}
    if os.environ.get("NUMBA_CPU_NAME"):
        return set()
    return {name for name, present in binding.get_host_cpu_features().items() if present}


FEATURES = _features()
X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64")
# Since LLVM 22 the byte operands of vpdpbusd are vectors of bytes; before, of int32.
BYTE_OPERANDS = binding.llvm_version_info[0] >= 22


def unsupported() -> str:
    """Why kernels cannot run on this CPU; empty where they can."""
    missing = {"avx2", "fma", "f16c"} - FEATURES if X86 else set()
    if missing:  # float16 would be converted by a function that is nowhere, and fma be a call
        return f"the CPU has no {', '.join(sorted(missing))}"
    return "" if X86 or ARM else f"they were not written for {platform.machine()}"


# ---- IR ------------------------------------------------------------------------------------


def ir_pointer(b: Builder, address: Value, kind: Any) -> Value:
    return b.inttoptr(address, kind.as_pointer())


def ir_at(b: Builder, base: Value, offset: int) -> Value:
    return b.add(base, base.type(offset)) if offset else base


def ir_load(b: Builder, address: Value, kind: Any, align: int = 1) -> Value:
    value = b.load(ir_pointer(b, address, kind))
    value.align = align
    return value


def ir_store(b: Builder, address: Value, value: Value, align: int = 1) -> None:
    b.store(value, ir_pointer(b, address, value.type)).align = align


def ir_constant(kind: Any, x: float) -> Value:
    """x in every lane."""
    return ir.Constant(kind, [x] * kind.count)


def ir_splat(b: Builder, x: Value, kind: Any) -> Value:
    undefined = ir.Constant(kind, ir.Undefined)
    one = b.insert_element(undefined, x, I32(0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, kind.count), None))


def ir_lanes(b: Builder, x: Value, start: int, count: int) -> Value:
    """Lanes start .. start + count."""
    lanes = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return b.shuffle_vector(x, x, lanes)


def ir_call(b: Builder, name: str, returned: Any, *args: Value) -> Value:
    """Call an LLVM intrinsic or a C function by its name."""
    kind = ir.FunctionType(returned, [x.type for x in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def ir_fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return ir_call(b, f"llvm.fma.v{LANES}f32", F32x16, x, y, z)


def ir_smaller(b: Builder, x: Value, bound: Value) -> Value:
    """Per lane; NaN in x stays."""
    return b.select(b.fcmp_ordered("<", bound, x), bound, x)


def ir_larger(b: Builder, x: Value, bound: Value) -> Value:
    """Per lane; NaN in x stays."""
    return b.select(b.fcmp_ordered(">", bound, x), bound, x)


def ir_bfloat(b: Builder, address: Value) -> Value:
    """16 bfloat16 -> 16 float32."""
    wide = b.zext(ir_load(b, address, I16x16), I32x16)
    return b.bitcast(b.shl(wide, ir_constant(I32x16, 16)), F32x16)


def ir_half(b: Builder, address: Value) -> Value:
    """16 float16 -> 16 float32."""
    return b.fpext(ir_load(b, address, F16x16), F32x16)


def _ir_parts(b: Builder, count: int, f: Callable[..., Value], *vectors: Value) -> Value:
    """f on `count` equal parts of 16 x int32 vectors, for narrower registers."""
    width = LANES // count
    parts = [f(*[ir_lanes(b, v, width * k, width) for v in vectors]) for k in range(count)]
    while len(parts) > 1:
        joined = []
        for low, high in zip(parts[::2], parts[1::2], strict=True):
            both = list(range(2 * low.type.count))
            joined.append(
                b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(both)), both))
            )
        parts = joined
    return parts[0]


def ir_dot4(b: Builder, total: Value, u: Value, s: Value, small: bool = False) -> Value:
    """total + the sum of four (unsigned byte of u * signed byte of s) in each lane of 16 x int32.

    small: the bytes of u are at most 127, which some CPUs do in half the time."""
    if X86 and "avx512vnni" in FEATURES:
        return _vnni(b, "llvm.x86.avx512.vpdpbusd.512", total, u, s)
    if X86 and "avxvnni" in FEATURES:  # 256 bits, CPUs of laptops
        name = "llvm.x86.avx512.vpdpbusd.256"
        return _ir_parts(b, 2, lambda *part: _vnni(b, name, *part), total, u, s)
    if X86 and "avx2" in FEATURES:
        return _ir_parts(b, 2, lambda *part: _avx2(b, small, *part), total, u, s)
    if ARM and ("i8mm" in FEATURES or small and "dotprod" in FEATURES):
        name = "usdot" if "i8mm" in FEATURES else "sdot"
        return _ir_parts(b, 4, lambda *part: _neon(b, name, *part), total, u, s)
    return _any_cpu(b, total, u, s)


def _vnni(b: Builder, name: str, total: Value, u: Value, s: Value) -> Value:
    if BYTE_OPERANDS:
        four = ir.VectorType(I8, 4 * total.type.count)
        u, s = b.bitcast(u, four), b.bitcast(s, four)
    return ir_call(b, name, total.type, total, u, s)


def _avx2(b: Builder, small: bool, total: Value, u: Value, s: Value) -> Value:
    """Sums of two byte products stay below 2^15 only if u is small: the top bit goes by itself."""
    four, two = ir.VectorType(I8, 32), ir.VectorType(I16, 16)

    def add(total: Value, u: Value, times: int) -> Value:
        args = b.bitcast(u, four), b.bitcast(s, four)
        pairs = ir_call(b, "llvm.x86.avx2.pmadd.ub.sw", two, *args)
        name = "llvm.x86.avx2.pmadd.wd"
        return b.add(total, ir_call(b, name, total.type, pairs, ir_constant(two, times)))

    if small:
        return add(total, u, 1)
    low = b.and_(u, ir_constant(u.type, 0x7F7F7F7F))
    top = b.and_(b.lshr(u, ir_constant(u.type, 7)), ir_constant(u.type, 0x01010101))
    return add(add(total, low, 1), top, 128)


def _neon(b: Builder, name: str, total: Value, u: Value, s: Value) -> Value:
    four = ir.VectorType(I8, 16)
    args = total, b.bitcast(u, four), b.bitcast(s, four)
    return ir_call(b, f"llvm.aarch64.neon.{name}.v4i32.v16i8", total.type, *args)


def _any_cpu(b: Builder, total: Value, u: Value, s: Value) -> Value:
    byte, top = ir_constant(I32x16, 0xFF), ir_constant(I32x16, 24)
    for k in range(4):
        x = b.and_(b.lshr(u, ir_constant(I32x16, 8 * k)), byte)
        y = b.ashr(b.shl(s, ir_constant(I32x16, 24 - 8 * k)), top)
        total = b.add(total, b.mul(x, y))
    return total


def ir_exp(b: Builder, x: Value) -> Value:
    """2^n times a polynomial in what is left; between exp(-87) and exp(88)."""

    def c(v: float) -> Value:
        return ir_constant(F32x16, v)

    x = ir_larger(b, ir_smaller(b, x, c(88.0)), c(-87.0))
    # Added to 1.5 * 2^23 a number is rounded, and stands as an integer in the low bits.
    shifted = ir_fma(b, x, c(1.4426950408889634), c(12582912.0))
    n = b.fsub(shifted, c(12582912.0))
    r = ir_fma(b, n, c(-0.693359375), x)  # log 2 in two parts
    r = ir_fma(b, n, c(2.12194440e-4), r)
    p = c(1 / 720)
    for k in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = ir_fma(b, p, r, c(k))
    power = b.shl(b.bitcast(shifted, I32x16), ir_constant(I32x16, 23))
    return b.bitcast(b.add(b.bitcast(p, I32x16), power), F32x16)


def ir_absolute(b: Builder, x: Value) -> Value:
    return ir_call(b, f"llvm.fabs.v{LANES}f32", F32x16, x)


# ---- operations of kernels -----------------------------------------------------------------


def operation(returned: Any, *args: Any) -> Callable[[Callable[..., Value]], Any]:
    """Decorator: build(b, *values) -> value becomes a function for kernels with these types."""

    def decorate(build: Callable[..., Value]) -> Any:
        name_apart(build)

        def typing(context: Any, *_: Any) -> Any:
            def generate(context: Any, b: Builder, signature: Any, values: Any) -> Value:
                value = build(b, *values)
                return context.get_dummy_value() if value is None else value

            return returned(*args), generate

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(typing, name, getattr(build, name))
        # numba binds the arguments by the signature it finds, and does not know *args here.
        names = ["context", *list(inspect.signature(build).parameters)[1:]]
        kinds = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        typing.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
        made = intrinsic(typing)
        made.__qualname__ = build.__qualname__
        return made

    return decorate


@operation(Floats, i64)
def load(b: Builder, address: Value) -> Value:
    return ir_load(b, address, F32x16, 4)


@operation(none, i64, Floats)
def store(b: Builder, address: Value, x: Value) -> None:
    ir_store(b, address, x, 4)


def ir_first(b: Builder, count: Value) -> Value:
    """A mask of the lanes below `count`, which may be any number."""
    lanes = ir.Constant(I32x16, list(range(LANES)))
    return b.icmp_signed("<", lanes, ir_splat(b, b.trunc(count, I32), I32x16))


def ir_load_first(b: Builder, address: Value, count: Value) -> Value:
    args = ir_pointer(b, address, F32x16), I32(4), ir_first(b, count), ir_constant(F32x16, 0.0)
    return ir_call(b, "llvm.masked.load.v16f32.p0", F32x16, *args)


@operation(Floats, i64, i64)
def load_first(b: Builder, address: Value, count: Value) -> Value:
    """`count` float32, then zeros; nothing else is read."""
    return ir_load_first(b, address, count)


@operation(none, i64, Floats, i64)
def store_first(b: Builder, address: Value, x: Value, count: Value) -> None:
    args = x, ir_pointer(b, address, F32x16), I32(4), ir_first(b, count)
    ir_call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), *args)


@operation(Floats, i64)
def load_f16(b: Builder, address: Value) -> Value:
    return ir_half(b, address)


@operation(Floats, i64)
def load_bf16(b: Builder, address: Value) -> Value:
    return ir_bfloat(b, address)


@operation(none, i64, Floats)
def store_bf16(b: Builder, address: Value, x: Value) -> None:
    """Rounded to the nearest, ties to even."""
    bits = b.bitcast(x, I32x16)
    odd = b.and_(b.lshr(bits, ir_constant(I32x16, 16)), ir_constant(I32x16, 1))
    rounded = b.add(b.add(bits, ir_constant(I32x16, 0x7FFF)), odd)
    nan = ir_constant(I32x16, 0x7FC00000)  # adding could carry a NaN over to infinity
    rounded = b.select(b.fcmp_unordered("uno", x, x), nan, rounded)
    ir_store(b, address, b.trunc(b.lshr(rounded, ir_constant(I32x16, 16)), I16x16), 2)


@operation(Floats, i64, i64)
def load_first_bf16(b: Builder, address: Value, count: Value) -> Value:
    """As `load_first`, of bfloat16."""
    zeros = ir.Constant(I16x16, None)
    args = ir_pointer(b, address, I16x16), I32(2), ir_first(b, count), zeros
    wide = b.zext(ir_call(b, "llvm.masked.load.v16i16.p0", I16x16, *args), I32x16)
    return b.bitcast(b.shl(wide, ir_constant(I32x16, 16)), F32x16)


@operation(Floats, i64)
def load_i8(b: Builder, address: Value) -> Value:
    return b.sitofp(ir_load(b, address, I8x16), F32x16)


@operation(Ints, i64)
def load_ints(b: Builder, address: Value) -> Value:
    return ir_load(b, address, I32x16, 4)


@operation(none, i64, Ints)
def store_i8(b: Builder, address: Value, x: Value) -> None:
    """The low byte of each."""
    ir_store(b, address, b.trunc(x, I8x16))


@operation(Floats, f32)
def splat(b: Builder, x: Value) -> Value:
    return ir_splat(b, x, F32x16)


@operation(Floats, i64)
def broadcast(b: Builder, address: Value) -> Value:
    """The float32 at an address, in every lane."""
    return ir_splat(b, ir_load(b, address, F32, 4), F32x16)


@operation(Floats, Floats, Floats, Floats)
def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z"""
    return ir_fma(b, x, y, z)


@operation(Floats, Floats, Floats)
def add(b: Builder, x: Value, y: Value) -> Value:
    return b.fadd(x, y)


@operation(Floats, Floats, Floats)
def sub(b: Builder, x: Value, y: Value) -> Value:
    return b.fsub(x, y)


@operation(Floats, Floats, Floats)
def mul(b: Builder, x: Value, y: Value) -> Value:
    return b.fmul(x, y)


@operation(Floats, Floats, Floats)
def div(b: Builder, x: Value, y: Value) -> Value:
    return b.fdiv(x, y)


@operation(Floats, Floats, Floats)
def larger(b: Builder, x: Value, y: Value) -> Value:
    """Per lane; NaN in x stays."""
    return ir_larger(b, x, y)


@operation(Floats, Floats)
def absolute(b: Builder, x: Value) -> Value:
    return ir_absolute(b, x)


@operation(Floats, Floats, Floats, i64)
def choose(b: Builder, x: Value, y: Value, count: Value) -> Value:
    """The first lanes of x, the others of y."""
    return b.select(ir_first(b, count), x, y)


@operation(f32, Floats)
def total(b: Builder, x: Value) -> Value:
    """The sum of the lanes, in a fixed order."""
    count = LANES
    while count > 1:
        count //= 2
        x = b.fadd(ir_lanes(b, x, 0, count), ir_lanes(b, x, count, count))
    return b.extract_element(x, I32(0))


@operation(f32, Floats)
def largest(b: Builder, x: Value) -> Value:
    return ir_call(b, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, x)


@operation(Ints, Floats)
def rounded(b: Builder, x: Value) -> Value:
    """To the nearest integer, ties to even; |x| < 2^31."""
    return b.fptosi(ir_call(b, f"llvm.rint.v{LANES}f32", F32x16, x), I32x16)


@operation(Ints, Ints, Ints)
def add_ints(b: Builder, x: Value, y: Value) -> Value:
    return b.add(x, y)


@operation(i32, Ints)
def total_ints(b: Builder, x: Value) -> Value:
    return ir_call(b, f"llvm.vector.reduce.add.v{LANES}i32", I32, x)


@operation(Floats, Floats)
def exp(b: Builder, x: Value) -> Value:
    return ir_exp(b, x)


@operation(Floats, Floats)
def silu(b: Builder, x: Value) -> Value:
    """x / (1 + exp(-x))"""
    return b.fdiv(x, b.fadd(ir_constant(F32x16, 1.0), ir_exp(b, b.fneg(x))))


@operation(Floats, Floats)
def softplus(b: Builder, x: Value) -> Value:
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|), and log(1 + e) = 2 artanh(s) with
    s = e / (2 + e), at most 1/3: few terms of its series, and exact also where it is tiny."""

    def c(v: float) -> Value:
        return ir_constant(F32x16, v)

    e = ir_exp(b, b.fneg(ir_absolute(b, x)))
    s = b.fdiv(e, b.fadd(e, c(2.0)))
    square = b.fmul(s, s)
    series = c(2 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        series = ir_fma(b, series, square, c(2 / k))
    return ir_fma(b, series, s, ir_larger(b, x, c(0.0)))


# ---- scalars, atomics ----------------------------------------------------------------------


@operation(i64, i64)
def read_i64(b: Builder, address: Value) -> Value:
    return ir_load(b, address, I64, 8)


@operation(none, i64, i64)
def write_i64(b: Builder, address: Value, x: Value) -> None:
    ir_store(b, address, x, 8)


@operation(i32, i64)
def read_i32(b: Builder, address: Value) -> Value:
    return ir_load(b, address, I32, 4)


@operation(none, i64, i32)
def write_i32(b: Builder, address: Value, x: Value) -> None:
    ir_store(b, address, x, 4)


@operation(f32, i64)
def read_f32(b: Builder, address: Value) -> Value:
    return ir_load(b, address, F32, 4)


@operation(none, i64, f32)
def write_f32(b: Builder, address: Value, x: Value) -> None:
    ir_store(b, address, x, 4)


def record_at(form: np.dtype) -> Any:
    """A function for kernels: address -> the record of this form that lies there."""
    kind = numba.from_dtype(form)

    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Builder, signature: Any, values: Any) -> Value:
            return b.inttoptr(values[0], context.get_value_type(kind))

        return kind(i64), generate

    return at


@operation(i64, i64, i64)
def atomic_add(b: Builder, address: Value, x: Value) -> Value:
    """What was there before."""
    return b.atomic_rmw("add", ir_pointer(b, address, I64), x, "seq_cst")


@operation(i64, i64, i64)
def atomic_or(b: Builder, address: Value, x: Value) -> Value:
    """What was there before."""
    return b.atomic_rmw("or", ir_pointer(b, address, I64), x, "seq_cst")


@operation(i64, i64, i64)
def atomic_exchange(b: Builder, address: Value, x: Value) -> Value:
    """What was there before."""
    return b.atomic_rmw("xchg", ir_pointer(b, address, I64), x, "seq_cst")


@operation(i64, i64)
def atomic_read(b: Builder, address: Value) -> Value:
    return b.load_atomic(ir_pointer(b, address, I64), "seq_cst", 8)


@operation(none, i64, i64)
def atomic_write(b: Builder, address: Value, x: Value) -> None:
    b.store_atomic(x, ir_pointer(b, address, I64), "seq_cst", 8)


@operation(none)
def pause(b: Builder) -> None:
    """A hint that this is a waiting loop. By intrinsic: inline assembly would end the process,
    because numba sets up no assembly parser."""
    if X86:
        ir_call(b, "llvm.x86.sse2.pause", ir.VoidType())
    elif ARM:
        ir_call(b, "llvm.aarch64.hint", ir.VoidType(), I32(1))


@operation(none)
def give_way(b: Builder) -> None:
    """Let another thread run on this core."""
    ir_call(b, "SwitchToThread" if platform.system() == "Windows" else "sched_yield", I32)


@operation(none, i64)
def prefetch(b: Builder, address: Value) -> None:
    """Ask for a cache line; any address will do, mapped or not."""
    pointer = b.inttoptr(address, I8.as_pointer())
    ir_call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


@operation(none, i64, i64)
def clear(b: Builder, address: Value, count: Value) -> None:
    """Zero `count` bytes."""
    pointer = b.inttoptr(address, I8.as_pointer())
    ir_call(b, "llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), count, I1(0))


@operation(none, i64, i64, i64, i64, i64)
def call_job(
    b: Builder, function: Value, thread: Value, threads: Value, p: Value, a: Value
) -> None:
    """function(thread, threads, phases, arguments), by address; see team.py."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b.call(b.inttoptr(function, kind.as_pointer()), [thread, threads, p, a])
