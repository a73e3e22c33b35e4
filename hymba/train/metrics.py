"""What a run tells: one JSON object a line in a file, one readable line a step on the screen.

The file is the record (plots and tables read it), the screen is for people. A resumed run takes
back the lines after the step it resumes from, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hymba.config import Config
from hymba.files import write_text
from hymba.model.accounting import forward_flops

Record = dict[str, Any]


class MetricsLog:
    """Appends records to `path`; each has a "step", the number of steps done when it was made."""

    def __init__(self, path: Path, step: int = 0) -> None:
        """Open for a run that has done `step` steps: later records are dropped."""
        kept = [record for record in read(path) if record["step"] <= step]
        write_text(path, "".join(_as_line(record) for record in kept))
        self._file = open(path, "a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is in the file when this returns."""
        self._file.write(_as_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> list[Record]:
    """All whole records of a file, oldest first; none if it is absent.

    A last line cut short by a killed process is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have `key`, ready to plot."""
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """The line that a step prints; what a record does not have is left out."""
    loss = record["loss"]
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {loss:.4f}",
        *_some(record, "bits_per_byte_train", "bpb {:.3f}"),
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        *_some(record, "mfu", "mfu {:.1%}"),
        *_some(record, "memory_gb", "{:.1f} GB"),
        f"eta {duration(record['eta'])}",
    ]
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']}")
    return "  ".join(parts)


def _some(record: Mapping[str, Any], key: str, words: str) -> list[str]:
    value = record.get(key)
    return [] if value is None else [words.format(value)]


def held_out_line(record: Mapping[str, Any]) -> str:
    """The line that a look at the held-out documents prints."""
    return (
        f"step {record['step']}  held out: loss {record['held_out_loss']:.4f}"
        f"  bits per byte {record['bits_per_byte']:.4f}"
    )


def step_flops(config: Config, lengths: Iterable[int]) -> float:
    """FLOPs of forward and backward over pieces of so many tokens: three times the forward. What
    is computed again to save memory does not count."""
    return 3.0 * sum(_forward_flops(config, length) for length in lengths)


@lru_cache(maxsize=4096)  # pieces of documents often have the row's own length
def _forward_flops(config: Config, length: int) -> int:
    return forward_flops(config, length)


@lru_cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that a large matrix product reaches on this device now: what MFU is a share
    of. Takes some tenths of a second."""
    size = 8192 if device.type == "cuda" else 512
    # Not all ones: a GPU's clock rises where few bits change.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    best = math.inf
    for _ in range(8):
        began = _now(device)
        a @ b
        best = min(best, _now(device) - began)
    return 2.0 * size**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_gb(device: torch.device) -> float | None:
    """The most memory used so far, in 10^9 bytes: the device's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m20s, 5h07m, 2d03h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def _as_line(record: Mapping[str, Any]) -> str:
    # JSON has no word for nan and inf; null is what plots leave out.
    plain = {key: None if _is_odd(value) else value for key, value in record.items()}
    return json.dumps(plain) + "\n"


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
