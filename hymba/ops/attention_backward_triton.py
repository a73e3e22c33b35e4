# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradients of attention: a pass over keys for dq, and a pass over queries for dk and dv.

What bounds it: matrix products. With the weights p recomputed from the saved log-sum-exp,

    dv = p' do,   ds = p * (do v' - delta),   dq = ds k,   dk = ds' q,   delta = rowsum(do * out)

the two passes make p and do v' once each: 1.7 times the products of a pass that adds up dq by
atomics, and in return no atomics (the sums have one order) and no float32 copy of dq.
How far from it, on an H200, of 2.3 times forward's useful products: 30 % of the rate of a large
product in window layers, 38 % without a window.

Rows-by-keys blocks that no mask reaches are skipped on both sides, as in the forward. The program
of a block of keys sums over the query heads of its group, so no gradient is repeated. A meta key
is seen by all rows of all segments: its rows are cut into chunks of about the work of one block of
text keys, whose partial sums are float32 and summed afterwards in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.attention_triton import (
    LOG2E,
    hopper,
    is_edge,
    load_rows,
    meta_arguments,
    product,
    query_items,
    seen_tile,
    strides,
    tile_at,
    tile_pointers,
    width_block,
)
from hymba.ops.backend import dense_last, launch
from hymba.ops.segments import Segments, table

CHUNK = 1024  # rows of one partial sum of the meta keys' gradients, at least
MOST_PARTS = 32
# Numbers kept per row and head: log-sum-exp and delta. Two unused ones make it 16 bytes, which one
# thread copies; of less, every thread would copy the rows of all the columns it holds.
STATS = tl.constexpr(4)


