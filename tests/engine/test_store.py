"""The store by slot and page holds what a plain cache holds, wherever its pages lie, and a snapshot
brings a sequence back bit for bit. What nobody owns is NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.config import KV_BLOCK, Config
from hymba.engine.store import Snapshot, Store
from hymba.model.accounting import cache_bytes
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
SLOTS, PAGES = 3, 6
OWN = {0: [4, 1], 2: [2, 5]}  # pages by slot, in no order


@pytest.fixture(params=PLANS)
def model(
    request: Any, tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> LanguageModel:
    return lively(tiny(request.param))


def new_store(model: LanguageModel) -> Store:
    with torch.no_grad():
        meta = model.decoder.meta_states()
    like = model.decoder.final_norm.weight.detach()
    return Store(model.config, SLOTS, PAGES, 512, meta, like)


def begin(store: Store, slot: int, pages: list[int]) -> None:
    """As the engine does it."""
    store.clear_pages(pages)
    store.set_pages(store.blank(slot, len(pages)))
    store.set_pages([(slot, at, page) for at, page in enumerate(pages)])
    store.reset(slot)


@torch.no_grad()
def go_on(model: LanguageModel, cache: Any, slots: list[int], texts: list[Tensor]) -> Tensor:
    """Logits of every new token."""
    counts = [len(one) for one in texts]
    batch = Batch.of(counts, [cache.lengths[slot] for slot in slots], slots)
    return model.logits(model(torch.cat(texts), batch, cache))


def everything(store: Store) -> list[Tensor]:
    return [*store.rings, *store.paged, *store.states]


def spoil(store: Store, slot: int, pages: list[int]) -> None:
    """As others would leave a slot and pages, at the worst."""
    for x in (*store.rings, *store.states):
        x[:, slot] = float("nan")
    for x in store.paged:
        x[:, pages] = float("nan")


def test_as_a_plain_cache(model: LanguageModel, text: Callable[..., Any]) -> None:
    """Chunks and steps of two sequences, one of them through the end of a page."""
    store, cache = new_store(model), model.new_cache(SLOTS)
    for slot, pages in OWN.items():
        begin(store, slot, pages)
    for counts in ([250, 3], [4, 1], [1, 1], [1, 1], [1, 7], [1, 1], [30, 260], [1, 1]):
        texts = text(counts, seed=counts[0])
        got, want = (go_on(model, each, [0, 2], texts) for each in (store, cache))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # other orders of a sum
    assert store.lengths[:SLOTS] == cache.lengths


@pytest.mark.parametrize("length", [0, 1, 40, 256, 300])
def test_snapshots_are_exact(model: LanguageModel, text: Callable[..., Any], length: int) -> None:
    """Kept in the store or carried out, and brought back into another slot with other pages."""
    store = new_store(model)
    begin(store, 0, OWN[0])
    if length:
        go_on(model, store, [0], [text(length)])
    full, rest = divmod(length, KV_BLOCK)
    kept_pages = OWN[0][:full] + ([3] if rest else [])
    kept = store.keep(0, OWN[0], kept_pages)
    away = store.carry_out(0, OWN[0])
    assert kept.length == away.length == length and away.pages == []
    want = go_on(model, store, [0], [text(9, seed=1)])
    spoil(store, 0, OWN[0][full:])  # what was kept shares the full pages

    def again(snapshot: Snapshot, own: list[int]) -> Tensor:
        begin(store, 2, own[full:] if snapshot is kept else own)
        store.set_pages([(2, at, page) for at, page in enumerate(own)])
        store.bring_back(2, snapshot, own)
        assert store.lengths[2] == length
        found = go_on(model, store, [2], [text(9, seed=1)])
        spoil(store, 2, own[full:])
        return found

    assert torch.equal(again(kept, [*OWN[0][:full], *OWN[2][full:]]), want)
    assert torch.equal(again(kept, [*OWN[0][:full], *OWN[2][full:]]), want), "twice from one"
    assert torch.equal(again(away, OWN[2]), want)


def test_snapshots_are_small(model: LanguageModel, text: Callable[..., Any]) -> None:
    """No more than accounting says of so many tokens, and no views of all that there is."""
    store = new_store(model)
    begin(store, 0, OWN[0])
    go_on(model, store, [0], [text(20)])
    kept, away = store.keep(0, OWN[0], [3]), store.carry_out(0, OWN[0])
    found = cache_bytes(model.config, 20, kv_bytes=4, state_bytes=4)
    assert away.nbytes == found["total"]
    assert kept.nbytes == found["total"] - found["global_kv"]
    for x in (*kept.rings, *kept.states, *away.contents, *away.rings, *away.states):
        assert x.untyped_storage().nbytes() == x.nbytes


def test_nothing_else_is_touched(model: LanguageModel, text: Callable[..., Any]) -> None:
    """A sequence, its snapshot and its return leave other slots and pages as they are."""
    store = new_store(model)
    begin(store, 0, [4, 1])
    go_on(model, store, [0], [text(270)])
    others = [2, 5, 0, 3]
    before = [x.clone() for x in everything(store)]
    begin(store, 2, [2, 5])
    go_on(model, store, [2], [text(280)])
    go_on(model, store, [2], [text(1)])
    store.bring_back(2, store.carry_out(2, [2, 5]), [5, 0])
    store.keep(2, [5, 0], [5, 3])
    slotted = len(store.rings)
    for at, (x, old) in enumerate(zip(everything(store), before, strict=True)):
        if slotted <= at < slotted + len(store.paged):
            own = [page for page in range(x.shape[1]) if page not in others]
        else:
            own = [slot for slot in range(x.shape[1]) if slot != 2]
        torch.testing.assert_close(x[:, own], old[:, own], rtol=0, atol=0, equal_nan=True)


def test_bytes_are_counted_as_allocated(model: LanguageModel) -> None:
    """A slot and two pages more than asked for: a spare one of each, and a blank page."""
    store = new_store(model)
    found = cache_bytes(model.config, 512, kv_bytes=4, state_bytes=4)
    counted = store.nbytes()
    for kind in ("window_kv", "conv", "ssm"):
        assert counted[kind] == (SLOTS + 1) * found[kind]
    assert counted["global_kv"] == (PAGES + 2) * found["global_kv"] // 2
    assert counted["total"] == sum(x.nbytes for x in everything(store))


def test_a_step_that_fails_breaks_its_slots(
    tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> None:
    model = lively(tiny("hymba"))
    store = new_store(model)
    begin(store, 0, OWN[0])
    store.begin_step([0])
    with pytest.raises(ValueError, match="cut off half-way"):
        store.length(0)
    store.reset(0)
    assert store.length(0) == 0
