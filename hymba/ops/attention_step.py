"""Attention of a decode step over pages: one new token a row, its key and value already stored.

    table[s]   7  2  9  ?         counts[s] = 2 P + 3
               |  |  '- places 2P .. 2P + 2
               |  '---- places  P .. 2P - 1
               '------- places  0 ..  P - 1    of row s; it sees these, and all meta keys

A store is cut in pages of P places; place j of row s is place j % P of page table[s, j // P]. A
cache with one page a slot is the case of a table with one column. There is no mask by position: a
row sees its first `counts` places, whatever lies there (a ring, once full, in any order).
`table` and `counts` are device tensors, so that a captured CUDA graph serves other rows later;
`most`, a number of the host no smaller than any count, says how much work to be ready for. No
gradients: this is decode. A row that sees nothing gives zeros.

Letters: S rows, H query heads, G key/value heads, h and e widths of a key and of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.ops.attention import Meta


@torch.no_grad()
def attention_step_reference(
    q: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
    meta: Meta | None = None,
) -> Tensor:
    """q (S, H, h), store_k (pages, G, P, h), store_v (pages, G, P, e), table (S, T) and counts (S,)
    int32 -> (S, H, e): row by row, place by place."""
    wide, groups, size = torch.promote_types(q.dtype, torch.float32), *store_k.shape[1:3]
    out = q.new_zeros(*q.shape[:2], store_v.shape[-1])
    for row, count in enumerate(counts.tolist()):
        at = [(int(table[row, place // size]), place % size) for place in range(count)]
        keys = [store_k[page, :, place] for page, place in at]
        values = [store_v[page, :, place] for page, place in at]
        if meta is not None:
            keys, values = [*meta.k, *keys], [*meta.v, *values]
        if keys:
            k, v = (
                torch.stack(x).repeat_interleave(q.shape[1] // groups, dim=1).to(wide)
                for x in (keys, values)
            )  # (places, H, width)
            scores = torch.einsum("hd,phd->hp", q[row].to(wide), k) * q.shape[-1] ** -0.5
            out[row] = torch.einsum("hp,phe->he", scores.softmax(-1), v).to(q.dtype)
    return out


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
    """As `attention_step_reference`. On a CPU row by row, each page where it lies: to gather the
    pages of all rows first took 1.5 to 8 times as long. On a device the host would have to wait for
    the counts, so there all rows are gathered."""
    if torch.is_autocast_enabled(q.device.type):  # dtypes are seen to here
        with torch.autocast(q.device.type, enabled=False):
            return attention_step(q, store_k, store_v, table, counts, most, meta)
    by_row = q.device.type == "cpu"
    wide, groups = torch.promote_types(q.dtype, torch.float32), store_k.shape[1]
    rows = q.to(wide).unflatten(1, (groups, -1)) * q.shape[-1] ** -0.5  # (S, G, H/G, h)
    if meta is None:
        meta = Meta(
            store_k.new_empty(0, *store_k.shape[1::2]), store_v.new_empty(0, *store_v.shape[1::2])
        )
    meta_k, meta_v = (x.to(wide).transpose(0, 1) for x in meta)  # (G, M, width)
    flat = rows.transpose(0, 1).flatten(1, 2)  # (G, S * H/G, h): einsum would take thrice the time
    scores = (flat @ meta_k.mT).unflatten(1, (len(rows), rows.shape[2])).transpose(0, 1)
    form = _by_row if by_row else _gathered
    return form(rows, scores, meta_v, store_k, store_v, table, counts, most).flatten(1, 2).to(q)


def _by_row(
    rows: Tensor,
    meta_scores: Tensor,
    meta_v: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
) -> Tensor:
    """rows (S, G, H/G, h), scores of the meta keys (S, G, H/G, M) -> (S, G, H/G, e).

    Most of the time is the host's, call by call, so there are few calls, and short ones."""
    size, outs = store_k.shape[2], []
    each = zip(rows.unbind(), meta_scores.unbind(), counts.tolist(), table.tolist(), strict=True)
    for row, of_meta, count, pages in each:
        scores, values = [of_meta], []
        for i, page in enumerate(pages[: -(-count // size)]):
            places = min(size, count - i * size)
            scores.append(torch.bmm(row, store_k[page, :, :places].to(row.dtype).mT))
            values.append(store_v[page, :, :places])
        shares = torch.cat(scores, dim=-1).softmax(-1).split([x.shape[-1] for x in scores], dim=-1)
        out = torch.bmm(shares[0], meta_v)
        for share, v in zip(shares[1:], values, strict=True):
            out = out.baddbmm_(share, v.to(row.dtype))
        outs.append(out)
    return torch.stack(outs) if outs else rows.new_zeros(*rows.shape[:3], store_v.shape[-1])


def _gathered(
    rows: Tensor,
    meta_scores: Tensor,
    meta_v: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
) -> Tensor:
    """As `_by_row`, all rows at once."""
    pages, _, size, _ = store_k.shape
    index = table[:, : -(-most // size)].long().clamp(0, pages - 1)  # what is not needed: anything
    k, v = (
        x[index].transpose(1, 2).flatten(2, 3)[:, :, :most].to(rows) for x in (store_k, store_v)
    )
    there = torch.arange(most, device=rows.device) < counts[:, None]  # (S, most)
    scores = (rows @ k.mT).masked_fill(~there[:, None, None], float("-inf"))
    scores = torch.cat([meta_scores, scores], dim=-1)
    # Of a row that sees nothing the softmax is NaN.
    shares = scores.softmax(-1).masked_fill(scores == float("-inf"), 0)
    of_meta, of_text = shares.split([meta_v.shape[1], most], dim=-1)
    v = v.masked_fill(~there[:, None, :, None], 0)  # zero times NaN is no zero
    return torch.einsum("sgrm,gme->sgre", of_meta, meta_v) + of_text @ v
