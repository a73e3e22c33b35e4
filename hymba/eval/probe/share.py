"""Where attention goes: the share of meta tokens, of the first token, of a token itself and of the
rest ("cross"); how spread it is (entropy); how far back it looks.

One pass over the weights of a layer's branch (attention.py, hidden.py) gives everything that the
other files make their tables of, so that no matrix is kept. Text rows from the second on count:
for the first, "first" and "self" are the same key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.eval.probe.attention import Rows

KINDS = ("meta", "first", "self", "cross")  # of keys, each key in one


class Reading(NamedTuple):
    """One branch of one layer over one text of N tokens behind M meta tokens. H heads, or channels
    in their place. Float64 on the CPU."""

    share: Tensor  # (H, 4) by KINDS, mean over rows
    entropy: Tensor  # (H,) bits, mean over rows
    firing: Tensor  # (2, H, M) mean weight of each meta token, in each half of the text
    distance: Tensor  # (H,) tokens back, weighted, mean over rows; a meta token counts as 0
    reach: Tensor  # (H,) the same of the last token alone (paper, equation 5)
    pattern: Tensor  # (H or 1, n, M + n) weights of the first n text rows, float32


def read(strips: Iterable[Rows], meta: int, shown: int, each_head: bool = False) -> Reading:
    """`shown` text rows go into the pattern, of each head or of their mean."""
    total = 0
    sums: dict[str, Tensor] = {}
    pieces, firing, reach = [], None, None
    for strip in strips:
        first = max(0, meta - strip.first)  # meta rows are no text
        w = strip.weights[:, first:]
        if not w.shape[1]:
            continue
        rows = torch.arange(strip.first + first, strip.first + strip.weights.shape[1])
        text = rows - meta  # text position of each query
        pieces.append(_pattern(w[:, text < shown], meta + shown, each_head))
        half = _halves(w, text, meta)
        firing = half if firing is None else firing + half
        back = (rows[:, None] - torch.arange(w.shape[-1])).clamp(min=0)
        back[:, :meta] = 0
        far = torch.einsum("htp,tp->ht", w.double(), back.to(w.device, torch.float64))
        reach = far[:, -1].cpu()
        counted = text > 0
        total += int(counted.sum())
        found = {"share": kinds(w, rows, meta), "entropy": entropy(w), "distance": far}
        for name, x in found.items():
            part = x[:, counted.to(x.device)].double().sum(1).cpu()
            sums[name] = sums[name] + part if name in sums else part
    assert reach is not None and firing is not None
    means = {name: x / max(1, total) for name, x in sums.items()}
    return Reading(**means, firing=firing, reach=reach, pattern=torch.cat(pieces, dim=1))


def kinds(w: Tensor, rows: Tensor, meta: int) -> Tensor:
    """w (H, T, R), rows (T) -> (H, T, 4); for text rows from the second on."""
    own = w.gather(-1, rows.to(w.device).view(1, -1, 1).expand(len(w), -1, 1))[..., 0]
    first, fore = w[..., meta], w[..., :meta].sum(-1)
    rest = (w.sum(-1) - own - first - fore).clamp(min=0)
    return torch.stack([fore, first, own, rest], dim=-1)


def entropy(w: Tensor) -> Tensor:
    """(H, T, R) -> (H, T) bits."""
    return torch.special.entr(w).sum(-1) / math.log(2)


def _halves(w: Tensor, text: Tensor, meta: int) -> Tensor:
    """What these rows add to the mean weight of each meta token in each half: (2, H, M)."""
    length = w.shape[-1] - meta
    middle = (length + 1) // 2
    parts = (w[:, text < middle], middle), (w[:, text >= middle], length - middle)
    return torch.stack([x[..., :meta].double().sum(1).cpu() / max(1, n) for x, n in parts])


def _pattern(w: Tensor, keys: int, each_head: bool) -> Tensor:
    w = w[..., :keys]
    return (w if each_head else w.mean(0, keepdim=True)).float().cpu()