@triton.jit(do_not_specialize=["n_rows", "m_places", "window"])
def _queries_kernel(
    q, k, v, out, lse, stats, do, dq, meta_k, meta_v, items,
    q_row, q_head, k_row, k_head, v_row, v_head, mk_row, mk_head, mv_row, mv_head, do_row, do_head,
    n_rows, m_places, window, scale, to_base_2,
    HEADS: tl.constexpr, SHARE: tl.constexpr, h: tl.constexpr, e: tl.constexpr,
    h_block: tl.constexpr, e_block: tl.constexpr,
    META: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head, and the numbers per row that the other pass needs."""
    item = items + tl.program_id(0) // HEADS * 5
    head = tl.program_id(0) % HEADS
    group = head // SHARE
    start, length, first_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)

    rows = first_row + tl.arange(0, ROWS)
    wide, tall = tl.arange(0, h_block), tl.arange(0, e_block)
    row_ok = rows < length
    origin = start.to(tl.int64)
    down = tl.arange(0, ROWS)[:, None]
    q += (origin + first_row) * q_row + head * q_head
    queries = load_rows(q + down * q_row + wide[None, :], row_ok[:, None], h, h_block)
    do += (origin + first_row) * do_row + head * do_head
    pulls = load_rows(do + down * do_row + tall[None, :], row_ok[:, None], e, e_block)
    out += (origin + first_row) * (HEADS * e) + head * e
    outs = load_rows(out + down * (HEADS * e) + tall[None, :], row_ok[:, None], e, e_block)
    less = tl.sum(pulls.to(tl.float32) * outs.to(tl.float32), 1)
    stat = head.to(tl.int64) * n_rows + origin + rows
    norm = tl.load(lse + stat, row_ok, other=0.0)
    tl.store(stats + stat * STATS, norm, row_ok)
    tl.store(stats + stat * STATS + 1, less, row_ok)
    norm, less = norm[:, None], less[:, None]
    acc = tl.zeros((ROWS, h_block), tl.float32)

    k += origin * k_row + group * k_head
    v += origin * v_row + group * v_head
    meta_tiles = 0
    if META:
        meta_k += group * mk_head
        meta_v += group * mv_head
        meta_tiles = tl.cdiv(m_places, KEYS)
    first = 0
    if WINDOW:
        first = tl.maximum(first_row - window, 0)
    end = tl.minimum(first_row + ROWS, length)
    for j in range(0, meta_tiles + tl.cdiv(end - first, KEYS)):
        is_meta, at, limit = tile_at(j, first, meta_tiles, m_places, length, KEYS, META)
        key_ok = (at + tl.arange(0, KEYS) < limit)[:, None]
        k_tile = tile_pointers(k, k_row, meta_k, mk_row, is_meta, at, KEYS, META) + wide[None, :]
        v_tile = tile_pointers(v, v_row, meta_v, mv_row, is_meta, at, KEYS, META) + tall[None, :]
        k_here = load_rows(k_tile, key_ok, h, h_block)
        v_here = load_rows(v_tile, key_ok, e, e_block)
        s = product(queries, tl.trans(k_here), None, PRECISION)
        dp = product(pulls, tl.trans(v_here), None, PRECISION)
        if is_edge(is_meta, at, first_row, limit, window, ROWS, KEYS, META, WINDOW):
            keys = (at + tl.arange(0, KEYS))[None, :]
            seen = seen_tile(is_meta, rows[:, None], keys, limit, window, META, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        ds = tl.exp2(s * to_base_2 - norm) * (dp - less)
        acc = product(ds.to(k_here.dtype), k_here, acc, PRECISION)

    dq += (origin + first_row) * (HEADS * h) + head * h
    dq_tile = dq + down * (HEADS * h) + wide[None, :]
    tl.store(dq_tile, (acc * scale).to(dq.dtype.element_ty), row_ok[:, None] & (wide < h)[None, :])


@triton.jit(do_not_specialize=["n_rows", "m_places", "window"])
def _keys_kernel(
    q, k, v, stats, do, dk, dv, meta_k, meta_v, part_k, part_v, items,
    q_row, q_head, k_row, k_head, v_row, v_head, mk_row, mk_head, mv_row, mv_head, do_row, do_head,
    n_rows, m_places, window, scale, to_base_2,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, h: tl.constexpr, e: tl.constexpr,
    h_block: tl.constexpr, e_block: tl.constexpr,
    META: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one group: text keys, or meta keys from a chunk of rows.

    One loop over the query heads of the group and, for each, the rows that see the block. Scores
    are made keys by rows: what the next products take from the left then stays in registers."""
    item = items + tl.program_id(0) // GROUPS * 6
    group = tl.program_id(0) % GROUPS
    origin, limit, at = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    first_row, end_row, part = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    is_meta = part >= 0

    wide, tall = tl.arange(0, h_block), tl.arange(0, e_block)
    down = tl.arange(0, KEYS)
    key_ok = (at + down < limit)[:, None]
    k += origin * k_row + group * k_head
    v += origin * v_row + group * v_head
    if META:
        meta_k += group * mk_head
        meta_v += group * mv_head
    k_tile = tile_pointers(k, k_row, meta_k, mk_row, is_meta, at, KEYS, META) + wide[None, :]
    v_tile = tile_pointers(v, v_row, meta_v, mv_row, is_meta, at, KEYS, META) + tall[None, :]
    keys = load_rows(k_tile, key_ok, h, h_block)
    values = load_rows(v_tile, key_ok, e, e_block)
    acc_k = tl.zeros((KEYS, h_block), tl.float32)
    acc_v = tl.zeros((KEYS, e_block), tl.float32)

    q += origin * q_row
    do += origin * do_row
    stats += origin * STATS
    across = tl.arange(0, ROWS)
    q_steps = (across * q_row)[:, None] + wide[None, :]
    do_steps = (across * do_row)[:, None] + tall[None, :]
    stat_steps = (across * STATS)[:, None] + tl.arange(0, STATS)[None, :]
    row, head = first_row, group * SHARE
    for _ in range(0, tl.cdiv(end_row - first_row, ROWS) * SHARE):
        rows = row + across
        row_ok = (rows < end_row)[:, None]
        q_tile = q + (row.to(tl.int64) * q_row + head * q_head) + q_steps
        do_tile = do + (row.to(tl.int64) * do_row + head * do_head) + do_steps
        stat = stats + (head.to(tl.int64) * n_rows + row) * STATS + stat_steps
        # Rows past the end are zeros: weights of 1, but nothing to weigh.
        queries = load_rows(q_tile, row_ok, h, h_block)
        pulls = load_rows(do_tile, row_ok, e, e_block)
        even, odd = tl.split(tl.reshape(tl.load(stat, row_ok, other=0.0), (ROWS, 2, 2)))
        norm, _even = tl.split(even)
        less, _odd = tl.split(odd)
        s = product(keys, tl.trans(queries), None, PRECISION)
        edge = at + KEYS - 1 > row
        if WINDOW:
            edge = edge | (row + ROWS - 1 - at > window)
        if edge & (is_meta == 0):
            there = (at + down)[:, None]
            seen = seen_tile(False, rows[None, :], there, 0, window, False, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * to_base_2 - norm[None, :])
        acc_v = product(p.to(pulls.dtype), pulls, acc_v, PRECISION)
        dp = product(values, tl.trans(pulls), None, PRECISION)
        ds = p * (dp - less[None, :])
        acc_k = product(ds.to(queries.dtype), queries, acc_k, PRECISION)
        row += ROWS
        head = tl.where(row < end_row, head, head + 1)
        row = tl.where(row < end_row, row, first_row)

    acc_k *= scale
    places = at + down
    in_h, in_e = key_ok & (wide < h)[None, :], key_ok & (tall < e)[None, :]
    if is_meta:
        place = (part.to(tl.int64) * m_places + places)[:, None] * GROUPS + group
        tl.store(part_k + place * h + wide[None, :], acc_k, in_h)
        tl.store(part_v + place * e + tall[None, :], acc_v, in_e)
    else:
        place = (origin + places)[:, None] * GROUPS + group
        tl.store(dk + place * h + wide[None, :], acc_k.to(dk.dtype.element_ty), in_h)
        tl.store(dv + place * e + tall[None, :], acc_v.to(dv.dtype.element_ty), in_e)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    window: int | None,
    meta: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of meta keys and values (no elements where there are none)."""
    do, q, k, v = (dense_last(x) for x in (do, q, k, v))
    total, heads, h = q.shape
    groups, e = v.shape[1:]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    stats = lse.new_empty(heads, total, STATS.value)
    meta_k, meta_v, meta_strides, m_places = meta_arguments(meta)
    h_block, e_block = width_block(h), width_block(e)
    sizes: dict[str, object] = {
        "h": h,
        "e": e,
        "h_block": h_block,
        "e_block": e_block,
        "SHARE": heads // groups,
    }
    sizes |= {"META": meta is not None, "WINDOW": window is not None, "PRECISION": "ieee"}
    steps = [*strides(q, k, v), *meta_strides, *strides(do)]
    numbers = [total, m_places, window or 0, h**-0.5, h**-0.5 * LOG2E]

    rows, keys, options = query_blocks(h_block, e_block, q.dtype, q.device)
    items = query_items(segments.lengths, None, rows, window, q.device)
    launch(
        _queries_kernel, (items.shape[0] * heads,),
        q, k, v, out, lse, stats, do, dq, meta_k, meta_v, items, *steps, *numbers,
        HEADS=heads, ROWS=rows, KEYS=keys, **sizes, **options,
    )  # fmt: skip
    rows, keys, options = key_blocks(h_block, e_block, q.dtype, q.device)
    items, parts = key_items(segments.lengths, m_places, keys, window, q.device)
    part_k = lse.new_empty(parts, m_places, groups, h)
    part_v = lse.new_empty(parts, m_places, groups, e)
    launch(
        _keys_kernel, (items.shape[0] * groups,),
        q, k, v, stats, do, dk, dv, meta_k, meta_v, part_k, part_v, items, *steps, *numbers,
        GROUPS=groups, ROWS=rows, KEYS=keys, **sizes, **options,
    )  # fmt: skip
    if meta is None:
        return dq, dk, dv, k.new_empty(0), v.new_empty(0)
    return dq, dk, dv, part_k.sum(0).to(k.dtype), part_v.sum(0).to(v.dtype)


def query_blocks(
    h_block: int, e_block: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, dict[str, int]]:
    """(rows, keys, launch options) of the pass for dq."""
    if dtype == torch.float32:
        return 32, 32, {"num_warps": 8, "num_stages": 1}
    if h_block + e_block > 256 or not hopper(device):
        return 64, 32, {"num_warps": 8, "num_stages": 2}
    return 64, 64, {"num_warps": 4, "num_stages": 2}


def key_blocks(
    h_block: int, e_block: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, dict[str, int]]:
    """(rows, keys, launch options) of the pass for dk and dv, whose sums fill the registers."""
    if dtype == torch.float32:
        return 32, 32, {"num_warps": 4, "num_stages": 1}
    if h_block + e_block > 256 or not hopper(device):
        return 32, 32, {"num_warps": 8, "num_stages": 2}
    if h_block + e_block > 192:
        return 32, 64, {"num_warps": 4, "num_stages": 3}
    return 64, 64, {"num_warps": 4, "num_stages": 3}


@table
def key_items(
    lengths: tuple[int, ...], m_places: int, block: int, window: int | None, device: torch.device
) -> tuple[Tensor, int]:
    """(items, 6) int32 and the number of parts of the meta keys' gradients. An item is a block of
    keys and the rows that see it: where its segment starts, keys there, first key of the block,
    first row and end of the rows, and the part (-1: text keys). Those with most rows first."""
    segments = Segments(lengths)
    items = []
    for start, length in segments:
        for at in range(0, length, block):
            end = length if window is None else min(length, at + block + window)
            items.append((start, length, at, at, end, -1))
    chunk = max(CHUNK, -(-segments.total // MOST_PARTS)) if m_places else segments.total + 1
    firsts = range(0, segments.total, chunk) if m_places else ()
    for part, first in enumerate(firsts):
        end = min(first + chunk, segments.total)
        items += [(0, m_places, at, first, end, part) for at in range(0, m_places, block)]
    items.sort(key=lambda item: item[3] - item[4])
    return torch.tensor(items, dtype=torch.int32).to(device), len(firsts)
