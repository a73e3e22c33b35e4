# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention for training and prefill as one pass over the keys a block of queries can see.

What bounds it: matrix products, then exponentials. A layer of the 1.5B over 8192 rows (25 heads,
window 1024, 128 meta keys) needs 92 GFLOP, 0.12 ms of an H200's tensor cores, and 0.24 G
exponentials, 0.07 ms; its 115 MB pass in 0.03 ms.
How far from it, on an H200: 0.25 ms; without a window 61 % of the rate of a large product.

One program is one block of queries of one head. It walks over tiles of keys: the meta keys, then
those its window (or causal past) touches, in one software-pipelined loop, so that the copies of a
next tile run during the products of this one. A tile of which every row sees every key is used as
it is; only tiles at the edges of the mask pay for comparisons. The softmax is kept as a running
maximum and sum per row, in base 2 and float32, and the sum of weighted values is rescaled when the
maximum moves. Grouped heads read the keys of their group: the programs of one block of queries run
side by side, so that repeats come from the L2 cache.

A cache's places come in any order, each with its text position: a loop of its own, always masked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.attention import Meta, Past
from hymba.ops.attention import attention as plain_attention
from hymba.ops.backend import dense_last, launch, next_power_of_2, operator, wants_grad
from hymba.ops.segments import Segments, table

LOG2E = 1.4426950408889634
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-1e20)  # a running maximum before any key: finite, so no inf - inf


@triton.jit
def tile_at(j, first, meta_tiles, m_places, length, BLOCK: tl.constexpr, META: tl.constexpr):
    """Tile j of a walk over the meta keys and then the text keys from `first` on: (is it meta,
    its first key, the number of keys there are)."""
    at = first + (j - meta_tiles) * BLOCK
    if META:
        is_meta = j < meta_tiles
        return is_meta, tl.where(is_meta, j * BLOCK, at), tl.where(is_meta, m_places, length)
    else:
        return False, at, length


@triton.jit
def tile_pointers(x, x_row, meta, meta_row, is_meta, at, BLOCK: tl.constexpr, META: tl.constexpr):
    """Pointers (BLOCK, 1) to the rows of a tile, in the text tensor or in the meta tensor."""
    if META:
        base = tl.where(is_meta, meta, x)
        row = tl.where(is_meta, meta_row, x_row)
    else:
        base = x
        row = x_row
    return base + at.to(tl.int64) * row + (tl.arange(0, BLOCK) * row)[:, None]


