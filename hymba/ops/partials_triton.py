# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over rows, in two steps and always in the same order.

A gradient of a weight is a sum over all rows. Atomic additions would give other bits every time, so
each program writes what it has, in float32, and this adds the programs up.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, launch, next_power_of_2


@triton.jit
def _add_up(parts, out, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """parts (count, WIDTH) -> out (WIDTH)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        at = (first + row)[:, None] * WIDTH + column[None, :]
        there = (first + row < count)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(parts + at, mask=there, other=0.0)
    tl.store(out + column, tl.sum(total, 0), mask=column < WIDTH)


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (P, ...) float32 -> their sum (...)."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    width, columns = out.numel(), 32 if out.numel() > 4096 else 8
    grid = (cdiv(width, columns),)
    rows = min(4096 // columns, next_power_of_2(parts.shape[0]))
    launch(_add_up, grid, parts, out, parts.shape[0], WIDTH=width, ROWS=rows, COLUMNS=columns)
    return out


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter plays a small one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
