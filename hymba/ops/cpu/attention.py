"""Attention of a prompt's rows for a CPU: float32, forward only.

What it computes is in hymba/ops/attention.py. A piece of work is a K/V group and a run of rows of a
segment, each with the r query heads of the group:

    queries, scaled    (rows r, h)         keys of a block, copied    (h, 128)
    values so far      (rows r, e)         values of a block, copied  (128, e)

    for each block of 128 keys, for each 16 queries:
        scores = queries x keys            the largest so far, shares = exp(scores - largest)
        values = fade * values + shares x values of the block

Keys come from the meta tokens, a cache in any order, and the new rows; a block is 128 meta tokens
or those of 128 fixed text positions, wherever they lie. A block of which a row sees nothing leaves
its sums as they were. So a row's numbers are the same, bit for bit, however its prompt is cut into
chunks, whatever is beside it and however many threads there are.

Letters: N rows, S segments, H query heads, G K/V groups, r = H/G, h and e widths of keys and
values, M meta tokens, W window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hymba.ops.attention import Meta, Past
from hymba.ops.backend import dense_last
from hymba.ops.cpu.compiled import job, kernel
from hymba.ops.cpu.dense import SPAN, TALL, multiply, transpose
from hymba.ops.cpu.simd import (
    LANES,
    add,
    choose,
    exp,
    larger,
    largest,
    load,
    load_bf16,
    load_first,
    load_first_bf16,
    mul,
    read_f32,
    read_i32,
    read_i64,
    record_at,
    splat,
    store,
    store_first,
    sub,
    total,
    write_f32,
)
from hymba.ops.cpu.team import Room, address, claim, finish, team, wait
from hymba.ops.segments import Segments

BLOCK = 128  # keys
BATCH = 16  # queries that go through a block together: their scores stay in the first-level cache
QUERIES = 320  # of a piece, about: with their values they stay in the second-level cache
FAR = 1 << 30  # the window of a layer without one: lanes are counted in 32 bits
NONE, ZERO, ONE = np.float32(-3e38), np.float32(0), np.float32(1)  # NONE: no score is as low


def _record(words: str, **others: np.dtype) -> np.dtype:
    return np.dtype([*((word, np.int64) for word in words.split()), *others.items()])


# Addresses and distances ("slot", "group", "place", "row", "head") in bytes, sizes in elements.
KEYS = _record("k k_slot k_group k_place v v_slot v_group v_place bytes")
CALL = _record(
    # places: of each text position in the past of a segment, int32. pieces: their count.
    "q q_row q_head out heads groups h e h_padded e_padded window meta_count"
    " places places_slot runs pieces room room_bytes",
    meta=KEYS,
    past=KEYS,
    new=KEYS,
)
# Rows that go together: `count` from the `first` of a segment on. The segment's rows begin at row
# `start` of all, at text position `begin`.
RUN = _record("segment start begin first count")
# A thread's own: what it works on, and where things are in its room. queries: a whole of batches.
PIECE = _record("group queries q values tops fades sums keys block scores line", run=RUN)
RUN_BYTES, PIECE_BYTES = RUN.itemsize, -(-PIECE.itemsize // 64) * 64
call_at, run_at, piece_at = record_at(CALL), record_at(RUN), record_at(PIECE)


# ---- a block of keys -----------------------------------------------------------------------


@kernel
def _copy(source: int, size: int, bytes_each: int, to: int, padded: int) -> None:
    """A row, wide, zeros behind it."""
    for c in range(0, padded, LANES):
        if bytes_each == 4:
            store(to + 4 * c, load_first(source + 4 * c, size - c))
        elif size - c >= LANES:
            store(to + 4 * c, load_bf16(source + 2 * c))
        else:
            store(to + 4 * c, load_first_bf16(source + 2 * c, size - c))


@kernel
def _copy_key(call: Any, piece: Any, keys: Any, slot: int, place: int, index: int) -> None:
    """A key to its line of 16, its value to its place in the block."""
    k = keys.k + slot * keys.k_slot + piece.group * keys.k_group + place * keys.k_place
    v = keys.v + slot * keys.v_slot + piece.group * keys.v_group + place * keys.v_place
    line = piece.line + index % LANES * 4 * call.h_padded
    _copy(k, call.h, keys.bytes, line, call.h_padded)
    _copy(v, call.e, keys.bytes, piece.block + index * 4 * call.e_padded, call.e_padded)


@kernel
def _copy_text(call: Any, piece: Any, position: int, index: int) -> None:
    run = piece.run
    if position >= run.begin:
        _copy_key(call, piece, call.new, 0, run.start + position - run.begin, index)
    else:
        place = read_i32(call.places + run.segment * call.places_slot + 4 * position)
        _copy_key(call, piece, call.past, run.segment, place, index)


@kernel
def _gather(call: Any, piece: Any, text: bool, first: int, count: int) -> None:
    """Copy keys and values from text position, or meta token, `first` on; zeros behind them."""
    for at in range(0, count, LANES):
        for index in range(at, at + LANES):
            if index >= count:
                line = piece.line + index % LANES * 4 * call.h_padded
                _copy(line, 0, 4, line, call.h_padded)
                _copy(line, 0, 4, piece.block + index * 4 * call.e_padded, call.e_padded)
            elif text:
                _copy_text(call, piece, first + index, index)
            else:
                _copy_key(call, piece, call.meta, 0, first + index, index)
        for c in range(0, call.h_padded, LANES):
            to = piece.keys + 4 * (c * BLOCK + at)
            transpose(piece.line + 4 * c, 4 * call.h_padded, to, 4 * BLOCK)


# ---- a piece -------------------------------------------------------------------------------


@kernel
def _furnish(call: Any, piece: Any, room: int) -> None:
    """Note where everything is; see `_give_room`."""
    at = room
    piece.q = at
    at += piece.queries * 4 * call.h_padded
    piece.values = at
    at += piece.queries * 4 * call.e_padded
    piece.sums = at
    at += piece.queries * 64
    piece.tops = at
    at += piece.queries * 4
    piece.fades = at
    at += BATCH * 4
    piece.keys = at
    at += BLOCK * 4 * call.h_padded
    piece.block = at
    at += BLOCK * 4 * call.e_padded
    piece.scores = at
    at += BATCH * 4 * BLOCK
    piece.line = at


@kernel
def _begin(call: Any, piece: Any) -> None:
    """Queries, times the scale; no sums yet."""
    scale, heads = splat(ONE / np.sqrt(np.float32(call.h))), call.heads
    for i in range(piece.queries):
        row, head = piece.run.start + piece.run.first + i // heads, piece.group * heads + i % heads
        source, to = call.q + row * call.q_row + head * call.q_head, piece.q + i * 4 * call.h_padded
        size = call.h if i // heads < piece.run.count else 0
        for c in range(0, call.h_padded, LANES):
            store(to + 4 * c, mul(load_first(source + 4 * c, size - c), scale))
        for c in range(0, call.e_padded, LANES):
            store(piece.values + 4 * (i * call.e_padded + c), splat(ZERO))
        store(piece.sums + 64 * i, splat(ZERO))
        write_f32(piece.tops + 4 * i, NONE)


@kernel
def _soften(piece: Any, query: int, index: int, low: int, high: int, most: int) -> None:
    """Scores of one query in a block, of which it sees low .. high and is given `most`, to
    exp(score - largest); its sum, its largest so far and what became of what it has."""
    scores, old = piece.scores + index * 4 * BLOCK, read_f32(piece.tops + 4 * query)
    top, edge = splat(NONE), low > 0 or high < (most + LANES - 1) // LANES * LANES
    for c in range(0, most, LANES):
        score = load(scores + 4 * c)
        if edge:
            score = choose(splat(NONE), choose(score, splat(NONE), high - c), low - c)
        top = larger(score, top)
    new = max(old, largest(top))
    sums, highest = load(piece.sums + 64 * query), splat(new)
    fade = exp(sub(splat(old), highest))
    sums = mul(sums, fade)
    for c in range(0, most, LANES):
        share = exp(sub(load(scores + 4 * c), highest))
        if edge:
            share = choose(splat(ZERO), choose(share, splat(ZERO), high - c), low - c)
        store(scores + 4 * c, share)
        sums = add(sums, share)
    store(piece.sums + 64 * query, sums)
    write_f32(piece.tops + 4 * query, new)
    store_first(piece.fades + 4 * index, fade, 1)


@kernel
def _meet(call: Any, piece: Any, text: bool, batch: int, position: int, count: int) -> None:
    """A batch of queries and the block that was gathered, with `count` keys: those of the text are
    from a position on that is `position` before the piece's first row."""
    heads, window = call.heads, call.window
    oldest, newest = position + batch // heads, position + (batch + BATCH - 1) // heads
    most = min(count, newest + 1) if text else count
    if most <= 0 or text and oldest - window >= count:
        return
    q, values = piece.q + batch * 4 * call.h_padded, piece.values + batch * 4 * call.e_padded
    q_step, e_step = 4 * call.h_padded, 4 * call.e_padded
    for c in range(0, 4 * most, 4 * SPAN):
        for r in range(0, BATCH, TALL):
            to = piece.scores + r * 4 * BLOCK + c
            multiply(q + r * q_step, q_step, piece.keys + c, 4 * BLOCK, call.h, to, 4 * BLOCK, 0)
    for i in range(BATCH):
        here = position + (batch + i) // heads
        low, high = (here - window, here + 1) if text else (0, count)
        _soften(piece, batch + i, i, low, min(high, count), most)
    for c in range(0, e_step, 4 * SPAN):
        for r in range(0, BATCH, TALL):
            scores, to = piece.scores + r * 4 * BLOCK, values + r * e_step + c
            fades = piece.fades + 4 * r
            multiply(scores, 4 * BLOCK, piece.block + c, e_step, most, to, e_step, fades)