@triton.jit
def load_rows(pointers, row_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block of rows (B, WIDTH), zeros past either end; widths of a power of two need no mask."""
    ok = row_ok
    if WIDTH != BLOCK:
        ok = ok & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return tl.load(pointers, ok, other=0.0)


@triton.jit
def is_edge(is_meta, at, first_row, limit, window, ROWS, KEYS, META, WINDOW):
    """Whether some row of the block of queries does not see some key of the tile."""
    edge = at + KEYS - 1 > first_row
    if WINDOW:
        edge = edge | (first_row + ROWS - 1 - at > window)
    if META:
        edge = tl.where(is_meta, at + KEYS > limit, edge)
    return edge


@triton.jit
def seen_tile(is_meta, rows, keys, limit, window, META: tl.constexpr, WINDOW: tl.constexpr):
    """The mask of a tile of keys; rows and keys broadcast against each other. Bounds of what a
    row sees are made per row, so that an element costs two comparisons."""
    newest, oldest = rows, rows - window
    if META:
        newest = tl.where(is_meta, limit - 1, rows)
        oldest = tl.where(is_meta, 0, oldest)
    seen = keys <= newest
    if WINDOW:
        seen = seen & (keys >= oldest)
    return seen


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. The interpreter takes bfloat16 for integers in a product."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _fold(s, v, acc, top, total, scale, PRECISION: tl.constexpr):
    """One tile of scores s (B, K) and values v (K, E) into the running softmax."""
    new = tl.maximum(top, tl.max(s, 1) * scale)
    weights = tl.exp2(s * scale - new[:, None])
    keep = tl.exp2(top - new)
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None]
    acc = product(weights.to(v.dtype), v, acc, PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=["n_rows", "m_places", "p_places", "window"])
def _forward_kernel(
    q, k, v, out, lse, meta_k, meta_v, past_k, past_v, places, items,
    q_row, q_head, k_row, k_head, v_row, v_head, mk_row, mk_head, mv_row, mv_head,
    pk_seg, pk_head, pk_row, pv_seg, pv_head, pv_row, places_seg,
    n_rows, m_places, p_places, window, scale,
    HEADS: tl.constexpr, SHARE: tl.constexpr, h: tl.constexpr, e: tl.constexpr,
    h_block: tl.constexpr, e_block: tl.constexpr,
    META: tl.constexpr, PAST: tl.constexpr, WINDOW: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) // HEADS * 5
    head = tl.program_id(0) % HEADS
    group = head // SHARE
    start, length = tl.load(item), tl.load(item + 1)
    first_row, begin, segment = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)

    rows = first_row + tl.arange(0, ROWS)
    wide, tall = tl.arange(0, h_block), tl.arange(0, e_block)
    row_ok = (rows < length)[:, None]
    origin = start.to(tl.int64)
    q += (origin + first_row) * q_row + head * q_head
    q_tile = q + (tl.arange(0, ROWS) * q_row)[:, None] + wide[None, :]
    queries = load_rows(q_tile, row_ok, h, h_block)
    acc = tl.zeros((ROWS, e_block), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    if PAST:
        past_k += segment.to(tl.int64) * pk_seg + group * pk_head
        past_v += segment.to(tl.int64) * pv_seg + group * pv_head
        places += segment.to(tl.int64) * places_seg
        for at in range(0, p_places, KEYS):
            keys = at + tl.arange(0, KEYS)
            key_ok = keys < p_places
            k_tile = past_k + keys.to(tl.int64)[:, None] * pk_row + wide[None, :]
            v_tile = past_v + keys.to(tl.int64)[:, None] * pv_row + tall[None, :]
            position = tl.load(places + keys, key_ok, other=-1).to(tl.int32)[None, :]
            k_here = load_rows(k_tile, key_ok[:, None], h, h_block)
            v_here = load_rows(v_tile, key_ok[:, None], e, e_block)
            s = product(queries, tl.trans(k_here), None, PRECISION)
            at_rows = begin + rows[:, None]
            seen = seen_tile(False, at_rows, position, 0, window, False, WINDOW) & (position >= 0)
            s = tl.where(seen, s, float("-inf"))
            acc, top, total = _fold(s, v_here, acc, top, total, scale, PRECISION)

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
        if is_edge(is_meta, at, first_row, limit, window, ROWS, KEYS, META, WINDOW):
            keys = (at + tl.arange(0, KEYS))[None, :]
            seen = seen_tile(is_meta, rows[:, None], keys, limit, window, META, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        acc, top, total = _fold(s, v_here, acc, top, total, scale, PRECISION)

    out += (origin + first_row) * (HEADS * e) + head * e
    out_tile = out + (tl.arange(0, ROWS) * (HEADS * e))[:, None] + tall[None, :]
    tl.store(
        out_tile, (acc / total[:, None]).to(out.dtype.element_ty), row_ok & (tall < e)[None, :]
    )
    if SAVE:
        lse += head.to(tl.int64) * n_rows + origin
        tl.store(lse + rows, top + tl.log2(total), rows < length)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """As hymba.ops.attention.attention; behind a past there are no kernels for gradients."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if meta is not None:  # made in another dtype, where autocast began or ended since
        meta = Meta(meta.k.to(q.dtype), meta.v.to(q.dtype))
    meta_k, meta_v = (None, None) if meta is None else meta
    if past is None:
        if is_llamas(q, v, segments, window, meta):
            return causal(q, k, v, segments)
        save = wants_grad(q, k, v, meta_k, meta_v)
        return _attention(q, k, v, segments.lengths, window, meta_k, meta_v, save)[0]
    if wants_grad(q, k, v, meta_k, meta_v, past.k, past.v):
        return plain_attention(q, k, v, segments, window, meta, past)
    return attention_chunk(q, k, v, segments, window, meta, past)


def is_llamas(
    q: Tensor, v: Tensor, segments: Segments, window: int | None, meta: Meta | None
) -> bool:
    """Whether it is what torch's own kernels were made for: plain causal, equal lengths, values as
    wide as keys, 16 bits. There they are a quarter faster (docs/log.md)."""
    whole = window is None or window >= max(segments.lengths, default=0)
    same = q.shape[-1] == v.shape[-1] and segments.uniform is not None
    return meta is None and whole and same and q.dtype in (torch.bfloat16, torch.float16)


def causal(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q (N, H, h); k, v (N, G, h), segments of one length T -> (N, H, h)."""
    q, k, v = (x.unflatten(0, (segments.count, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (S, H, T, h)
    return out.transpose(1, 2).flatten(0, 1)


def attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None,
    meta: Meta | None,
    past: Past,
) -> Tensor:
    """New rows behind a cache, any number a segment."""
    meta_k, meta_v = (None, None) if meta is None else meta
    return _attention_chunk(
        q, k, v, segments.lengths, window, meta_k, meta_v,
        past.k, past.v, past.positions, past.lengths,
    )  # fmt: skip


@operator("attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    window: int | None,
    meta_k: Tensor | None,
    meta_v: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (H, N) in base 2, or nothing where no gradient is wanted)."""
    meta = None if meta_k is None or meta_v is None else (meta_k, meta_v)
    return _forward(q, k, v, Segments(tuple(lengths)), window, meta, None, save)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    window: int | None,
    meta_k: Tensor | None,
    meta_v: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, v, save)


@operator("attention_chunk")
def _attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    window: int | None,
    meta_k: Tensor | None,
    meta_v: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    positions: Tensor,
    begins: Sequence[int],
) -> Tensor:
    meta = None if meta_k is None or meta_v is None else (meta_k, meta_v)
    past = Past(past_k, past_v, positions, tuple(begins))
    return _forward(q, k, v, Segments(tuple(lengths)), window, meta, past, False)[0]


