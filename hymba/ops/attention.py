"""Attention under Hymba's mask, over segments, with grouped heads.

    key k is seen by query q  iff  k <= q  and  (no window  or  q - k <= window  or  k is meta)

           meta    text              W = 2: a row sees 3 text keys with itself, and all meta keys
    q 0    # #     #
    q 1    # #     # #
    q 2    # #     # # #
    q 3    # #     . # # #
    q 4    # #     . . # # #

Keys come from up to three places: the meta tokens (one copy for every sequence), the past in a
cache (any order: a ring is not unrolled, its positions say what is where), and the new rows.
Letters: N rows, S segments, H query heads, G key/value heads, h and e widths of a key and of a
value head, M meta tokens, P places in the cache, T rows of a segment. Softmax in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.segments import Segments

QUERY_BLOCK = 256  # rows that share one slice of keys in a window layer


class Meta(NamedTuple):
    """Keys (M, G, h) and values (M, G, e) that every row sees."""

    k: Tensor
    v: Tensor


class Past(NamedTuple):
    """What a cache holds of each segment's sequence."""

    k: Tensor  # (S, G, P, h), after rotary embedding
    v: Tensor  # (S, G, P, e)
    positions: Tensor  # (S, P) text position in each place, -1 where there is none
    lengths: tuple[int, ...]  # text tokens before the new rows of each segment


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """q (N, H, h), k (N, G, h), v (N, G, e) -> (N, H, e): one segment at a time, mask and all."""
    outs = []
    for index, (start, length) in enumerate(segments):
        rows = slice(start, start + length)
        begin = past.lengths[index] if past is not None else 0
        positions = torch.arange(begin, begin + length, device=q.device)
        keys, values, places = [k[rows]], [v[rows]], [positions]
        if past is not None:
            keys.insert(0, past.k[index].transpose(0, 1))
            values.insert(0, past.v[index].transpose(0, 1))
            places.insert(0, past.positions[index])
        seen = visible(positions, torch.cat(places), window)  # (T, P + T)
        if meta is not None:
            keys.insert(0, meta.k)
            values.insert(0, meta.v)
            seen = F.pad(seen, (meta.k.shape[0], 0), value=True)
        outs.append(_dense(q[rows], torch.cat(keys), torch.cat(values), seen))
    return torch.cat(outs)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """The mask: positions (..., T), (..., P) -> bool (..., T, P); a key under 0 is no key."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = (distance >= 0) & (keys >= 0)[..., None, :]
    return seen if window is None else seen & (distance <= window)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q (T, H, h), k (P, G, h), v (P, G, e), seen (T, P) -> (T, H, e)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,phd->htp", q.to(wide), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htp,phe->the", weights, v).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """As `attention_reference`; segments of equal length go together, and a window layer costs
    rows x (window + meta), not rows x rows."""
    if segments.uniform:
        return _equal(q, k, v, segments.uniform, window, meta, past)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    parts = []
    for length, members in _by_length(segments).items():
        rows = _rows(segments, members, q.device)
        some = None if past is None else _take(past, members)
        parts.append((rows, _equal(q[rows], k[rows], v[rows], length, window, meta, some)))
    rows = torch.cat([rows for rows, _ in parts])
    return out.index_copy(0, rows, torch.cat([part for _, part in parts]))


def _by_length(segments: Segments) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, length in enumerate(segments.lengths):
        found.setdefault(length, []).append(index)
    return found


def _rows(segments: Segments, members: list[int], device: torch.device) -> Tensor:
    spans = [range(segments.starts[i], segments.starts[i] + segments.lengths[i]) for i in members]
    return torch.tensor([row for span in spans for row in span], device=device)


def _take(past: Past, members: list[int]) -> Past:
    index = torch.tensor(members, device=past.k.device)
    lengths = tuple(past.lengths[i] for i in members)
    return Past(past.k[index], past.v[index], past.positions[index], lengths)


def _equal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    window: int | None,
    meta: Meta | None,
    past: Past | None,
) -> Tensor:
    """Segments of one length T: rows become (s, G, ..., T, width)."""
    s, groups = q.shape[0] // length, k.shape[1]
    q = q.unflatten(0, (s, length)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    k, v = (x.unflatten(0, (s, length)).transpose(1, 2) for x in (k, v))
    # q (s, G, H/G, T, h); k (s, G, T, h); v (s, G, T, e)
    if past is None:
        blocks = _blocks_fused(q, k, v, window, meta)
    else:
        blocks = _blocks_split(q, k, v, window, meta, past)
    out = torch.cat(list(blocks), dim=3)  # (s, G, H/G, T, e)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _query_blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first, end, first key) of each block of queries; one block where there is no window."""
    block = length if window is None else max(QUERY_BLOCK, window // 2)
    for first in range(0, length, block):
        yield first, min(first + block, length), 0 if window is None else max(0, first - window)


def _blocks_fused(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, meta: Meta | None
) -> Iterator[Tensor]:
    """No cache: torch's fused attention, block by block."""
    s, groups, per_group = q.shape[:3]
    positions = torch.arange(q.shape[3], device=q.device)
    for first, end, key in _query_blocks(q.shape[3], window):
        keys, values = k[:, :, key:end], v[:, :, key:end]
        seen = visible(positions[first:end], positions[key:end], window)
        if meta is not None:
            keys = torch.cat([_shared(meta.k, s), keys], dim=2)
            values = torch.cat([_shared(meta.v, s), values], dim=2)
            seen = F.pad(seen, (meta.k.shape[0], 0), value=True)
        # The query heads of a group read the same keys: they are more rows, not copies of keys.
        block = q[:, :, :, first:end].flatten(2, 3)  # (s, G, H/G * T, h)
        out = _fused(block, keys, values, seen.repeat(per_group, 1))
        yield out.unflatten(2, (per_group, end - first))


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Values are wider than keys in a hybrid layer; torch's fused kernels want one width, and
    zeros add nothing to a dot product."""
    scale, missing = q.shape[-1] ** -0.5, v.shape[-1] - q.shape[-1]
    if missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def _shared(x: Tensor, s: int) -> Tensor:
    """(M, G, width) -> (s, G, M, width), not copied."""
    return x.transpose(0, 1).expand(s, -1, -1, -1)


def _blocks_split(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, meta: Meta | None, past: Past
) -> Iterator[Tensor]:
    """With a cache: scores of each source apart, one softmax, values of each source apart, so
    that no key or value is copied and the meta keys are read once for all rows."""
    begin = torch.tensor(past.lengths, device=q.device)
    positions = begin[:, None] + torch.arange(q.shape[3], device=q.device)  # (s, T)
    for first, end, key in _query_blocks(q.shape[3], window):
        block, here = q[:, :, :, first:end], positions[:, first:end]
        places = past.positions, positions[:, key:end]
        seen = [visible(here, place, window) for place in places]
        keys = [past.k, k[:, :, key:end]]
        values = [past.v, v[:, :, key:end]]
        if meta is not None:
            keys.insert(0, meta.k.transpose(0, 1)[None])
            values.insert(0, meta.v.transpose(0, 1)[None])
            seen.insert(0, seen[0].new_ones(1, end - first, meta.k.shape[0]))
        yield _split_softmax(block, keys, values, seen)


def _split_softmax(
    q: Tensor, keys: list[Tensor], values: list[Tensor], seen: list[Tensor]
) -> Tensor:
    """q (s, G, r, T, h), each source (s or 1, G, P, width) and (s or 1, T, P)."""
    wide, scale = torch.promote_types(q.dtype, torch.float32), q.shape[-1] ** -0.5
    scores = []
    for k, mask in zip(keys, seen, strict=True):
        part = _products(q.to(wide), k.to(wide).mT) * scale  # (s, G, r, T, P)
        scores.append(part.masked_fill(~mask[:, None, None], float("-inf")))
    weights = torch.cat(scores, dim=-1).softmax(-1)
    shares = weights.split([k.shape[2] for k in keys], dim=-1)
    parts = [_products(share, v.to(wide)) for share, v in zip(shares, values, strict=True)]
    return sum(parts[1:], start=parts[0]).to(q.dtype)


def _products(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (s, G, r, T, a) @ matrix (s or 1, G, a, b): one matrix product a group of heads."""
    s, groups, r, t, _ = rows.shape
    if matrix.shape[0] == 1 and s > 1:  # shared by all sequences: all their rows at once
        flat = rows.transpose(0, 1).flatten(1, 3)  # (G, s r T, a)
        return (flat @ matrix[0]).unflatten(1, (s, r, t)).transpose(0, 1)
    return (rows.flatten(2, 3) @ matrix).unflatten(2, (r, t))
