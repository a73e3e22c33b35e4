"""How alike the keys and values of two layers are: why neighbours can share one K/V.

Two measures over the tokens of all texts, of layers that have K/V of their own:

    cosine   of the same token's key (value) in the same head, mean over both. Layers that say the
             same in other words (another basis of the head) get 0, so it is a lower bound.
    CKA      linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414):
             |X'Y|^2 / (|X'X| |Y'Y|) of centred (tokens, G h) matrices. It asks whether two layers
             tell tokens apart in the same way, whatever the basis. 1 the same, and few tokens with
             many channels make it large by chance: "chance" is what shuffled tokens get.

Keys are turned back from their rotation first, or CKA would compare positions. The cosine does not
notice: both layers turn a token's key alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba.eval.probe.walk import Seen
from hymba.model.layers import apply_rope

SEED = 0


class KeysValues:
    """K/V of each layer that owns them, text by text; text rows alone."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, list[Tensor]]] = {}

    def add(self, seen: Seen, rope: tuple[Tensor, Tensor], meta: int) -> None:
        if not seen.layer.owns_kv or seen.k is None or seen.v is None:
            return
        cos, sin = rope
        k = apply_rope(seen.k, (cos, -sin))  # a turn the other way
        store = self.found.setdefault(seen.number, {"k": [], "v": []})
        store["k"].append(k[meta:].float().cpu())
        store["v"].append(seen.v[meta:].float().cpu())

    def result(self) -> dict[str, Any]:
        """Tables by pairs of owners, and the list of neighbours."""
        owners = sorted(self.found)
        tables: dict[str, Any] = {"owners": owners}
        for kind in ("k", "v"):
            all_rows = {i: torch.cat(self.found[i][kind]) for i in owners}
            flat = {i: x.flatten(1) for i, x in all_rows.items()}
            tables[kind] = {
                "cka": [[cka(flat[a], flat[b]) for b in owners] for a in owners],
                "cosine": [[cosine(all_rows[a], all_rows[b]) for b in owners] for a in owners],
                "chance": [
                    cka(flat[a], _shuffled(flat[b]))
                    for a, b in zip(owners[:-1], owners[1:], strict=True)
                ],
            }
        return tables


def cka(x: Tensor, y: Tensor) -> float:
    """x (N, p), y (N, q)."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    size = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).norm().square() / size.clamp(min=1e-30))


def cosine(x: Tensor, y: Tensor) -> float | None:
    """x, y (N, G, width); None where widths differ (a hybrid layer beside one of attention)."""
    if x.shape != y.shape:
        return None
    return float(torch.cosine_similarity(x, y, dim=-1).mean())


def _shuffled(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))]
