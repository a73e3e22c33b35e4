"""A walk through the model, layer by layer, with what each layer saw and made laid open.

Hooks would miss what fused ops do, so the walk calls the parts of a layer itself, the model's own:
projections, `attend`, the SSM, the fusion, the MLP. tests/eval/test_probe_walk.py holds it to the
model's outputs bit for bit. Meta tokens' rows stand in front of the text, as they do while the
model trains, so that the text and what it finds in them is one picture.

    for seen in walk(model, [ids]):
        seen.q, seen.outs["attention"], seen.parts["ssm"]

`meta=False` is the same weights without their meta tokens: nobody has their keys to look at, and
convolution and scan begin from nothing. Positions stay (rotation knows only distances). It is not
a model that was trained without them.

R rows: M meta tokens, then N of the texts. Everything is without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hymba import ops
from hymba.cache import State
from hymba.config import Layer
from hymba.model.attention import attend
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Before, Block, HybridMixer, Left
from hymba.model.layers import apply_rope, rope_tables

Parts = dict[str, Tensor]  # {"attention": ..., "ssm": ...}, those a layer has
Switch = Mapping[str, Tensor]  # {branch: factors of its channels}


class Seen(NamedTuple):
    """One layer. Attention's tensors are None in a layer without, and the SSM's likewise."""

    number: int
    layer: Layer
    mixer: HybridMixer
    q: Tensor | None  # (R, H, h), rotated
    k: Tensor | None  # (R, G, h), rotated; another layer's where it is shared
    v: Tensor | None  # (R, G, e)
    u: Tensor | None  # (R, E) before the convolution
    gate: Tensor | None  # (R, E)
    outs: Parts  # (R, width) what each branch made
    parts: Parts  # (R, width) the same behind norms and fusion weights: their sum enters out_proj
    x: Tensor  # (R, D) what the layer leaves


class Road(NamedTuple):
    """What all layers of a walk are given."""

    batch: Batch
    rope: tuple[Tensor, Tensor]


def start(
    model: LanguageModel, texts: Sequence[Sequence[int]], meta: bool = True
) -> tuple[Tensor, Road]:
    """Rows (R, D) before the first layer, and the road."""
    decoder, count, device = model.decoder, model.config.meta_tokens, model.device
    batch = Batch.of([len(text) for text in texts], device=device)
    x = decoder.embed(torch.tensor([token for text in texts for token in text], device=device))
    positions = batch.positions + count
    if decoder.meta_tokens is not None and meta:
        x = torch.cat([decoder.meta_tokens().to(x.dtype), x])
        batch = batch.with_meta(count)
        positions = torch.cat([torch.arange(count, device=device), positions])
    return x, Road(batch, rope_tables(positions, model.config.head_dim, model.config.rope_base))


@torch.no_grad()
def walk(model: LanguageModel, texts: Sequence[Sequence[int]], meta: bool = True) -> Iterator[Seen]:
    """Layer after layer; only one is held at a time, but for the K/V that others read."""
    x, road = start(model, texts, meta)
    lefts: list[Left] = []
    for index in range(model.config.num_layers):
        seen, left = through(model, index, x, road, lefts)
        lefts.append(left)
        x = seen.x
        yield seen


def through(
    model: LanguageModel,
    index: int,
    x: Tensor,
    road: Road,
    lefts: Sequence[Left],
    switch: Switch | None = None,
) -> tuple[Seen, Left]:
    """One layer over rows x; `lefts` of the layers before it. With a switch the channels of its
    branches are multiplied by factors, behind the norms, so that 0 takes a part away and leaves
    the others as they are."""
    block, layer = model.decoder.layers[index], model.config.layers[index]
    assert isinstance(block, Block)
    mixer, batch, meta = block.mixer, road.batch, road.batch.meta
    split = mixer.in_proj(block.input_norm(x)).split(list(mixer.sizes.values()), dim=-1)
    rows = dict(zip(mixer.sizes, split, strict=True))
    outs: Parts = {}
    left, q, k, v = Left(State(), None), None, None, None
    if layer.attention:
        q = apply_rope(rows["q"].unflatten(-1, (-1, mixer.head_dim)), road.rope)
        if layer.kv_from is None:
            left = mixer.keys_and_values(rows, road.rope, batch, Before())
        else:
            left = lefts[layer.kv_from]
        outs["attention"] = attend(q, left.text, left.meta, layer, batch, None)
        k, v = _joined(left, "k", meta), _joined(left, "v", meta)
    if mixer.ssm is not None:
        u, gate = rows["u"], rows["gate"]
        outs["ssm"], left = mixer.summarise(u, gate, batch, Before(), left)
    parts = behind_norms(mixer, outs)
    if switch is None:
        fused = mixer.fuse(list(outs.values()))
    else:
        fused = together(mixer, {name: x * switch.get(name, 1) for name, x in parts.items()})
    x = block.add(x, mixer.out_proj(fused))
    seen = Seen(
        index, layer, mixer, q, k, v, rows.get("u"), rows.get("gate"), outs, parts, x
    )  # fmt: skip
    return seen, left


def _joined(left: Left, name: str, meta: int) -> Tensor:
    """Keys or values of the meta rows and of the text, as one."""
    text = getattr(left.text, name)
    return torch.cat([getattr(left.meta, name), text]) if meta else text


def behind_norms(mixer: HybridMixer, outs: Parts) -> Parts:
    """What each branch adds to what out_proj reads: (a, s) -> (a', s') with the fusion's norms,
    signs, scalars and half in them. One branch alone is what it is."""
    if mixer.attention_norm is None or mixer.ssm_norm is None:
        return dict(outs)
    weights, half = mixer.weights_of_mean(), 0.5
    if weights is None:  # "concat": side by side, no half
        weights, half = (mixer.attention_norm.weight, mixer.ssm_norm.weight), 1.0
    pairs = zip(outs.items(), weights, strict=True)
    return {name: ops.rms_norm(x, w, mixer.ssm_norm.eps) * half for (name, x), w in pairs}


def together(mixer: HybridMixer, parts: Parts) -> Tensor:
    """What out_proj reads, made of what each branch adds."""
    branches = list(parts.values())
    if len(branches) == 1:
        return branches[0]
    return torch.cat(branches, dim=-1) if mixer.fusion == "concat" else branches[0] + branches[1]