@_attention_chunk.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return _outputs(q, v, False)[0]


def _outputs(q: Tensor, v: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    stats = (q.shape[1], q.shape[0]) if save else (0,)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    return out, q.new_empty(stats, dtype=torch.float32)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None,
    meta: tuple[Tensor, Tensor] | None,
    past: Past | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, v, save)
    if not q.shape[0]:
        return out, lse
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    heads, h = q.shape[1:]
    groups, e = v.shape[1:]
    h_block, e_block = width_block(h), width_block(e)
    rows, keys, options = forward_blocks(h_block, e_block, q.dtype, q.device)
    begins = None if past is None else past.lengths
    items = query_items(segments.lengths, begins, rows, window, q.device)
    meta_k, meta_v, meta_strides, m_places = meta_arguments(meta)
    past_k, past_v, places, past_strides, p_places = _past_arguments(past, q.dtype)
    launch(
        _forward_kernel, (items.shape[0] * heads,),
        q, k, v, out, lse, meta_k, meta_v, past_k, past_v, places, items,
        *strides(q, k, v), *meta_strides, *past_strides,
        q.shape[0], m_places, p_places, window or 0, h**-0.5 * LOG2E,
        HEADS=heads, SHARE=heads // groups, h=h, e=e, h_block=h_block, e_block=e_block,
        META=meta is not None, PAST=past is not None, WINDOW=window is not None, SAVE=save,
        ROWS=rows, KEYS=keys, PRECISION="ieee", **options,
    )  # fmt: skip
    return out, lse


def forward_blocks(
    h_block: int, e_block: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, dict[str, int]]:
    """(rows, keys, launch options). Registers to spare for another program on a multiprocessor
    are worth more than larger blocks: while one makes a softmax, another feeds the tensor cores."""
    if dtype == torch.float32:
        return 32, 32, {"num_warps": 4, "num_stages": 1}
    if h_block + e_block > 256 or not hopper(device):
        return 64, 32, {"num_warps": 8, "num_stages": 2}
    if e_block == 128 and h_block < e_block:
        return 128, 64, {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    return 64, 64, {"num_warps": 4, "num_stages": 3}


@lru_cache
def hopper(device: torch.device) -> bool:
    """Whether blocks that suit a Hopper GPU fit: others have less shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def width_block(width: int) -> int:
    return max(16, next_power_of_2(width))


def strides(*tensors: Tensor) -> list[int]:
    """Of all dimensions but the last."""
    return [step for x in tensors for step in x.stride()[:-1]]


def meta_arguments(
    meta: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, list[int], int]:
    """(keys, values, their strides, how many)."""
    if meta is None:
        return None, None, [0] * 4, 0
    k, v = dense_last(meta[0]), dense_last(meta[1])
    return k, v, strides(k, v), k.shape[0]


def _past_arguments(
    past: Past | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[int], int]:
    """(keys, values, positions, their strides, places)."""
    if past is None:
        return None, None, None, [0] * 7, 0
    k, v = dense_last(past.k.to(dtype)), dense_last(past.v.to(dtype))
    positions = dense_last(past.positions)
    return k, v, positions, [*strides(k, v), positions.stride(0)], k.shape[2]


# Tables cross to the device once for all layers and steps of one batch shape (see segments.py).
@table
def query_items(
    lengths: tuple[int, ...],
    begins: tuple[int, ...] | None,
    block: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(items, 5) int32: start and length of a segment, first row of a block of its queries, text
    position of its row 0, its number. Blocks with most keys come first: what is left to the end
    is short."""
    items = []
    for index, (start, length) in enumerate(Segments(lengths)):
        begin = begins[index] if begins else 0
        items += [(start, length, row, begin, index) for row in range(0, length, block)]
    items.sort(key=lambda item: -min(item[2], item[2] if window is None else window))
    return torch.tensor(items, dtype=torch.int32).to(device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.window, meta_k, meta_v, _ = inputs
    ctx.set_materialize_grads(False)  # nobody derives by the log-sum-exp
    ctx.save_for_backward(q, k, v, meta_k, meta_v, *output)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, meta_k, meta_v, out, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    dq, dk, dv, dmk, dmv = _attention_backward(
        grad, q, k, v, out, lse, ctx.lengths, ctx.window, meta_k, meta_v
    )
    meta = (None, None) if meta_k is None else (dmk, dmv)
    return dq, dk, dv, None, None, *meta, None


_attention.register_autograd(_backward, setup_context=_setup)


@operator("attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    window: int | None,
    meta_k: Tensor | None,
    meta_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, meta_k and meta_v (the last two without elements if there is none)."""
    from hymba.ops.attention_backward_triton import backward

    meta = None if meta_k is None or meta_v is None else (meta_k, meta_v)
    return backward(grad, q, k, v, out, lse, Segments(tuple(lengths)), window, meta)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    window: int | None,
    meta_k: Tensor | None,
    meta_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        k.new_empty(none if meta_k is None else meta_k.shape),
        v.new_empty(none if meta_v is None else meta_v.shape),
    )
