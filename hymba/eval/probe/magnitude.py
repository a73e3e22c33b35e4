"""How large the two branches' outputs are, before and behind the norms that make them comparable.

Root mean squares over text rows and channels. "behind" is what a branch adds to what the output
projection reads: norm, learned weight, half. A layer with one branch has no norm: they are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba.eval.probe.walk import Seen


class Magnitudes:
    """Squares of one layer's branches, added up over texts."""

    def __init__(self) -> None:
        self.squares: dict[str, dict[str, float]] = {}
        self.counts: dict[str, int] = {}
        self.weights: dict[str, float] = {}

    def add(self, seen: Seen, meta: int) -> None:
        for branch, out in seen.outs.items():
            found = self.squares.setdefault(branch, {"before": 0.0, "behind": 0.0})
            found["before"] += _squares(out[meta:])
            found["behind"] += _squares(seen.parts[branch][meta:])
            self.counts[branch] = self.counts.get(branch, 0) + out[meta:].numel()
        norms = {"attention": seen.mixer.attention_norm, "ssm": seen.mixer.ssm_norm}
        for branch, norm in norms.items():
            if norm is not None:
                self.weights[branch] = float(norm.weight.detach().abs().mean())

    def result(self) -> dict[str, Any]:
        return {
            branch: {
                **{k: (x / self.counts[branch]) ** 0.5 for k, x in found.items()},
                "norm_weight": self.weights.get(branch),
            }
            for branch, found in self.squares.items()
        }


def _squares(x: Tensor) -> float:
    return float(x.to(torch.float64).square().sum())
