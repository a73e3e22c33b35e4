# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a decode step: one new token a row against its cache, as GPU kernels.

What bounds it: bytes. A place of the cache is G (h + e) numbers, read once, and a handful of
multiply-adds for each; so everything here serves wide loads, several in flight on every
multiprocessor. How far from it, on an H200 with the heads of the 1.5B: 96 % of the read bandwidth
at 128 rows of 8192 places, 73 % at 16 rows; 67 % and 33 % in window layers of 1025, where two
launches and their ends weigh more.

    places of row 0   |------- split 0 -------|------- split 1 -------|- 2 -|  and its new token
    places of row 1   |------- split 0 -------|-- (behind its length: nothing)
    meta keys         |- all rows' queries, some at a time, as one matrix product

A program takes one K/V head of one row and one split of its places, with all query heads of the
group, so keys and values are read once; the program of split 0 takes the new token too. Meta keys
are the same for all rows: their programs take queries of many rows instead. Each leaves a *part* in
float32: the largest score, the sum of weights and the weighted sum of values; a second kernel adds
the parts of each query head up. (On Hopper it is put in place while the first still runs.)

The order of places does not matter: `positions` says which text position lies where. But a sequence
of n tokens lies in the first n places (a ring of fewer is full), so what lies behind is not read.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hymba.ops.attention import Meta, Past
from hymba.ops.backend import dense_last, launch, operator
from hymba.ops.segments import Segments, table
from hymba.ops.step_triton import dot_type

EVERYTHING = 2**31 - 1  # a window that hides nothing
# A score below all others and yet finite: exp2 of a difference of two such is 1, never NaN.
FLOOR = tl.constexpr(-1.0e30)
LOG2E = 1.4426950408889634


class Tiling(NamedTuple):
    """How the work is cut; module-wide so that a benchmark can try others."""

    block: int = 128  # places loaded at once
    warps: int = 4
    stages: int = 2
    meta_tile: int = 16  # query heads of a meta program
    most: int = 2048  # places of a split, so that rows of different lengths even out
    overhead: int = 64  # what a program costs beside its places, in places


TILING = Tiling()
PROCESSORS = 132  # of an H100 or H200; where there are fewer, splits are finer than need be


