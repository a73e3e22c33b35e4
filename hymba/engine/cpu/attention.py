"""The attention of a decode step, in pieces that any thread may take.

    piece of a row and a K/V group: a run of at most 256 places of the ring, a page, or meta keys
        its r query heads against those keys -> part: for each head the largest score, the sum
        of exp(score - largest), and the values weighed by exp(score - largest)
    join of a row and a group: its parts, in order, as one softmax

So a long context is shared by all threads, keys and values are read once for the r heads that share
them, and the result does not depend on who did what, nor on the rows beside. Keys of 16 places at a
time meet a head's query; where they are bfloat16, or their width is no multiple of 16, or there are
fewer than 16, they are first copied, wide and padded with zeros.

Part of a head group, float32: largest (r) | sums (r) | to a whole line | values (r, e padded).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hymba.engine.cpu.layout import BLOCK
from hymba.engine.cpu.vectors import (
    add_products,
    no_sums,
    totals,
    weigh_four,
    weigh_one,
    write_bf16,
)
from hymba.ops.cpu.compiled import kernel
from hymba.ops.cpu.rows import turn
from hymba.ops.cpu.simd import (
    add,
    choose,
    exp,
    fma,
    larger,
    largest,
    load,
    load_bf16,
    load_first,
    load_first_bf16,
    mul,
    prefetch,
    read_f32,
    read_i32,
    splat,
    store,
    store_first,
    sub,
    total,
    write_f32,
)

KEYS = 16  # at once
AHEAD = 4  # how many times 16 rows further memory is asked for
SCORES = 4 * BLOCK  # bytes, of a head and a block
MOST_PARTS = 64  # of a row's text, and as many blocks in each as that takes
NONE = np.float32(-3e38)  # a score below all others
ZERO = np.float32(0)


# ---- which pieces there are ----------------------------------------------------------------


@kernel
def seen(attention: Any, length: int) -> Any:
    """Places of the text that a new token behind `length` others sees, its own with them."""
    return min(length + 1, attention.ring) if attention.ring else length + 1


@kernel
def blocks_in_part(attention: Any, length: int) -> Any:
    """A number of the row alone, so that its sums are made in one order whatever is beside it."""
    blocks = (seen(attention, length) + BLOCK - 1) // BLOCK
    return (blocks + MOST_PARTS - 1) // MOST_PARTS


@kernel
def meta_parts(attention: Any) -> Any:
    return (attention.meta_count + BLOCK - 1) // BLOCK


@kernel
def part_count(attention: Any, length: int) -> Any:
    """Parts of a row in each group: the meta tokens' first, then the text's."""
    size = BLOCK * blocks_in_part(attention, length)
    return meta_parts(attention) + (seen(attention, length) + size - 1) // size


# ---- a piece -------------------------------------------------------------------------------


@kernel
def attend(
    model: Any,
    attention: Any,
    row: Any,
    group: int,
    index: int,
    proj: int,
    turns: int,
    part: int,
    scratch: int,
) -> None:
    """Part `index` of a row and group. proj: the row of what in_proj gave; turns: the row's
    cosines and sines."""
    heads, padded, width = attention.heads, attention.h_padded, attention.h
    scores = scratch + 4 * heads * padded
    tile = scores + SCORES * heads
    scale = np.float32(1 / math.sqrt(np.float64(width)))
    for head in range(heads):
        source = proj + attention.q_at + 4 * (group * heads + head) * width
        target = scratch + 4 * head * padded
        turn(source, target, turns, turns + 2 * width, width, scale)
        store_first(target + 4 * width, splat(ZERO), padded - width)
    _begin(part, heads, attention.e_padded)
    if index < meta_parts(attention):
        first = index * BLOCK
        count = min(BLOCK, attention.meta_count - first)
        _block(attention, attention.meta, 0, group, first, count, scratch, scores, tile, part)
        return
    index -= meta_parts(attention)
    each, last = blocks_in_part(attention, row.length), seen(attention, row.length)
    for block in range(index * each, (index + 1) * each):
        first = block * BLOCK
        if first < last:
            page, place = page_of(model, attention, row, first)
            new_page, new_place = own_place(model, attention, row)
            if new_page == page and 0 <= new_place - place < BLOCK and attention.owns_kv:
                _store_own(attention, group, page, new_place, proj, turns, tile)
            count = min(BLOCK, last - first)
            _block(
                attention, attention.text, page, group, place, count, scratch, scores, tile, part
            )


@kernel
def page_of(model: Any, attention: Any, row: Any, place: int) -> Any:
    """Where a row's place is: page, and place in it. A slot is the one page of a ring."""
    if attention.ring:
        return row.slot, place
    entry = model.table + row.slot * model.table_bytes + 4 * (place // BLOCK)
    return np.int64(read_i32(entry)), place % BLOCK


@kernel
def own_place(model: Any, attention: Any, row: Any) -> Any:
    """Where the new token's key and value go."""
    at = row.length % attention.ring if attention.ring else row.length
    return page_of(model, attention, row, at)


@kernel
def _store_own(
    attention: Any, group: int, page: int, place: int, proj: int, turns: int, scratch: int
) -> None:
    """The new key, turned, and value, before they are read."""
    keys, h, e = attention.text, attention.h, attention.e
    k = keys.k + page * keys.k_page + group * keys.k_group + place * keys.k_place
    v = keys.v + page * keys.v_page + group * keys.v_group + place * keys.v_place
    source = proj + attention.k_at + 4 * group * h
    turn(source, scratch, turns, turns + 2 * h, h, np.float32(1))
    _write(scratch, k, h, keys.bytes)
    _write(proj + attention.v_at + 4 * group * e, v, e, keys.bytes)


@kernel
def _write(source: int, target: int, count: int, size: int) -> None:
    for i in range(count):
        if size == 2:
            write_bf16(target + 2 * i, read_f32(source + 4 * i))
        else:
            write_f32(target + 4 * i, read_f32(source + 4 * i))


@kernel
def values_at(heads: int) -> int:
    """Where a part's values begin."""
    return (8 * heads + 63) // 64 * 64


@kernel
def _begin(part: int, heads: int, padded: int) -> None:
    for head in range(heads):
        write_f32(part + 4 * head, NONE)
        write_f32(part + 4 * (heads + head), ZERO)
    first = part + values_at(heads)
    for at in range(first, first + 4 * heads * padded, 64):
        store(at, splat(ZERO))


@kernel
def _block(
    attention: Any,
    keys: Any,
    page: int,
    group: int,
    place: int,
    count: int,
    q: int,
    scores: int,
    tile: int,
    part: int,
) -> None:
    """Add `count` places, at most 256, to a part."""
    heads = attention.heads
    k = keys.k + page * keys.k_page + group * keys.k_group + place * keys.k_place
    v = keys.v + page * keys.v_page + group * keys.v_group + place * keys.v_place
    _score(attention, keys, k, count, q, scores, tile)
    for head in range(heads):
        _soften(attention, scores + SCORES * head, count, part, head)
    _weigh(attention, keys, v, count, scores, tile, part)


@kernel
def _score(attention: Any, keys: Any, k: int, count: int, q: int, scores: int, tile: int) -> None:
    """scores[head, place] = query * key"""
    heads, padded = attention.heads, attention.h_padded
    for first in range(0, count, KEYS):
        rows = k + first * keys.k_place
        _ask_for(keys, rows, keys.k_place, attention.h)
        rows, stride = _wide(keys, rows, keys.k_place, count - first, attention.h, padded, tile)
        for head in range(heads):
            query, sums = q + 4 * head * padded, no_sums()
            for c in range(0, 4 * padded, 64):
                sums = add_products(sums, load(query + c), rows + c, stride)
            store(scores + SCORES * head + 4 * first, totals(sums))


@kernel
def _soften(attention: Any, scores: int, count: int, part: int, head: int) -> None:
    """scores -> exp(score - largest), where there are keys, else 0; the part's sums with them."""
    heads, padded = attention.heads, attention.e_padded
    top = splat(NONE)
    for first in range(0, count, KEYS):
        score = load(scores + 4 * first)
        top = larger(choose(score, top, count - first), top)
    before = read_f32(part + 4 * head)
    now = max(before, largest(top))
    highest, sums = splat(now), splat(ZERO)
    for first in range(0, count, KEYS):
        share = exp(sub(load(scores + 4 * first), highest))
        share = choose(share, splat(ZERO), count - first)
        store(scores + 4 * first, share)
        sums = add(sums, share)
    write_f32(part + 4 * head, now)
    fade = exp(splat(before - now))
    old = part + 4 * (heads + head)
    write_f32(old, read_f32(old) * _lane(fade) + total(sums))
    if before > NONE:
        values = part + values_at(heads) + 4 * head * padded
        for at in range(0, 4 * padded, 64):
            store(values + at, mul(load(values + at), fade))


@kernel
def _lane(x: Any) -> Any:
    """A lane of a vector whose lanes are all the same."""
    return largest(x)


@kernel
def _weigh(
    attention: Any, keys: Any, v: int, count: int, scores: int, tile: int, part: int
) -> None:
    heads, padded = attention.heads, attention.e_padded
    for first in range(0, count, KEYS):
        rows = v + first * keys.v_place
        _ask_for(keys, rows, keys.v_place, attention.e)
        rows, stride = _wide(keys, rows, keys.v_place, count - first, attention.e, padded, tile)
        for head in range(heads):
            out = part + values_at(heads) + 4 * head * padded
            shares = scores + SCORES * head + 4 * first
            c = 0
            while c + 64 <= padded:
                weigh_four(out + 4 * c, shares, rows + 4 * c, stride)
                c += 64
            while c < padded:
                weigh_one(out + 4 * c, shares, rows + 4 * c, stride)
                c += 16


@kernel
def _ask_for(keys: Any, rows: int, stride: int, width: int) -> None:
    """Rows that come later, where they lie one behind the other and are not copied: copying goes
    through them in a way that the CPU foresees by itself."""
    if keys.bytes == 4 and stride == 4 * width:
        for line in range(AHEAD * KEYS * stride, (AHEAD + 1) * KEYS * stride, 64):
            prefetch(rows + line)


@kernel
def _wide(keys: Any, rows: int, stride: int, count: int, width: int, padded: int, tile: int) -> Any:
    """16 rows as float32, whole vectors wide: (address, bytes between rows). Where they do not lie
    so they are copied; rows from `count` on are zeros then, whatever lies there."""
    if keys.bytes == 4 and width == padded and count >= KEYS:
        return rows, stride
    for k in range(KEYS):
        left = width if k < count else 0
        for c in range(0, padded, KEYS):
            source, target = rows + k * stride + keys.bytes * c, tile + 4 * (k * padded + c)
            if keys.bytes == 4:
                store(target, load_first(source, left - c))
            elif left - c >= KEYS:
                store(target, load_bf16(source))
            else:
                store(target, load_first_bf16(source, left - c))
    return tile, 4 * padded


# ---- the join ------------------------------------------------------------------------------


@kernel
def join(attention: Any, group: int, parts: int, stride: int, count: int, out: int) -> None:
    """Parts of a row and group, `stride` apart, as one softmax; out: the row's H heads of e."""
    heads, width, padded = attention.heads, attention.e, attention.e_padded
    for head in range(heads):
        top = NONE
        for p in range(count):
            top = max(top, read_f32(parts + p * stride + 4 * head))
        whole = ZERO
        for p in range(count):
            part = parts + p * stride
            fade = _lane(exp(splat(read_f32(part + 4 * head) - top)))
            whole += fade * read_f32(part + 4 * (heads + head))
        target = out + 4 * (group * heads + head) * width
        for c in range(0, width, KEYS):
            sums = splat(ZERO)
            for p in range(count):
                part = parts + p * stride
                fade = exp(splat(read_f32(part + 4 * head) - top))
                value = load(part + values_at(heads) + 4 * (head * padded + c))
                sums = fma(value, fade, sums)
            store_first(target + 4 * c, mul(sums, splat(np.float32(1) / whole)), width - c)
