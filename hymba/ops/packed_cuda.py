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
    ahead: int  # groups of 32 columns that a warp has asked for


class Tiling(NamedTuple):
    """Module-wide so that a benchmark can try others."""

    many: Cut = Cut(4, 4)  # where blocks are enough for all processors
    few: Cut = Cut(16, 6)
    chain: bool = True  # starts while the kernel before it ends


TILING = Tiling()


class Input(NamedTuple):
    """Rows (N, columns), and the weight (columns) of their norm if they have one."""

    rows: Tensor
    norm: Tensor | None = None


def supports(packed: Packed, inputs: list[Input], residual: Tensor | None) -> bool:
    """Whether the source serves such tensors: bfloat16, rows in whole pieces of 16 bytes."""
    given = [x for x in (*(x for pair in inputs for x in pair), residual) if x is not None]
    right = all(x.is_cuda and x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in given)
    read = [x for pair in inputs for x in pair if x is not None]
    whole = all(x.data_ptr() % 16 == 0 and (x.ndim == 1 or x.stride(0) % 8 == 0) for x in read)
    return packed.columns % 8 == 0 and right and whole and nvrtc.present()


def product(
    packed: Packed,
    inputs: list[Input],
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """residual + F.linear(x, matrix), x the input, or its norm, or the mean of two norms; gated: of
    two matrices one behind the other, the first through swiglu with the second. Up to MOST_ROWS."""
    x, scheme = inputs[0].rows, packed.scheme
    count, rows = len(x), packed.rows // 2 if gated else packed.rows
    groups, blocks = scheme.groups(packed.columns), cdiv(rows, HALF)
    eights = 1 if count <= 8 else 2 if count <= 16 else 4
    sums = eights * len(inputs) * (2 if gated else 1)
    warps, ahead = cut_of(blocks, groups, scheme.group, sums)
    chained = TILING.chain and chains(x)
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


def cut_of(blocks: int, groups: int, group: int, sums: int) -> Cut:
    """For so many blocks of so many groups, with so many sums of 8 rows a warp."""
    cut = TILING.many if blocks >= 2 * PROCESSORS else TILING.few
    warps = min(cut.warps, 64 // sums, groups)  # sums of 32 KiB in shared memory at most
    ahead = max(1, cut.ahead * 32 // group // max(1, sums // 2))
    return Cut(warps, min(ahead, cdiv(groups, warps)))


@cache
def _source(name: str) -> str:
    return files("hymba.ops").joinpath("cuda", "packed.cu").read_text(encoding="utf-8")
