"""The selective scan in CUDA (cuda/scan*.cu), compiled when first needed (`nvrtc`).

Where that cannot be, or sizes are ones the source was not written for, `supports` says no and the
Triton twin serves.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba.ops import nvrtc
from hymba.ops.segments import Segments, table

TILE = 32  # rows between saved states, as in scan.cuh
UNCUT = 1 << 20  # tiles of a piece, more than there are
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}


class Plan(NamedTuple):
    """How a launch cuts the work: see `Shape` in scan.cuh."""

    lanes: int  # that share the states of a channel
    channels: int  # of a lane
    warps: int  # of a block
    blocks: int  # on a multiprocessor: caps the registers
    tiles: int = UNCUT  # of a piece

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.warps * 32 // self.lanes * self.channels

    def shape(self, n: int) -> str:
        """Its template arguments for n states."""
        return f"{n},{n // self.lanes},{self.channels},{self.warps},{self.blocks}"


def supports(u: Tensor, states: int) -> bool:
    """Whether the source serves such tensors (pairs of channels, 8 or 16 states)."""
    return (
        u.is_cuda
        and u.dtype in TYPES
        and states in (8, 16)
        and u.shape[1] % 2 == 0
        and nvrtc.present()
    )


def pairs(x: Tensor) -> Tensor:
    """x (N, X) with its columns together and every row where a pair of elements may start."""
    aligned = x.data_ptr() % (2 * x.element_size()) == 0 and x.stride(0) % 2 == 0
    fits = x.stride(1) == 1 and (aligned or x.shape[1] % 2)  # odd widths are for Triton
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class Tables(NamedTuple):
    """Where things lie, (S + 1,) and (pieces,) int32: saved states, pieces, and their segments."""

    first_tile: Tensor
    first_piece: Tensor
    owner: Tensor
    tiles: int
    pieces: int


@table
def tables(lengths: tuple[int, ...], piece_tiles: int, device: torch.device) -> Tables:
    """Segments cut in tiles of TILE rows, and in pieces of so many tiles."""
    tiles = -(-torch.tensor(lengths, dtype=torch.int64) // TILE)
    pieces = -(-tiles // piece_tiles)
    owner = torch.arange(len(lengths)).repeat_interleave(pieces)
    first = [torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (tiles, pieces)]
    first_tile, first_piece, owner = (x.to(torch.int32).to(device) for x in (*first, owner))
    return Tables(first_tile, first_piece, owner, int(tiles.sum()), len(owner))


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, E), final (S, E, n) and, to `save` for backward, the state before every TILE rows."""
    channels, n, count = u.shape[1], A.shape[1], segments.count
    state = None if state is None else _aligned(state)
    plan = forward_plan(segments, channels)
    cuts = tables(segments.lengths, plan.tiles, u.device)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = u.new_empty(count, channels, n, dtype=torch.float32)
    saved = final.new_empty(cuts.tiles if save else 0, channels, n)
    cut = cuts.pieces if cuts.pieces > count else 0
    ends, sums = final.new_empty(cut, channels, n), final.new_empty(cut, channels)
    stride = 0 if state is None or state.shape[0] == 1 else channels * n
    tabs = (segments.offsets(u.device), *cuts[:3], np.int32(plan.tiles))
    args = (*_inputs(u, dt, z, B, C, A, D, dt_bias), state, np.int64(stride), *tabs, ends, sums)
    grid = (-(-channels // plan.width), cuts.pieces, 1)
    for mode in ([2] if cut else []) + [int(save)]:
        name = f"scan_forward<{TYPES[u.dtype]},{plan.shape(n)},{mode}>"
        _launch(name, grid, plan.warps * 32, 0, u.device, *args, y, final, saved)
    return y, final, saved


# Figures below are of an H200 with 132 multiprocessors; docs/log.md has the sweeps.


def forward_plan(segments: Segments, channels: int) -> Plan:
    """Cut in time, each exponential paid twice, only where there are too few sequences."""
    side_by_side = segments.total * channels // max(segments.lengths, default=1)
    if side_by_side > 20_000:
        return Plan(4, 1, 5, 5)
    if side_by_side > 9_000:
        return Plan(8, 2, 2, 8)
    plan = Plan(4, 2, 2, 10)
    return plan._replace(tiles=_tiles(segments, channels, plan, 2640, 4, 64))


def _tiles(
    segments: Segments, channels: int, plan: Plan, blocks: int, least: int, most: int
) -> int:
    """Tiles of a piece that give about so many blocks."""
    across = -(-channels // plan.width)
    return min(max(segments.total * across // (TILE * blocks), least), most)


def backward(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    saved: Tensor,
    want_state: bool,
) -> tuple[Tensor, ...]:
    """du, ddt, dA, dB and dC side by side, dD, dz, dbias, dstate (S, E, n).

    Sums over rows and over channels are float32 and always added in one order; dstate is empty
    where nobody wants it."""
    (rows, channels), n, count = u.shape, A.shape[1], segments.count
    back, main = backward_plan(segments, channels, n)
    cuts = tables(segments.lengths, main.tiles, u.device)
    offsets, dy, dfinal = segments.offsets(u.device), pairs(dy), _aligned(dfinal)
    given, kind = _inputs(u, dt, z, B, C, A, D, dt_bias), TYPES[u.dtype]
    behind = (dy, np.int64(dy.stride(0)), dfinal)
    cut = cuts.pieces if cuts.pieces > count else 0
    starts, sums = dfinal.new_empty(cut, channels, n), dfinal.new_empty(cut, channels)
    if cut:
        name = f"scan_adjoint<{kind},{back.shape(n)}>"
        places = (offsets, cuts.first_piece, cuts.owner, np.int32(main.tiles))
        grid = (-(-channels // back.width), cuts.pieces, 1)
        _launch(name, grid, back.warps * 32, 0, u.device, *given, *behind, *places, starts, sums)
    du, ddt, dz = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(3))
    across = -(-channels // main.width)
    dBC = dfinal.new_empty(across, rows, 2 * n)
    dA = dfinal.new_empty(cuts.pieces, channels, n)
    dD, dbias = dfinal.new_empty(2, cuts.pieces, channels)
    dstate = dfinal.new_empty(count if want_state else 0, channels, n)
    # Three tiles, B and C, and every thread's states before every 4 rows.
    floats = 3 * TILE * main.width + TILE * 2 * n + TILE // 4 * main.width * n
    name = f"scan_backward<{kind},{main.shape(n)}>"
    tabs = (offsets, *cuts[:3], np.int32(main.tiles))
    outs = (du, ddt, dz, dBC, dA, dD, dbias, dstate if want_state else None)
    args = (*given, *behind, saved, starts, sums, *tabs, *outs)
    grid = (across, cuts.pieces, 1)
    _launch(name, grid, main.warps * 32, 4 * floats, u.device, *args)
    return du, ddt, dA.sum(0), dBC.sum(0), dD.sum(0), dz, dbias.sum(0), dstate


def backward_plan(segments: Segments, channels: int, n: int) -> tuple[Plan, Plan]:
    """Of the adjoint walk, and of backward itself, whose lanes hold 4 states of a channel."""
    main = Plan(n // 4, 2, 4, 3)
    return Plan(4, 2, 2, 6), main._replace(tiles=_tiles(segments, channels, main, 1200, 4, 11))


def _inputs(
    u: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, bias: Tensor
) -> tuple[Any, ...]:
    """The fields of `Inputs` in scan.cuh, in their order."""
    rows = (u, dt, z, B, C)
    strides = tuple(np.int64(x.stride(0)) for x in rows)
    wide = D.dtype == torch.float32 and bias.dtype == torch.float32
    if not wide:
        D, bias = D.to(u.dtype), bias.to(u.dtype)
    A, D, bias = (_aligned(x) for x in (A, D, bias))
    flags = wide + 2 * all(_sixteen(x) for x in rows)
    sizes = (np.int32(u.shape[1]), np.int32(u.shape[0]), np.int32(flags))
    return (*rows, *strides, A, D, bias, *sizes)


def _aligned(x: Tensor) -> Tensor:
    """x where 16 bytes can be read at once: a parameter of a sharded model may start anywhere."""
    fits = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _sixteen(x: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    n = 16 // x.element_size()
    return x.shape[1] % n == 0 and x.stride(0) % n == 0 and x.data_ptr() % 16 == 0


def _launch(
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
    *args: Any,
) -> None:
    nvrtc.launch(_source, name, grid, threads, shared, device, *args)


@cache
def _source(name: str) -> str:
    """What a kernel's file and the head they share say."""
    part = "scan_forward.cu" if name.startswith("scan_forward") else "scan_backward.cu"
    folder = files("hymba.ops").joinpath("cuda")
    return "".join(folder.joinpath(x).read_text(encoding="utf-8") for x in ("scan.cuh", part))
