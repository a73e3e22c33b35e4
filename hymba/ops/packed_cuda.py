"""A few rows times a matrix in few bits in CUDA (cuda/packed.cu), compiled when first needed.

bfloat16 alone, on NVIDIA GPUs from Ampere on; `supports` says what else is left to the Triton twin.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba.ops import nvrtc
from hymba.ops.backend import cdiv, chains
from hymba.ops.packed import HALF, Packed

PROCESSORS = 132  # of an H100 or H200
MOST_ROWS = 32


class Cut(NamedTuple):
    """How a block shares its work."""

    warps: int
    ahead: int  # groups of columns that a warp has asked for


class Tiling(NamedTuple):
    """By how much there is to do. What decides is how many blocks fit on a processor at once, and
    how many turns a warp makes; an H200's best of those that `bench/packed.py --tune` tries."""

    least: Cut  # blocks for a quarter of the processors at most
    few: Cut  # for one or two on each
    mean: Cut  # the same, of two inputs
    many: Cut
    gated: Cut  # as many, with two matrices
    most: Cut  # more than all processors hold at once


TILINGS = {  # by bits
    4: Tiling(Cut(16, 7), Cut(32, 3), Cut(16, 2), Cut(4, 4), Cut(4, 5), Cut(4, 4)),
    8: Tiling(Cut(16, 4), Cut(32, 1), Cut(16, 1), Cut(6, 1), Cut(6, 1), Cut(4, 1)),
}
CHAIN = True  # starts while the kernel before it ends; module-wide, as these, for benchmarks


class Input(NamedTuple):
    """Rows (N, columns), and the weight (columns) of their norm if they have one."""

    rows: Tensor
    norm: Tensor | None = None


def supports(packed: Packed, inputs: list[Input], residual: Tensor | None) -> bool:
    """Whether the source serves such tensors: bfloat16, rows in whole pieces of 16 bytes."""
    read = [x for pair in inputs for x in pair if x is not None]
    given = read if residual is None else [*read, residual]
    right = all(x.is_cuda and x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in given)
    tiles = packed.tiles.is_contiguous() and packed.tiles.data_ptr() % 8 == 0
    whole = packed.columns % 8 == 0 and all(map(_whole, read))
    return right and tiles and whole and nvrtc.present()


def _whole(x: Tensor) -> bool:
    """Whether every row of x, or a vector, starts where 16 bytes can be read at once."""
    return x.data_ptr() % 16 == 0 and (x.ndim == 1 or len(x) == 1 or x.stride(0) % 8 == 0)


def product(
    packed: Packed,
    inputs: list[Input],
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """residual + F.linear(x, matrix), x the input, or its norm, or the mean of two norms; gated: of
    two matrices one behind the other, the first through swiglu with the second. For up to MOST_ROWS
    rows. The matrix must lie there finished: it is read before kernels in front have ended."""
    x, scheme = inputs[0].rows, packed.scheme
    count, rows = len(x), packed.rows // 2 if gated else packed.rows
    groups, blocks = scheme.groups(packed.columns), cdiv(rows, HALF)
    eights = 1 if count <= 8 else 2
    warps, ahead = cut_of(scheme.bits, blocks, groups, len(inputs), gated, eights)
    chained = CHAIN and chains(x)
    flags = (inputs[0].norm is not None, gated, residual is not None, chained)
    even = packed.columns % scheme.group == 0
    numbers = scheme.group, even, len(inputs), *flags, eights, warps, ahead
    kind = "FP8" if scheme.kind == "e4m3" else f"INT{scheme.bits}"
    shape = ",".join(str(int(number)) for number in numbers)
    out = x.new_empty(count, rows)
    ends = [(i.rows, i.norm, np.int64(i.rows.stride(0))) for i in (inputs[0], inputs[-1])]
    nvrtc.launch(
        _source, f"packed_product<Shape<{kind},{shape}>>",
        (blocks, cdiv(count, 8 * eights), 1), 32 * warps, 0, x.device,
        *ends[0], *ends[1], packed.tiles, residual,
        np.int64(0 if residual is None else residual.stride(0)), out,
        np.int32(count), np.int32(rows), np.int32(packed.columns), np.int32(groups),
        np.float32(eps), chained=chained,
    )  # fmt: skip
    return out


def cut_of(bits: int, blocks: int, groups: int, inputs: int, gated: bool, eights: int) -> Cut:
    """For so many blocks of so many groups, and so many times 8 rows."""
    tiling = TILINGS[bits]
    if blocks >= 8 * PROCESSORS:
        cut = tiling.most
    elif blocks >= 2 * PROCESSORS:
        cut = tiling.gated if gated else tiling.many
    elif blocks > PROCESSORS // 4:
        cut = tiling.mean if inputs == 2 else tiling.few
    else:
        cut = tiling.least
    # A warp has `eights` 512 bytes of sums for each input and matrix in shared memory, all warps 32
    # KiB. Their number must not depend on that of rows: it says in which order sums are added.
    warps = min(cut.warps, 32 // (inputs * (1 + gated)), groups)
    return Cut(warps, max(1, min(cut.ahead // eights, cdiv(groups, warps))))


@cache
def _source(name: str) -> str:
    return files("hymba.ops").joinpath("cuda", "packed.cu").read_text(encoding="utf-8")
