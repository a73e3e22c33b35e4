"""Attention's weights, which the model's ops never write down: softmax(q k^T / sqrt(h) + mask).

Rows are one text's, meta tokens in front. `weights @ values` is the branch's output, which
tests/eval/test_probe_walk.py checks for every plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.eval.probe.walk import Seen
from hymba.ops.attention import visible

ELEMENTS = 1 << 21  # weights (or products) made at a time: 8 MiB in float32


class Rows(NamedTuple):
    """Some queries' weights over all keys before them and 0 behind: a picture in strips."""

    first: int  # row of the first query, meta tokens counted
    weights: Tensor  # (heads, T, R), each row adds up to 1


def strips(total: int, each: int) -> Iterator[tuple[int, int]]:
    """(first, end) of pieces of `total` rows, of which one has `each` elements."""
    step = max(1, ELEMENTS // each)
    for first in range(0, total, step):
        yield first, min(first + step, total)


def mask(first: int, end: int, total: int, window: int | None, meta: int) -> Tensor:
    """(end - first, total): which keys each query sees; meta keys are never out of sight."""
    place = torch.arange(total)
    seen = visible(place[first:end], place, window)
    return seen | ((place < meta) & (place <= place[first:end, None]))


def even_rows(total: int, window: int | None, meta: int) -> Iterator[Rows]:
    """What attention would be that is spread evenly over all it sees: (1, T, R)."""
    for first, end in strips(total, total):
        seen = mask(first, end, total, window, meta).float()[None]
        yield Rows(first, seen / seen.sum(-1, keepdim=True))


@torch.no_grad()
def attention_rows(seen: Seen, meta: int) -> Iterator[Rows]:
    """The weights (H, T, R) of one layer, strip by strip, in float32 or wider."""
    assert seen.q is not None and seen.k is not None
    total, heads, width = seen.q.shape
    wide = torch.promote_types(seen.q.dtype, torch.float32)
    k = seen.k.to(wide).repeat_interleave(heads // seen.k.shape[1], dim=1)
    for first, end in strips(total, heads * total):
        scores = torch.einsum("thd,phd->htp", seen.q[first:end].to(wide), k) * width**-0.5
        hidden = ~mask(first, end, total, seen.layer.window, meta).to(scores.device)
        yield Rows(first, scores.masked_fill(hidden, float("-inf")).softmax(-1))
