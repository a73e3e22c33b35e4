# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a decode step over pages as GPU kernels; see `hymba.ops.attention_step`.

What bounds it: bytes. A place is G (h + e) numbers, read once, and a handful of multiply-adds for
each; so everything here serves wide loads, several in flight on every multiprocessor, and few
steps before the first of them.

    row 0, K/V head 0   | meta | tiles of the row's places ......... | last place
                        |---- split 0 ----|---- split 1 ----|- 2 -|
                          and the last place

A program takes one K/V head of one row and one split of its tiles, with all query heads of the
group, so that keys and values are read once. Meta keys are tiles like others, from the second-level
cache. The last place stands alone: a full ring has window + 1 places, which is whole tiles and one.
A row's tiles are shared out on the device, evenly, whatever `most` says.

Where there is one split it writes the output. Otherwise each leaves a *part* in float32: the
largest score, the sum of weights and the weighted sum of values; and a second, small kernel adds
the parts up, in their order, so that results are the same every time. (To count who comes last and
let it add up saves a kernel and took longer, see `docs/log.md`.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hymba.ops.attention import Meta
from hymba.ops.backend import chains, dense_last, launch, next_power_of_2, operator
from hymba.ops.chain_triton import wait
from hymba.ops.step_triton import dot_type

# A score below all others and yet finite: exp2 of a difference of two such is 1, never NaN.
FLOOR = tl.constexpr(-1.0e30)
LOG2E = 1.4426950408889634


class Tiling(NamedTuple):
    """How the work is cut; module-wide so that a benchmark can try others."""

    block: int = 128  # places of a tile
    warps: int = 4
    stages: int = 2
    most: int = 18  # tiles of a split, so that rows of different lengths even out
    overhead: float = 0.5  # what a program costs beside its tiles, in tiles
    joining: float = 1.0  # what adding up costs, in tiles
    splits: int = 0  # so many; 0: as `splits_of` finds
    chain: bool = True  # starts while the kernel before it ends
    parts: int = 8  # added up at once


TILING = Tiling()
PROCESSORS = 132  # of an H100 or H200; where there are fewer, splits are finer than need be


@triton.jit
def _share(count, split, splits, M, META: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row of so many places: its tiles of meta keys, this split's first and end, and how many
    splits have any."""
    meta_tiles = (M + BLOCK - 1) // BLOCK if META else 0
    tiles = meta_tiles + (tl.maximum(count - 1, 0) + BLOCK - 1) // BLOCK
    each = tl.maximum((tiles + splits - 1) // splits, 1)
    used = tl.maximum((tiles + each - 1) // each, 1)
    return meta_tiles, split * each, tl.minimum(split * each + each, tiles), used


@triton.jit
def _page(pages, place, P: tl.constexpr, there):
    """The page of a place; with P = 0 a row has only one."""
    at = place // P if P > 0 else 0
    return tl.load(pages + at, mask=there, other=0).to(tl.int64)


@triton.jit
def _attend(
    q, store_k, store_v, meta_k, meta_v, pages, count, meta_tiles, first, end, M, scale,
    stride_kn, stride_kp, stride_vn, stride_vp, stride_mk, stride_mv, top, mass, acc,
    P: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """The running softmax of queries q (TILE, h) over tiles first .. end, not the last place."""
    columns_k = tl.arange(0, BLOCK_H)[None, :]
    columns_v = tl.arange(0, BLOCK_E)[None, :]
    behind = tl.maximum(count - 1, 0)  # places of whole tiles
    WHOLE: tl.constexpr = P % BLOCK == 0  # no tile has places of two pages
    page = _page(pages, tl.maximum(first - meta_tiles, 0) * BLOCK, P, behind > 0)
    for tile in tl.range(first, end, num_stages=STAGES):
        begin = (tile - meta_tiles) * BLOCK
        limit = behind
        step_k, step_v = stride_kp, stride_vp
        if WHOLE:
            inner = begin % P if P > 0 else begin
            keys = store_k + page * stride_kn + inner * stride_kp
            values = store_v + page * stride_vn + inner * stride_vp
            # Known a tile ahead, so that nobody waits for it.
            later = tl.maximum(begin + BLOCK, 0)
            page = _page(pages, tl.minimum(later, tl.maximum(behind - 1, 0)), P, behind > 0)
        else:
            keys, values = store_k, store_v
        if META:
            meta = tile < meta_tiles
            begin = tl.where(meta, tile * BLOCK, begin)
            limit = tl.where(meta, M, limit)
            keys = tl.where(meta, meta_k + tile * BLOCK * stride_mk, keys)
            values = tl.where(meta, meta_v + tile * BLOCK * stride_mv, values)
            step_k = tl.where(meta, stride_mk, step_k)
            step_v = tl.where(meta, stride_mv, step_v)
        i = tl.arange(0, BLOCK)
        inside = begin + i < limit
        at_k, at_v = i * step_k, i * step_v
        if not WHOLE:
            place = (tile - meta_tiles) * BLOCK + i  # below 0 in meta tiles
            text = (place >= 0) & (place < behind)
            held = _page(pages, place, P, text)
            at_k = tl.where(text, held * stride_kn + place % P * stride_kp, at_k)
            at_v = tl.where(text, held * stride_vn + place % P * stride_vp, at_v)
        k = tl.load(
            keys + at_k[:, None] + columns_k,
            mask=inside[:, None] & (columns_k < WIDTH_K),
            other=0.0,
        ).to(DOT)
        v = tl.load(
            values + at_v[:, None] + columns_v,
            mask=inside[:, None] & (columns_v < WIDTH_V),
            other=0.0,
        ).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (TILE, BLOCK)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, mass, acc


@triton.jit
def _store(out, number, there, mass, acc, WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr):
    column = tl.arange(0, BLOCK_E)[None, :]
    done = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]  # of nothing: zeros
    mask = there[:, None] & (column < WIDTH_V)
    tl.store(out + number[:, None] * WIDTH_V + column, done.to(out.dtype.element_ty), mask=mask)


# Not for each batch size and length a kernel of its own.
@triton.jit(do_not_specialize=["M", "splits", "pairs", "stride_t"])
def _attention_step_kernel(
    q, store_k, store_v, table, counts, meta_k, meta_v, parts, out,
    M, splits, pairs, scale, stride_q, stride_qh,
    stride_kn, stride_kg, stride_kp, stride_vn, stride_vg, stride_vp, stride_t,
    stride_mk, stride_mkg, stride_mv, stride_mvg,
    P: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    META: tl.constexpr, ALONE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_wait()
    pair, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row, group = (pair // GROUPS).to(tl.int64), pair % GROUPS
    count = tl.load(counts + row)
    meta_tiles, first, end, used = _share(count, split, splits, M, META, BLOCK)
    if split < used:
        pages = table + row * stride_t
        store_k += group.to(tl.int64) * stride_kg
        store_v += group.to(tl.int64) * stride_vg
        i = tl.arange(0, TILE)
        there, number = i < PER, pair.to(tl.int64) * PER + i
        columns_k, columns_v = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_E)[None, :]
        heads = group * PER + i[:, None]
        tile = tl.load(
            q + row * stride_q + heads * stride_qh + columns_k,
            mask=there[:, None] & (columns_k < WIDTH_K),
            other=0.0,
        )
        # The last place is fetched now and met last: the loop need not wait for it.
        own = (split == 0) & (count > 0)
        place = tl.maximum(count - 1, 0)
        page = _page(pages, place, P, own)
        place = place % P if P > 0 else place
        own_k = store_k + page * stride_kn + place * stride_kp + columns_k
        own_k = tl.load(own_k, mask=columns_k < tl.where(own, WIDTH_K, 0), other=0.0)
        own_v = store_v + page * stride_vn + place * stride_vp + columns_v
        own_v = tl.load(own_v, mask=columns_v < tl.where(own, WIDTH_V, 0), other=0.0)
        top = tl.full([TILE], FLOOR, tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, BLOCK_E], tl.float32)
        top, mass, acc = _attend(
            tile.to(DOT), store_k, store_v,
            meta_k + group * stride_mkg, meta_v + group * stride_mvg,
            pages, count, meta_tiles, first, end, M, scale,
            stride_kn, stride_kp, stride_vn, stride_vp, stride_mk, stride_mv, top, mass, acc,
            P, WIDTH_K, WIDTH_V, BLOCK_H, BLOCK_E, BLOCK, DOT, STAGES, META,
        )  # fmt: skip
        if CHAINED:
            gdc_launch_dependents()  # what comes next is put in place now, and waits for the end
        score = tl.sum(tile.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        score = tl.where(own, score, float("-inf"))
        higher = tl.maximum(top, score)
        shrink, weight = tl.exp2(top - higher), tl.exp2(score - higher)
        acc = acc * shrink[:, None] + weight[:, None] * own_v.to(tl.float32)
        mass = mass * shrink + weight
        if ALONE:
            _store(out, number, there, mass, acc, WIDTH_V, BLOCK_E)
        else:
            # parts: sums (pairs, splits, PER, e), then highest scores and weights
            part = pair.to(tl.int64) * splits
            limit = pairs.to(tl.int64) * splits * PER
            at = (part + split) * PER + i
            mask = there[:, None] & (columns_v < WIDTH_V)
            tl.store(parts + at[:, None] * WIDTH_V + columns_v, acc, mask=mask)
            tl.store(parts + limit * WIDTH_V + at, higher, mask=there)
            tl.store(parts + limit * (WIDTH_V + 1) + at, mass, mask=there)


@triton.jit(do_not_specialize=["M", "splits", "pairs"])
def _add_up_kernel(
    parts, out, counts, M, splits, pairs,
    GROUPS: tl.constexpr, PER: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, META: tl.constexpr, PARTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The parts of one query head, each as much as its highest score says."""
    number = tl.program_id(0)
    pair, head = (number // PER).to(tl.int64), number % PER
    column = tl.arange(0, BLOCK_E)
    wait(CHAINED)
    _, _, _, used = _share(tl.load(counts + pair // GROUPS), 0, splits, M, META, BLOCK)
    limit = pairs.to(tl.int64) * splits * PER
    highest = tl.full([1], FLOOR, tl.float32)
    whole = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, used, PARTS):
        i = start + tl.arange(0, PARTS)
        at = (pair * splits + i) * PER + head
        top = tl.load(parts + limit * WIDTH_V + at, mask=i < used, other=FLOOR)
        mass = tl.load(parts + limit * (WIDTH_V + 1) + at, mask=i < used, other=0.0)
        sums = tl.load(
            parts + at[:, None] * WIDTH_V + column[None, :],
            mask=(i < used)[:, None] & (column < WIDTH_V)[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(top, 0))
        shrink, share = tl.exp2(highest - higher), tl.exp2(top - higher)
        acc = acc * shrink + tl.sum(sums * share[:, None], 0)
        whole = whole * shrink + tl.sum(mass * share, 0)
        highest = higher
    one = number.to(tl.int64) + tl.arange(0, 1)
    _store(out, one, one >= 0, whole, acc[None, :], WIDTH_V, BLOCK_E)


@lru_cache(maxsize=256)
def splits_of(pairs: int, tiles: int, tiling: Tiling) -> int:
    """For so many pairs of a row and a K/V head, of so many tiles at most: what gives the busiest
    multiprocessor least to do."""
    if tiling.splits:
        return max(1, min(tiling.splits, tiles))

    def busiest(splits: int) -> float:
        programs = -(-pairs * splits // PROCESSORS)
        joining = tiling.joining if splits > 1 else 0
        return programs * (-(-tiles // splits) + tiling.overhead) + joining

    fewest = max(1, -(-tiles // tiling.most))
    most = max(fewest, min(64, 16 * PROCESSORS // pairs, tiles))
    return min(range(fewest, most + 1), key=busiest)


def _block_of(size: int, paged: bool, tiling: Tiling) -> int:
    """Places of a tile: fewer where pages are small, as long as pages are whole tiles."""
    block = tiling.block
    while paged and size % block and block > 32:
        block //= 2
    return block if not paged or size % block == 0 else tiling.block


@operator("attention_step")
def step_operator(
    q: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
    meta_k: Tensor | None = None,
    meta_v: Tensor | None = None,
) -> Tensor:
    """As `attention_step`."""
    q, table, counts = dense_last(q), dense_last(table), counts.contiguous()
    store_k, store_v = dense_last(store_k), dense_last(store_v)
    (rows, heads, width), (_, groups, size, value_width) = q.shape, store_v.shape
    out = q.new_empty(rows, heads, value_width)
    if rows == 0:
        return out
    tiling, per = TILING, heads // groups
    meta = meta_k is not None and meta_k.shape[0] > 0
    if meta_k is None or meta_v is None or not meta:
        meta_k, meta_v = store_k[0, 0, :0, None], store_v[0, 0, :0, None]  # not read
    meta_k, meta_v = dense_last(meta_k.to(store_k)), dense_last(meta_v.to(store_v))
    paged = table.shape[1] > 1
    block = _block_of(size, paged, tiling)
    tiles = -(-meta_k.shape[0] // block) + -(-max(most - 1, 0) // block)
    pairs, splits = rows * groups, splits_of(rows * groups, max(tiles, 1), tiling)
    parts = out if splits == 1 else q.new_empty(
        pairs * splits * per * (value_width + 2), dtype=torch.float32
    )  # fmt: skip
    shared = {
        "GROUPS": groups, "PER": per, "WIDTH_V": value_width, "BLOCK": block, "META": meta,
        "BLOCK_E": max(16, next_power_of_2(value_width)),
        "CHAINED": tiling.chain and chains(q),
    }  # fmt: skip
    launch(
        _attention_step_kernel, (pairs * splits,),
        q, store_k, store_v, table, counts, meta_k, meta_v, parts, out,
        meta_k.shape[0], splits, pairs, LOG2E * width**-0.5,
        *q.stride()[:2], *store_k.stride()[:3], *store_v.stride()[:3], table.stride(0),
        *meta_k.stride()[:2], *meta_v.stride()[:2],
        P=size if paged else 0, WIDTH_K=width, BLOCK_H=max(16, next_power_of_2(width)),
        TILE=max(16, next_power_of_2(per)), DOT=dot_type(q), STAGES=tiling.stages,
        ALONE=splits == 1, num_warps=tiling.warps, **shared,
    )  # fmt: skip
    if splits > 1:
        launch(
            _add_up_kernel, (pairs * per,), parts, out, counts, meta_k.shape[0], splits, pairs,
            PARTS=tiling.parts, num_warps=1, **shared,
        )  # fmt: skip
    return out


@step_operator.register_fake
def _(q: Tensor, store_k: Tensor, store_v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:2], store_v.shape[-1])


@torch.no_grad()
def attention_step(
    q: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
    meta: Meta | None = None,
) -> Tensor:
    """As `hymba.ops.attention_step.attention_step`."""
    meta_k, meta_v = meta or (None, None)
    return step_operator(q, store_k, store_v, table, counts, most, meta_k, meta_v)