@triton.jit
def _query_rows(first, end, group, PER: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Queries first .. end of a group, row by row: their rows, heads, numbers, and which exist."""
    r = first + tl.arange(0, TILE)
    row = r // PER
    head = group * PER + r % PER
    return row.to(tl.int64), head, row.to(tl.int64) * HEADS + head, r < end


@triton.jit
def _attend(
    q,
    keys,
    values,
    stride_k,
    stride_v,
    positions,
    here,
    window,
    low,
    high,
    scale,
    top,
    mass,
    acc,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The running softmax of queries q (TILE, h) over places low .. high; `positions` and the
    query's position `here` mask them, where MASKED."""
    columns_k = tl.arange(0, BLOCK_H)[None, :]
    columns_v = tl.arange(0, BLOCK_E)[None, :]
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        inside = place < high
        rows = place[:, None]
        k = tl.load(
            keys + rows * stride_k + columns_k,
            mask=inside[:, None] & (columns_k < WIDTH_K),
            other=0.0,
        ).to(DOT)
        v = tl.load(
            values + rows * stride_v + columns_v,
            mask=inside[:, None] & (columns_v < WIDTH_V),
            other=0.0,
        ).to(DOT)
        seen = inside
        if MASKED:
            position = tl.load(positions + place, mask=inside, other=-1).to(tl.int32)
            seen = (position >= 0) & (position <= here) & (here - position <= window)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (TILE, BLOCK)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, mass, acc


@triton.jit
def _store_part(
    parts, part, total, number, exists, top, mass, acc,
    out, WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr, ROWS, ALONE: tl.constexpr,
):  # fmt: skip
    """parts: sums (parts, ROWS, e), then highest scores and weights (parts, ROWS) each. The only
    part there is goes to `out`."""
    columns = tl.arange(0, BLOCK_E)[None, :]
    mask = exists[:, None] & (columns < WIDTH_V)
    if ALONE:
        done = (acc / mass[:, None]).to(out.dtype.element_ty)
        tl.store(out + number[:, None] * WIDTH_V + columns, done, mask=mask)
    else:
        at = part.to(tl.int64) * ROWS + number
        stats = parts + total.to(tl.int64) * ROWS * WIDTH_V
        tl.store(parts + at[:, None] * WIDTH_V + columns, acc, mask=mask)
        tl.store(stats + at, top, mask=exists)
        tl.store(stats + total.to(tl.int64) * ROWS + at, mass, mask=exists)


@triton.jit
def _load_queries(
    q, row, head, exists, stride_q, stride_qh, WIDTH_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    columns = tl.arange(0, BLOCK_H)[None, :]
    at = q + row[:, None] * stride_q + head[:, None] * stride_qh + columns
    return tl.load(at, mask=exists[:, None] & (columns < WIDTH_K), other=0.0)


@triton.jit
def _own_part(
    q, k, v, past_k, past_v, positions, begin, parts, out,
    s, group, split, S, P, total, chunk, window, scale,
    stride_q, stride_qh, stride_k, stride_kg, stride_v, stride_vg,
    stride_pk, stride_pkg, stride_pkp, stride_pv, stride_pvg, stride_pvp, stride_p,
    PER: tl.constexpr, HEADS: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Row s against one split of its places; with split 0, against its own token too."""
    wide, here = s.to(tl.int64), tl.load(begin + s)
    row, head, number, exists = _query_rows(s * PER, s * PER + PER, group, PER, HEADS, TILE)
    tile = _load_queries(q, row, head, exists, stride_q, stride_qh, WIDTH_K, BLOCK_H)
    low = split * chunk
    high = tl.minimum(tl.minimum(low + chunk, P), here)  # behind its length a row has nothing
    past_k += wide * stride_pk + group.to(tl.int64) * stride_pkg
    past_v += wide * stride_pv + group.to(tl.int64) * stride_pvg
    # The new token is fetched now and met last: the loop need not wait for it.
    own = split == 0
    columns_k, columns_v = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_E)[None, :]
    own_k = k + wide * stride_k + group * stride_kg + columns_k
    own_k = tl.load(own_k, mask=columns_k < tl.where(own, WIDTH_K, 0), other=0.0)
    own_v = v + wide * stride_v + group * stride_vg + columns_v
    own_v = tl.load(own_v, mask=columns_v < tl.where(own, WIDTH_V, 0), other=0.0)
    top = tl.full([TILE], FLOOR, tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_E], tl.float32)
    top, mass, acc = _attend(
        tile.to(DOT), past_k, past_v, stride_pkp, stride_pvp, positions + wide * stride_p,
        here, window, low, high, scale, top, mass, acc,
        WIDTH_K, WIDTH_V, BLOCK_H, BLOCK_E, BLOCK, True, DOT, STAGES,
    )  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()  # what adds up is put in place now, and waits for the end
    score = tl.sum(tile.to(tl.float32) * own_k.to(tl.float32), 1) * scale
    score = tl.where(own, score, float("-inf"))
    higher = tl.maximum(top, score)
    shrink, weight = tl.exp2(top - higher), tl.exp2(score - higher)
    acc = acc * shrink[:, None] + weight[:, None] * own_v.to(tl.float32)
    _store_part(
        parts, split, total, number, exists, higher, mass * shrink + weight, acc,
        out, WIDTH_V, BLOCK_E, S * HEADS, ALONE,
    )  # fmt: skip


@triton.jit
def _meta_part(
    q, meta_k, meta_v, parts, out, first, group, S, M, total, scale,
    stride_q, stride_qh, stride_mk, stride_mkg, stride_mv, stride_mvg,
    PER: tl.constexpr, HEADS: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries of many rows, from the group's number `first` on, against the meta keys."""
    row, head, number, exists = _query_rows(first, S * PER, group, PER, HEADS, TILE)
    tile = _load_queries(q, row, head, exists, stride_q, stride_qh, WIDTH_K, BLOCK_H)
    top = tl.full([TILE], FLOOR, tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_E], tl.float32)
    top, mass, acc = _attend(
        tile.to(DOT), meta_k + group * stride_mkg, meta_v + group * stride_mvg,
        stride_mk, stride_mv, meta_k, 0, 0, 0, M, scale, top, mass, acc,
        WIDTH_K, WIDTH_V, BLOCK_H, BLOCK_E, BLOCK, False, DOT, STAGES,
    )  # fmt: skip
    _store_part(
        parts, total - 1, total, number, exists, top, mass, acc,
        out, WIDTH_V, BLOCK_E, S * HEADS, False,
    )  # fmt: skip


# Not for each batch size and length a kernel of its own.
@triton.jit(do_not_specialize=["S", "P", "M", "splits", "chunk", "window", "meta_programs"])
def _attention_decode_kernel(
    q, k, v, past_k, past_v, positions, begin, meta_k, meta_v, parts, out,
    S, P, M, splits, chunk, window, meta_programs, scale,
    stride_q, stride_qh, stride_k, stride_kg, stride_v, stride_vg,
    stride_pk, stride_pkg, stride_pkp, stride_pv, stride_pvg, stride_pvp, stride_p,
    stride_mk, stride_mkg, stride_mv, stride_mvg,
    GROUPS: tl.constexpr, PER: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, META_TILE: tl.constexpr,
    BLOCK: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    META: tl.constexpr, ALONE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid >= meta_programs:
        pid -= meta_programs
        pair = pid // splits
        _own_part(
            q, k, v, past_k, past_v, positions, begin, parts, out,
            pair // GROUPS, pair % GROUPS, pid % splits,
            S, P, splits + META, chunk, window, scale,
            stride_q, stride_qh, stride_k, stride_kg, stride_v, stride_vg,
            stride_pk, stride_pkg, stride_pkp, stride_pv, stride_pvg, stride_pvp, stride_p,
            PER, GROUPS * PER, WIDTH_K, WIDTH_V,
            BLOCK_H, BLOCK_E, TILE, BLOCK, DOT, STAGES, ALONE, CHAINED,
        )  # fmt: skip
    elif META:  # first of all, so that none is left over at the end
        if CHAINED:
            gdc_launch_dependents()
        _meta_part(
            q, meta_k, meta_v, parts, out, pid // GROUPS * META_TILE, pid % GROUPS,
            S, M, splits + META, scale,
            stride_q, stride_qh, stride_mk, stride_mkg, stride_mv, stride_mvg,
            PER, GROUPS * PER, WIDTH_K, WIDTH_V,
            BLOCK_H, BLOCK_E, META_TILE, BLOCK, DOT, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ROWS", "total"])
def _attention_combine_kernel(
    parts, out, ROWS, total,
    WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One query head: the sum of its parts, each as much as its highest score says."""
    number = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)[None, :]
    stats = parts + total.to(tl.int64) * ROWS * WIDTH_V
    weights = stats + total.to(tl.int64) * ROWS
    if CHAINED:
        gdc_wait()
    highest = FLOOR
    whole = 0.0
    acc = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, total, TILE):
        part = start + tl.arange(0, TILE)
        at = part.to(tl.int64) * ROWS + number
        there = part < total
        top = tl.load(stats + at, mask=there, other=FLOOR)
        mass = tl.load(weights + at, mask=there, other=0.0)
        mask = there[:, None] & (columns < WIDTH_V)
        sums = tl.load(parts + at[:, None] * WIDTH_V + columns, mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(top, 0))
        shrink, share = tl.exp2(highest - higher), tl.exp2(top - higher)
        acc = acc * shrink + tl.sum(sums * share[:, None], 0)
        whole = whole * shrink + tl.sum(mass * share, 0)
        highest = higher
    done = (acc / whole)[None, :].to(out.dtype.element_ty)
    tl.store(out + number * WIDTH_V + columns, done, mask=columns < WIDTH_V)


@lru_cache(maxsize=256)
def splits_of(pairs: int, places: int, tiling: Tiling) -> tuple[int, int]:
    """(splits, places of each) for so many pairs of a row and a K/V head: what gives the busiest
    multiprocessor least to do."""

    def size(splits: int) -> int:
        return -(-places // splits) + 15 & ~15  # a multiple of 16

    def busiest(splits: int) -> int:
        return -(-pairs * splits // PROCESSORS) * (size(splits) + tiling.overhead)

    fewest = max(1, -(-places // tiling.most))
    most = max(fewest, min(64, 16 * PROCESSORS // pairs, -(-places // tiling.block)))
    each = max(16, size(min(range(fewest, most + 1), key=busiest)))
    return max(1, -(-places // each)), each


@cache
def _chains(device: torch.device) -> bool:
    """Can a kernel start while the one before it ends? (Hopper on.)"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@table
def _begins(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)


@operator("attention_decode")
def decode_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    positions: Tensor,
    begin: Tensor,
    window: int | None = None,
    meta_k: Tensor | None = None,
    meta_v: Tensor | None = None,
) -> Tensor:
    """As `attention_decode`, with what a captured CUDA graph can change on the device: `begin`
    (S,) int32, the text tokens before each new one. They lie in the first `begin` places."""
    q, k, v, past_k, past_v = (dense_last(x) for x in (q, k, v, past_k, past_v))
    positions, begin = dense_last(positions), begin.contiguous()
    (rows, heads, width), (_, groups, places, value_width) = q.shape, past_v.shape
    out = q.new_empty(rows, heads, value_width)
    if rows == 0:
        return out
    tiling, per, meta = TILING, heads // groups, meta_k is not None and meta_k.shape[0] > 0
    if meta_k is None or meta_v is None:
        meta_k, meta_v = k, v  # not read
    meta_k, meta_v = dense_last(meta_k), dense_last(meta_v)
    splits, chunk = splits_of(rows * groups, places, tiling)
    total = splits + meta
    meta_programs = -(-rows * per // tiling.meta_tile) * groups if meta else 0
    parts = out if total == 1 else q.new_empty(
        total * rows * heads * (value_width + 2), dtype=torch.float32
    )  # fmt: skip
    chained = total > 1 and _chains(q.device)
    block_e = max(16, triton.next_power_of_2(value_width))
    launch(
        _attention_decode_kernel, (rows * groups * splits + meta_programs,),
        q, k, v, past_k, past_v, positions, begin, meta_k, meta_v, parts, out,
        rows, places, meta_k.shape[0], splits, chunk,
        EVERYTHING if window is None else window, meta_programs, LOG2E * width**-0.5,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *past_k.stride()[:3], *past_v.stride()[:3], positions.stride(0),
        *meta_k.stride()[:2], *meta_v.stride()[:2],
        GROUPS=groups, PER=per, WIDTH_K=width, WIDTH_V=value_width,
        BLOCK_H=max(16, triton.next_power_of_2(width)), BLOCK_E=block_e,
        TILE=max(16, triton.next_power_of_2(per)), META_TILE=tiling.meta_tile,
        BLOCK=tiling.block, DOT=dot_type(q), STAGES=tiling.stages,
        META=meta, ALONE=total == 1, CHAINED=chained, num_warps=tiling.warps,
    )  # fmt: skip
    if total > 1:
        tile = min(32, triton.next_power_of_2(total))
        launch(
            _attention_combine_kernel, (rows * heads,), parts, out, rows * heads, total,
            WIDTH_V=value_width, BLOCK_E=block_e, TILE=tile, CHAINED=chained,
            num_warps=max(1, tile // 8), **({"launch_pdl": True} if chained else {}),
        )  # fmt: skip
    return out


@decode_at.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    positions: Tensor,
    begin: Tensor,
    window: int | None = None,
    meta_k: Tensor | None = None,
    meta_v: Tensor | None = None,
) -> Tensor:
    return q.new_empty(*q.shape[:2], past_v.shape[-1])


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """As `attention`, for segments that are all of length 1 and have a past; no gradients."""
    if past is None or segments.uniform != 1:
        raise ValueError("attention_decode is for one new token a row, behind a past")
    begin = _begins(past.lengths, q.device)
    return decode_at(
        q, k, v, past.k, past.v, past.positions, begin, window, *(meta or (None, None))
    )
