"""Vector functions against float64, at ordinary numbers and at the edges; and each way of a CPU to
multiply bytes against plain integers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from hymba.ops.cpu import simd
from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.scan import power_of_2

NAMES = {"exp": simd.exp, "softplus": simd.softplus, "silu": simd.silu, "2^x": power_of_2}
WANT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "softplus": lambda x: np.logaddexp(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "2^x": np.exp2,
}


def mapped(name: str, x: np.ndarray) -> np.ndarray:
    function = NAMES[name]

    @kernel
    def run(source: int, to: int, count: int) -> None:
        for i in range(0, 4 * count, 64):
            simd.store(to + i, function(simd.load(source + i)))

    y = np.empty_like(x)
    run(x.ctypes.data, y.ctypes.data, len(x))
    return y


@pytest.mark.parametrize("name", NAMES)
def test_functions(name: str) -> None:
    x = np.linspace(-86, 86, 16 * 4000).astype(np.float32)
    want = WANT[name](x.astype(np.float64))
    assert np.abs(mapped(name, x) / want - 1).max() < 5e-7


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    x = np.zeros(16, np.float32)
    x[3] = np.nan
    assert np.flatnonzero(np.isnan(mapped(name, x))).tolist() == [3]


def test_far_out() -> None:
    x = np.full(16, -1000, np.float32)
    x[0] = -np.inf
    assert (mapped("exp", x) < 1e-37).all()
    assert (mapped("2^x", x) < 1e-37).all()
    assert (mapped("softplus", x) < 1e-37).all()
    assert (mapped("softplus", -x) == -x).all()


def test_a_decay_of_nothing_is_one() -> None:
    assert (mapped("2^x", np.zeros(16, np.float32)) == 1).all()


def test_part_of_a_vector() -> None:
    """Nothing else is read or written: the numbers stand at the very end of memory's use."""

    @kernel
    def copy(source: int, to: int, count: int) -> None:
        simd.store_first(to, simd.load_first(source, count), count)

    x = np.arange(1, 17, dtype=np.float32)
    for count in range(17):
        y = np.zeros(16, np.float32)
        copy(x.ctypes.data, y.ctypes.data, count)
        assert y.tolist() == [*range(1, count + 1), *[0] * (16 - count)]


def test_bfloat16_is_rounded_as_torch_does() -> None:
    torch = pytest.importorskip("torch")

    @kernel
    def there_and_back(source: int, to: int) -> None:
        simd.store_bf16(to, simd.load(source))
        simd.store(source, simd.load_bf16(to))

    x = torch.randn(16) * 1e3
    x[:4] = torch.tensor([torch.nan, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])
    want, room = x.bfloat16().float(), torch.zeros(16)
    there_and_back(x.data_ptr(), room.data_ptr())
    assert torch.equal(x.nan_to_num(-1), want.nan_to_num(-1))


BYTES = """
import numpy as np
from numba import types
from hymba.ops.cpu import simd
from hymba.ops.cpu.compiled import kernel

def test(small):
    @simd.operation(types.void, *[types.int64] * 3)
    def dot(b, total, u, s):
        args = [simd.ir_load(b, x, simd.I32x16) for x in (total, u, s)]
        simd.ir_store(b, total, simd.ir_dot4(b, *args, small))

    @kernel
    def run(total, u, s):
        dot(total, u, s)

    rng = np.random.default_rng(0)
    most = 128 if small else 256
    for extreme in (False, True):
        u = rng.integers(0, most, 64).astype(np.uint8)
        s = rng.integers(-127, 128, 64).astype(np.int8)
        if extreme:
            u[:], s[:] = most - 1, 127
        total = rng.integers(-9999, 9999, 16).astype(np.int32)
        want = total + (u.astype(int) * s).reshape(16, 4).sum(1)
        run(total.ctypes.data, u.ctypes.data, s.ctypes.data)
        assert (total == want).all(), (small, extreme, total, want)

assert not simd.FEATURES & set(LESS), simd.FEATURES
test(False)
test(True)
"""
LESS = {
    "as it is": [],
    "no AVX-512": ["avx512vnni", "avx512f"],
    "AVX2 alone": ["avx512vnni", "avx512f", "avxvnni"],
    "no byte products": ["avx512vnni", "avx512f", "avxvnni", "avx2"],
}


@pytest.mark.skipif(not simd.X86, reason="takes features away from an x86")
@pytest.mark.parametrize("ways", LESS)
def test_products_of_bytes(ways: str) -> None:
    """Every way that this CPU has. Without AVX2 nothing runs but this: see `unsupported`."""
    less = LESS[ways]
    gone = [x for x in simd.FEATURES if x in less or (less and x.startswith("avx512"))]
    kept = ",".join(f"+{x}" for x in sorted(simd.FEATURES - set(gone)))
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": kept} if less else {}
    code = f"LESS = {gone}\n{BYTES}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_without_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "X86", True)
    monkeypatch.setattr(simd, "FEATURES", simd.FEATURES - {"f16c"})
    assert "f16c" in simd.unsupported()
