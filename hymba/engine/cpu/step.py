"""A decode step of the whole model as one compiled function, run by all threads of a team.

    begin                  embeddings, rotary angles
    each layer             norm | in_proj | attention, convolution | join, scan | fuse | out_proj
      with an MLP          norm | gate, up | down
    end                    norm | head

A line's words are phases (hymba/ops/cpu/team.py): threads claim pieces of one, and the next begins
when all are done. No thread carries anything from a phase to the next, and nothing is written in a
phase that its other pieces read. The residual stream is in two buffers by turns, for that reason.
"""

from __future__ import annotations

from typing import Any

from hymba.engine.cpu.attention import attend, join, part_count
from hymba.engine.cpu.layout import LAYER
from hymba.engine.cpu.mlp import inner
from hymba.engine.cpu.product import product
from hymba.engine.cpu.rows import begin, fuse, norm, row
from hymba.engine.cpu.ssm import conv_pieces, convolve, scan, scan_pieces
from hymba.engine.cpu.vectors import layer_at, model_at
from hymba.ops.cpu.compiled import job, kernel
from hymba.ops.cpu.simd import read_i64
from hymba.ops.cpu.team import claim, finish, wait

LAYER_BYTES = LAYER.itemsize
FIXED_PHASES, LAYER_PHASES = 3, 9


def phase_count(layers: int) -> int:
    return FIXED_PHASES + LAYER_PHASES * layers


@job
def step(thread: int, threads: int, phases: int, arguments: int) -> None:
    """arguments: the address of a Model record, whose rows are filled in."""
    model = model_at(read_i64(arguments))
    scratch = model.scratch + thread * model.scratch_bytes
    begin(model, phases, 0, threads)
    phase, x, other = 1, model.x, model.other_x
    for index in range(model.layer_count):
        layer = layer_at(model.layers + index * LAYER_BYTES)
        norm(model, phases, phase, threads, x, layer.input_norm, layer.in_proj)
        product(
            phases,
            phase + 1,
            threads,
            layer.in_proj,
            model.input,
            model.rows,
            model.proj,
            model.proj_stride,
            0,
        )
        _mix(model, layer, phases, phase + 2, scratch)
        _mix_more(model, layer, phases, phase + 3, scratch)
        fuse(model, layer, phases, phase + 4, threads)
        product(
            phases,
            phase + 5,
            threads,
            layer.out_proj,
            model.input,
            model.rows,
            other,
            model.x_stride,
            x,
        )
        x, other = other, x
        phase += 6
        if layer.mlp:
            norm(model, phases, phase, threads, x, layer.mlp_norm, layer.up_proj)
            inner(model, layer, phases, phase + 1, threads)
            product(
                phases,
                phase + 2,
                threads,
                layer.down_proj,
                model.inner,
                model.rows,
                other,
                model.x_stride,
                x,
            )
            x, other = other, x
            phase += 3
    norm(model, phases, phase, threads, x, model.final_norm, model.head)
    product(
        phases,
        phase + 1,
        threads,
        model.head,
        model.input,
        model.rows,
        model.logits,
        model.logits_stride,
        0,
    )


@kernel
def _mix(model: Any, layer: Any, phases: int, phase: int, scratch: int) -> None:
    """Both branches side by side: parts of attention, then channels of the convolution."""
    attention, ssm = layer.attention, layer.ssm
    parts = _parts(model, attention, model.rows) if attention.on else 0
    pieces = parts + (conv_pieces(ssm) if ssm.on else 0)
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        if piece < parts:
            _attend(model, attention, piece, scratch)
        else:
            convolve(model, ssm, piece - parts, scratch)
        finish(phases, phase)
    wait(phases, phase, pieces)


@kernel
def _parts(model: Any, attention: Any, rows: int) -> Any:
    """Of the first `rows` rows."""
    parts = 0
    for index in range(rows):
        parts += attention.groups * part_count(attention, row(model, index).length)
    return parts


@kernel
def _attend(model: Any, attention: Any, piece: int, scratch: int) -> None:
    index = 0
    while piece >= _parts(model, attention, index + 1):
        index += 1
    this = row(model, index)
    before = _parts(model, attention, index)
    count = part_count(attention, this.length)
    group, part = (piece - before) // count, (piece - before) % count
    proj, turns = model.proj + index * model.proj_stride, model.turns + index * model.turns_stride
    out = model.parts + piece * model.part_bytes
    attend(model, attention, this, group, part, proj, turns, out, scratch)


@kernel
def _mix_more(model: Any, layer: Any, phases: int, phase: int, scratch: int) -> None:
    """What attention's parts are together, and the scan."""
    attention, ssm = layer.attention, layer.ssm
    joins = model.rows * attention.groups if attention.on else 0
    pieces = joins + (scan_pieces(ssm) if ssm.on else 0)
    while True:
        piece = claim(phases, phase)
        if piece >= pieces:
            break
        if piece < joins:
            _join(model, attention, piece // attention.groups, piece % attention.groups)
        else:
            scan(model, ssm, piece - joins, scratch)
        finish(phases, phase)
    wait(phases, phase, pieces)


@kernel
def _join(model: Any, attention: Any, index: int, group: int) -> None:
    count = part_count(attention, row(model, index).length)
    first = _parts(model, attention, index) + group * count
    out = model.mix + index * model.mix_stride
    join(attention, group, model.parts + first * model.part_bytes, model.part_bytes, count, out)