@kernel
def _end(call: Any, piece: Any) -> None:
    heads = call.heads
    for i in range(piece.run.count * heads):
        row, head = piece.run.start + piece.run.first + i // heads, piece.group * heads + i % heads
        to = call.out + 4 * (row * call.groups * heads + head) * call.e
        share = splat(ONE / total(load(piece.sums + 64 * i)))
        for c in range(0, call.e, LANES):
            value = load(piece.values + 4 * (i * call.e_padded + c))
            store_first(to + 4 * c, mul(value, share), call.e - c)


@kernel
def _attend(call: Any, piece: Any) -> None:
    _begin(call, piece)
    for at in range(0, call.meta_count, BLOCK):
        count = min(BLOCK, call.meta_count - at)
        _gather(call, piece, False, at, count)
        for batch in range(0, piece.queries, BATCH):
            _meet(call, piece, False, batch, 0, count)
    first = piece.run.begin + piece.run.first
    end = first + piece.run.count
    for at in range(max(0, first - call.window) // BLOCK * BLOCK, end, BLOCK):
        count = min(BLOCK, end - at)
        _gather(call, piece, True, at, count)
        for batch in range(0, piece.queries, BATCH):
            _meet(call, piece, True, batch, first - at, count)
    _end(call, piece)


@job
def _attention(thread: int, threads: int, phases: int, arguments: int) -> None:
    call = call_at(read_i64(arguments))
    room = call.room + thread * call.room_bytes
    piece = piece_at(room)
    while True:
        number = claim(phases, 0)
        if number >= call.pieces:
            break
        run = run_at(call.runs + number // call.groups * RUN_BYTES)
        piece.group, piece.run = number % call.groups, run
        piece.queries = (run.count * call.heads + BATCH - 1) // BATCH * BATCH
        _furnish(call, piece, room + PIECE_BYTES)
        _attend(call, piece)
        finish(phases, 0)
    wait(phases, 0, call.pieces)


# ---- calls ---------------------------------------------------------------------------------

_room = Room()


@lru_cache(maxsize=64)
def _runs(lengths: tuple[int, ...], begins: tuple[int, ...], rows: int) -> np.ndarray:
    """Runs of at most so many rows, those that see the most first; kept for the next layer."""
    found, start = [], 0
    for segment, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        for first in range(0, length, rows):
            found.append((segment, start, begin, first, min(rows, length - first)))
        start += length
    found.sort(key=lambda run: -(run[2] + run[3]))
    return np.array(found, RUN)


def _run_rows(segments: Segments, heads: int, groups: int, threads: int) -> int:
    """Fewer rows a piece than the caches want, where there would be too few pieces to share."""
    rows = max(1, QUERIES // heads)
    while rows > 8 and groups * sum(-(-n // rows) for n in segments.lengths) < 4 * threads:
        rows //= 2
    return rows


def _places(past: Past, window: int | None) -> Tensor | None:
    """(S, longest past) int32: where each text position is in the past. None where one is missing
    that a row sees."""
    lengths, longest = torch.tensor(past.lengths)[:, None], max(past.lengths)
    oldest = (lengths - (longest if window is None else window)).clamp(min=0)
    positions = past.positions
    wanted = (positions >= oldest) & (positions < lengths)
    if not torch.equal(wanted.sum(1, keepdim=True), lengths - oldest):
        return None
    # What no row sees goes to a column of its own.
    columns = torch.where(wanted, positions, longest)
    there = torch.arange(positions.shape[1], dtype=torch.int32).expand_as(positions)
    return torch.zeros(len(positions), longest + 1, dtype=torch.int32).scatter_(1, columns, there)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor | None:
    """As `attention_reference` in hymba/ops/attention.py, for no gradient. None where a past lacks
    tokens that are seen, which no cache's does."""
    (rows, heads, h), (groups, e) = q.shape, v.shape[1:]
    out, made = torch.empty(rows, heads, e), team()
    call, wide = np.zeros((), CALL), dense_last(q.float())
    kept = [wide, out]  # what addresses point to
    call["q"], call["q_row"], call["q_head"] = wide.data_ptr(), *(4 * s for s in wide.stride()[:2])
    call["out"], call["heads"], call["groups"] = out.data_ptr(), heads // groups, groups
    call["h"], call["e"] = h, e
    call["h_padded"], call["e_padded"] = -(-h // LANES) * LANES, -(-e // SPAN) * SPAN
    call["window"] = FAR if window is None else window
    kept += _note(call["new"], k[None].transpose(1, 2), v[None].transpose(1, 2))
    if meta is not None:
        call["meta_count"] = len(meta.k)
        kept += _note(call["meta"], *(x[None].transpose(1, 2) for x in meta))
    begins = (0,) * segments.count if past is None else past.lengths
    if past is not None and max(begins):
        places = _places(past, window)
        if places is None:
            return None
        call["places"], call["places_slot"] = places.data_ptr(), 4 * places.stride(0)
        kept += [places, *_note(call["past"], past.k, past.v)]
    run_rows = _run_rows(segments, heads // groups, groups, made.threads)
    runs = _runs(segments.lengths, begins, run_rows)
    call["runs"], call["pieces"] = address(runs), len(runs) * groups
    _give_room(call, run_rows, made.threads)
    made.run(_attention, address(call), threads=min(made.threads, len(runs) * groups))
    return out if q.dtype == torch.float32 else out.to(q.dtype)


def _note(keys: np.ndarray, k: Tensor, v: Tensor) -> list[Tensor]:
    """k (S, G, P, h), v (S, G, P, e) -> the tensors that were noted, perhaps wider ones."""
    narrow = k.dtype == v.dtype == torch.bfloat16
    k, v = (dense_last(x if narrow else x.float()) for x in (k, v))
    keys["bytes"] = k.element_size()
    for name, x in (("k", k), ("v", v)):
        keys[name] = x.data_ptr()
        for part, step in zip(("slot", "group", "place"), x.stride(), strict=False):
            keys[f"{name}_{part}"] = step * x.element_size()
    return [k, v]


def _give_room(call: np.ndarray, rows: int, threads: int) -> None:
    queries = -(-rows * int(call["heads"]) // BATCH) * BATCH
    h, e = int(call["h_padded"]), int(call["e_padded"])
    numbers = queries * (h + e + 17) + BLOCK * (h + e) + BATCH * (BLOCK + 1) + LANES * h
    size = PIECE_BYTES + 4 * numbers
    call["room_bytes"] = -(-size // 4096) * 4096
    call["room"] = _room.at_least(threads * int(call["room_bytes"]))
