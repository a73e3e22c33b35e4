"""The limits of one GPU, measured: bytes read and copied, bf16 matrix products, exponentials.

A share of a limit is a share of these figures of the same run, not of a data sheet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.gpu import Stopwatch

SIZE = 8192  # of the square matrices
COPY_BYTES = 4 << 30
EXP_LANES, EXP_ROUNDS = 1024, 4096
EXPS_A_CLOCK = 16  # of one multiprocessor's special-function units


def ceilings(watch: Stopwatch) -> dict[str, float]:
    """Bytes, FLOPs and exponentials a second, and the clock that the last one implies."""
    exps = exponentials(watch)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    peak, sustained = matrix_rates()
    return {
        "read_bytes_per_s": read_bandwidth(watch),
        "copy_bytes_per_s": copy_bandwidth(watch),
        "matrix_flops_per_s": peak,
        "matrix_sustained_flops_per_s": sustained,
        "exps_per_s": exps,
        "clock_hz": exps / (EXPS_A_CLOCK * processors),
    }


def _fitting(most: int) -> int:
    """So many bytes, or what a quarter of the free memory holds."""
    return min(most, torch.cuda.mem_get_info()[0] // 4 // 1024 * 1024)


def read_bandwidth(watch: Stopwatch) -> float:
    x = torch.randn(_fitting(COPY_BYTES) // 4, device="cuda")
    return x.nbytes / watch.time(x.sum).ms * 1e3


def copy_bandwidth(watch: Stopwatch) -> float:
    """Bytes read plus bytes written."""
    x = torch.randn(_fitting(COPY_BYTES) // 4, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / watch.time(lambda: y.copy_(x)).ms * 1e3


def matrix_rates(size: int = SIZE, runs: int = 20) -> tuple[float, float]:
    """bf16 products of random matrices back to back: the best of some short bursts, which is the
    limit that shares and MFU are of, and what is left of it when power and heat have settled."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bursts = []
    for _ in range(5):
        time.sleep(0.2)  # the chip cools a little
        bursts.append(statistics.median(_each(lambda: torch.mm(a, b, out=out), runs)))
    long = _each(lambda: torch.mm(a, b, out=out), 20 * runs)
    flops = 2 * size**3 * 1e3
    return flops / min(bursts), flops / statistics.median(long[10 * runs :])


def _each(work: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of each of `runs` runs without a pause between them."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    work()
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


@triton.jit
def exp2_kernel(out, rounds, LANES: tl.constexpr):
    """x = 2^-x over and over, in registers: it settles near 0.64, so no special numbers."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x = (at % 7).to(tl.float32) * 0.1
    for _ in range(rounds):
        x = tl.inline_asm_elementwise(
            "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    tl.store(out + at, x)


def exponentials(watch: Stopwatch) -> float:
    programs = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * EXP_LANES, device="cuda")

    def work() -> None:
        exp2_kernel[(programs,)](out, EXP_ROUNDS, EXP_LANES, num_warps=4)

    return out.numel() * EXP_ROUNDS / watch.time(work).ms * 1e3
