"""A packed model, its twin of the same weights made wide, and stores that hold the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.cache import held
from hymba.config import KV_BLOCK, Config
from hymba.engine.store import Store
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.packed import make_room, packed_tiles, plan
from hymba.ops.packed import dequantize
from hymba.schemes import SCHEMES

TOKENS = 600  # places of a sequence: pages of 256 have two borders
Lively = Callable[..., LanguageModel]


class Pair(NamedTuple):
    packed: LanguageModel
    wide: LanguageModel  # plain Linear and Embedding modules


def pair(lively: Lively, config: Config, scheme: str, but: Sequence[str] = ()) -> Pair:
    """but: names of modules that are not packed, by their last word."""
    packed, wide = lively(config), lively(config)
    schemes = {
        name: each
        for name, each in plan(packed, SCHEMES[scheme]).items()
        if name.rpartition(".")[2] not in but
    }
    weights = {name: packed.get_submodule(name).weight.detach() for name in schemes}
    make_room(packed, schemes, config.tie_embeddings)
    for name, each in schemes.items():
        module = packed.get_submodule(name)
        module.tiles.data.copy_(packed_tiles(name, weights[name], each))
        with torch.no_grad():
            wide.get_submodule(name).weight.copy_(dequantize(module.packed))
    return Pair(packed.eval(), wide)


@torch.no_grad()
def store_for(model: LanguageModel, slots: int, kv: torch.dtype = torch.float32) -> Store:
    """Every slot has its pages, in no order; what nobody has written is NaN."""
    each = -(-TOKENS // KV_BLOCK)
    like = model.decoder.final_norm.weight.detach()
    meta, narrow = model.decoder.meta_states(), None if kv == torch.float32 else kv
    store = Store(model.config, slots, slots * each, TOKENS, meta, like, kv_dtype=narrow)
    for x in (*store.rings, *store.paged):
        x.fill_(float("nan"))
    for state, start in zip(store.states, store.starts, strict=True):
        state[:] = start[:, None]
    pages = torch.randperm(slots * each, generator=torch.Generator().manual_seed(1)).tolist()
    places = [(slot, at) for slot in range(slots) for at in range(each)]
    store.set_pages([(slot, at, page) for (slot, at), page in zip(places, pages, strict=True)])
    return store


def copy_store(source: Store, target: Store) -> None:
    tensors = ((x.rings, x.paged, x.states, [x.table]) for x in (source, target))
    for kinds in zip(*tensors, strict=True):
        for x, y in zip(*kinds, strict=True):
            y.copy_(x)
    target.lengths = list(source.lengths)


@torch.no_grad()
def prefill(model: LanguageModel, store: Store, lengths: Sequence[int]) -> None:
    """Sequences of so many tokens in slots 0, 1, ..."""
    rows = torch.randint(0, model.config.vocab_size, (sum(lengths),))
    slots = [slot for slot, length in enumerate(lengths) if length]
    counts = [length for length in lengths if length]
    if slots:
        model(rows, Batch.of(counts, [0] * len(slots), slots), store)


@torch.no_grad()
def torch_step(model: LanguageModel, store: Store, ids: Tensor, slots: Sequence[int]) -> Tensor:
    """The twin: logits (S, V)."""
    at, lengths = torch.tensor(slots), torch.tensor([store.lengths[slot] for slot in slots])
    store.look_at(int(lengths.max()) + 1)
    logits = model.step(ids, lengths, held(store, at, lengths))
    store.end_step(slots)
    return logits


def off(got: Tensor, want: Tensor) -> float:
    """How far apart, as a share of the length; NaN of both sides at one place is no difference."""
    assert torch.equal(got.isnan(), want.isnan())
    got, want = (x.nan_to_num(0).double() for x in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-9))
