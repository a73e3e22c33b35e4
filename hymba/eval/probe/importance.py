"""How much the loss grows when one part is taken away: a layer's attention, its SSM, or one head.

Taken away means: what the part adds behind the norms is 0, for text and meta rows alike, and
everything else stays as it is (another part's norm and the half of the mean too). A layer goes on
with its other branch, its MLP and the residual. A head of the SSM is the group of channels that
stands beside an attention head in the fusion: Mamba-1 has none of its own.

Only layers from the one that is changed on are computed again, over all texts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hymba.config import Config
from hymba.eval.probe.walk import Switch, start, through
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Left

MOST_HEADS = 256  # parts that are tried by default: more than so many heads take too long


class Part(NamedTuple):
    layer: int
    branch: str
    head: int | None  # None: all heads of the branch

    def switch(self, width: int, heads: int) -> Switch:
        factors = torch.ones(heads, width // heads)
        factors[slice(None) if self.head is None else self.head] = 0
        return {self.branch: factors.flatten()}


def branches(config: Config) -> Iterator[Part]:
    for index, layer in enumerate(config.layers):
        if layer.attention:
            yield Part(index, "attention", None)
        if layer.ssm:
            yield Part(index, "ssm", None)


def single_heads(config: Config) -> Iterator[Part]:
    for part in branches(config):
        for head in range(heads_of(config, part.branch)):
            yield part._replace(head=head)


def heads_of(config: Config, branch: str) -> int:
    """How many parts a branch has; a plan without attention names no heads (1)."""
    hybrid = any(layer.attention for layer in config.layers)
    return config.num_heads if hybrid or branch == "attention" else 1


def importance(
    model: LanguageModel,
    texts: dict[str, list[int]],
    parts: list[Part],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Loss of each text, whole and without each part, in nats a token."""
    trial = _Trial(model, list(texts.values()))
    whole = trial.loss(None)
    rows = []
    for part in parts:
        without = trial.loss(part)
        rows.append(
            part._asdict()
            | {"change": without[0] - whole[0]}
            | {
                "change_by_text": _named(
                    texts, [a - b for a, b in zip(without[1], whole[1], strict=True)]
                )
            }
        )
        tick()
    return {"loss": whole[0], "loss_by_text": _named(texts, whole[1]), "parts": rows}  # fmt: skip


def _named(texts: dict[str, list[int]], values: list[float]) -> dict[str, float]:
    return dict(zip(texts, values, strict=True))


class _Trial:
    """All texts as one batch; what enters each layer is kept."""

    def __init__(self, model: LanguageModel, texts: list[list[int]]):
        self.model, self.texts = model, texts
        self.xs: list[Tensor] = []
        self.lefts: list[Left] = []
        with torch.no_grad():
            x, self.road = start(model, texts)
            for index in range(model.config.num_layers):
                self.xs.append(x)
                seen, left = through(model, index, x, self.road, self.lefts)
                self.lefts.append(left)
                x = seen.x
            self.xs.append(x)

    @torch.no_grad()
    def loss(self, part: Part | None) -> tuple[float, list[float]]:
        """Nats a token over all texts, and of each."""
        x = self.xs[-1] if part is None else self._without(part)
        hidden = self.model.decoder.final_norm(x[self.road.batch.meta :])
        sums, counts, at = [], [], 0
        for text in self.texts:
            labels = torch.tensor(text[1:], device=hidden.device)
            rows = hidden[at : at + len(labels)]
            sums.append(float(self.model.loss(rows, labels, reduction="sum")))
            counts.append(len(labels))
            at += len(text)
        return sum(sums) / sum(counts), [a / b for a, b in zip(sums, counts, strict=True)]

    def _without(self, part: Part) -> Tensor:
        config, x = self.model.config, self.xs[part.layer]
        lefts = self.lefts[: part.layer]
        for index in range(part.layer, config.num_layers):
            switch = None
            if index == part.layer:
                layer = config.layers[index]
                width = config.inner_size if layer.ssm else config.hidden_size
                found = part.switch(width, heads_of(config, part.branch))
                switch = {name: factors.to(x) for name, factors in found.items()}
            seen, left = through(self.model, index, x, self.road, lefts, switch)
            lefts.append(left)
            x = seen.x
        return x
