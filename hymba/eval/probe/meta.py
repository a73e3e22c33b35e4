"""Which meta tokens fire for which text: where the weight goes that attention gives to them.

A meta token's firing in a text is the mean weight it gets, over heads, layers and rows; its share
is that over the sum of all meta tokens'. Two texts differ by the Jensen-Shannon distance of their
shares, in bits: 0 the same, 1 no meta token in common. Beside it stands what chance and place alone
do, the distance between the two halves of one text; so that the two compare, texts are compared
half by half as well, first with first and second with second.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hymba.eval.probe.share import entropy

TOP = 3  # meta tokens named for each text


def domains(firing: dict[str, Tensor]) -> dict[str, Any]:
    """{text: (2 halves, layers, M)} -> shares by text, their ratio to the mean text, distances."""
    names = list(firing)
    halves = {name: _share(x.mean(1)) for name, x in firing.items()}  # (2, M)
    shares = torch.stack([_share(firing[name].mean((0, 1))) for name in names])  # (texts, M)
    lift = (shares / shares.mean(0).clamp(min=1e-12)).clamp(min=1e-6).log2()
    pairs = list(combinations(range(len(names)), 2))
    return {
        "texts": names,
        "share": shares.tolist(),
        "log2_ratio_to_mean": lift.tolist(),
        "by_layer": {name: x.mean(0).tolist() for name, x in firing.items()},
        "top": {name: row.topk(min(TOP, len(row))).indices.tolist() for name, row in zip(
            names, lift, strict=True)},
        "distance_between_texts": [
            {"texts": [names[a], names[b]], "bits": _apart(halves[names[a]], halves[names[b]])}
            for a, b in pairs
        ],
        "distance_within_text": {name: divergence(*x) for name, x in halves.items()},
    }  # fmt: skip


def _apart(a: Tensor, b: Tensor) -> float:
    """a, b (2, M): mean over the halves."""
    return sum(divergence(p, q) for p, q in zip(a, b, strict=True)) / len(a)


def divergence(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon, in bits."""
    mean = entropy(((p + q) / 2)[None])[0]
    return max(0.0, float(mean - (entropy(p[None])[0] + entropy(q[None])[0]) / 2))


def _share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=1e-30)
