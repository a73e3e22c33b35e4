"""What every GPU benchmark needs: facts of the machine, a stopwatch, a check, a report that
survives being stopped. The limits are measured beside it, in bench/ceilings.py.

A time is the median over many runs, each between two events of the device, with the second-level
cache overwritten before it and a short sleep of the device in front, so that the host has handed
over the work when the clock starts. Everything is timed twice; `spread` is how far apart the two
medians are, and a smaller difference than that is noise.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hymba import __version__
from hymba.files import write_json

SLEEP_CYCLES = 1_000_000  # half a millisecond
FLUSH_BYTES = 256 << 20  # several times any second-level cache


# The machine


def need_cuda(program: str) -> None:
    """End the program in one line where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit(f"{program}: no CUDA device (torch {torch.__version__} sees none)")


def slug(device: str) -> str:
    """How a device is named in a file name: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def machine(benchmark: str) -> dict[str, Any]:
    """What a figure depends on, besides the code."""
    about = torch.cuda.get_device_properties(0)
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]),
        "hymba": __version__,
        "device": about.name,
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "l2_mib": round(about.L2_cache_size / 2**20, 1),
        "driver": smi("driver_version"),
        "power_limit_w": smi("power.limit"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda_core": _version("cuda-core"),
        "python": platform.python_version(),
        "backend": os.environ.get("HYMBA_BACKEND", "triton"),
    }


def clocks() -> dict[str, str | None]:
    """What the driver says now; right after work it is the working clock."""
    names = "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw"
    return {name: smi(name) for name in names}


def smi(query: str) -> str | None:
    """One fact of nvidia-smi, or None where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Time


class Timing(NamedTuple):
    ms: float
    spread: float  # how far the two medians are apart, as a share of `ms`
    runs: int


class Stopwatch:
    def __init__(self, seconds: float = 0.25):
        self.seconds = seconds  # about so long for one timing, sleep and flush not counted
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def time(self, work: Callable[[], Any], flush: bool = True) -> Timing:
        """Median ms of `work`, which is run a few times first."""
        self._medians(work, 1, flush)  # compiles, fills caches
        once = self._medians(work, 1, flush)
        least = 3 if once < 500 * self.seconds else 2
        runs = max(least, min(40, int(500 * self.seconds / max(once, 1e-3))))
        first, second = self._medians(work, runs, flush), self._medians(work, runs, flush)
        ms = (first + second) / 2
        return Timing(ms, abs(first - second) / ms, 2 * runs)

    def _medians(self, work: Callable[[], Any], runs: int, flush: bool) -> float:
        pairs = []
        for _ in range(runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if flush:
                self.buffer.zero_()
                torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def host_us(work: Callable[[], Any], runs: int = 50) -> float:
    """Microseconds that the host needs to hand over one call."""
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(seconds)


def graphed(work: Callable[[], Any]) -> Callable[[], None]:
    """The same work as one CUDA graph, so that only the device's time is seen."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


# Right or wrong


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN and a wrong shape are infinitely wrong."""
    if got.shape != want.shape:
        return math.inf
    size = torch.linalg.vector_norm(want.double())
    off = torch.linalg.vector_norm(got.double() - want.double())
    share = (off / size).item() if size > 0 else float(off > 0)
    return share if math.isfinite(share) else math.inf


# The report


class Report:
    """A JSON file that is whole at any moment: what was measured before a stop is kept."""

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self.path, self.data = path, dict(head)

    def put(self, **values: Any) -> None:
        self.data.update(values)
        self.save()

    def add(self, row: Mapping[str, Any], to: str = "results") -> None:
        self.data.setdefault(to, []).append(dict(row))
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data, indent=1)


def rounded(x: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else x


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """The result, or None and a line that says what went wrong: one failure stops nothing else."""
    try:
        return work()
    except Exception as error:  # a benchmark of many parts goes on with the next one
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        print(f"  ! {what}: {lines[0][:200]}", flush=True)
        if os.environ.get("HYMBA_TRACEBACK"):
            import traceback

            traceback.print_exc()
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


# Options that the benchmarks share


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mamba-ssm",
        type=Path,
        metavar="SOURCE",
        default=os.environ.get("MAMBA_SSM_SOURCE"),
        help="mamba-ssm's source package (or its folder), to build its scan from "
        "(MAMBA_SSM_SOURCE); TORCH_EXTENSIONS_DIR keeps the build",
    )


def add_json(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"where the results go (results/{benchmark}-DEVICE.json)",
    )


def json_path(options: argparse.Namespace, benchmark: str) -> Path:
    name = slug(torch.cuda.get_device_name(0))
    return options.json or Path("results") / f"{benchmark}-{name}.json"


def headline(data: Mapping[str, Any]) -> str:
    """The machine and its limits in two lines."""
    c = data["ceilings"]
    return (
        f"{data['device']}, driver {data['driver']}, torch {data['torch']}, "
        f"triton {data['triton']}, backend {data['backend']}\n"
        f"read {c['read_bytes_per_s'] / 1e12:.2f} TB/s, copy {c['copy_bytes_per_s'] / 1e12:.2f} "
        f"TB/s, bf16 {c['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s (sustained "
        f"{c['matrix_sustained_flops_per_s'] / 1e12:.0f}), exponentials "
        f"{c['exps_per_s'] / 1e12:.2f} T/s (a clock of {c['clock_hz'] / 1e9:.2f} GHz)"
    )
