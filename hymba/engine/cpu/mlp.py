"""The MLP's first half in one phase: a piece is 64 of its inner columns, through both projections
and the activation, made ready for the way down."""

from __future__ import annotations

from typing import Any

import numpy as np

from hymba.engine.cpu.layout import GATED, SPAN
from hymba.engine.cpu.product import LEAST, TILE, make_ready, multiply
from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.simd import larger, load, mul, silu, splat, store
from hymba.ops.cpu.team import claim, finish, guided, guided_count, wait

TILES = SPAN // TILE


@kernel
def inner(model: Any, layer: Any, phases: int, phase: int, threads: int) -> None:
    """model.input -> model.inner, (rows, F)"""
    gated, up, down, x = layer.activation == GATED, layer.up_proj, layer.down_proj, model.input
    spans, ready = (up.tiles + TILES - 1) // TILES, x.address + 4 * x.columns
    least = max(1, LEAST // (TILES * up.tile_bytes * (2 if gated else 1)))
    pieces = guided_count(spans, threads, least)
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        first, last = guided(spans, threads, least, piece)
        for span in range(first, last):
            tile, end = span * TILES, min((span + 1) * TILES, up.tiles)
            y, stride = model.inner.address, model.inner.stride
            multiply(up, tile, end, x.address, ready, x.stride, model.rows, y, stride)
            if gated:
                gate = model.gate
                multiply(
                    layer.gate_proj,
                    tile,
                    end,
                    x.address,
                    ready,
                    x.stride,
                    model.rows,
                    gate,
                    stride,
                )
            for row in range(model.rows):
                y = model.inner.address + row * stride
                _activate(gated, model.gate + row * stride, y, SPAN * span, TILE * end)
                make_ready(down, y, y + 4 * model.inner.columns, SPAN * span, SPAN * span + SPAN)
        finish(phases, phase)
    wait(phases, phase, pieces)


@kernel
def _activate(gated: bool, gate: int, up: int, start: int, end: int) -> None:
    """Over `up`. Columns behind the last tile stay zeros."""
    for c in range(4 * start, 4 * end, 64):
        value = load(up + c)
        if gated:
            value = mul(silu(load(gate + c)), value)
        else:
            value = larger(value, splat(np.float32(0)))
            value = mul(value, value)
        store(up + c, value)
