"""Prompts on a CPU: what they leave behind is the same however they are cut and whatever is beside
them, bit for bit, and as torch has it within float error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.cache import Cache, State
from hymba.config import Config
from hymba.engine.store import Store
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import HybridMixer
from hymba.ops.backend import forget
from tests.engine.cpu.packing import off, pair, store_for

pytest.importorskip("numba")
PLANS = ["hymba", "samba", "mamba", "llama-meta"]


@pytest.fixture(autouse=True)
def numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HYMBA_BACKEND", raising=False)
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> Any:
    def make(plan: str) -> LanguageModel:
        packed, _ = pair(lively, tiny(plan), "int4")
        return packed

    return make


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed))


def read(model: LanguageModel, ids: Tensor, chunk: int) -> tuple[list[Tensor], Tensor]:
    """What a prompt leaves in a cache, and its hidden states."""
    cache, hidden = model.new_cache(1), []
    for first in range(0, len(ids), chunk):
        some = ids[first : first + chunk]
        hidden.append(model(some, Batch.of([len(some)], [first]), cache))
    return left(cache, 0), torch.cat(hidden)


def left(cache: Cache, slot: int) -> list[Tensor]:
    kept = cache.snapshot(slot)
    return [x for pair in (*kept.kv, *kept.ssm) if pair is not None for x in pair]


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("plan", PLANS)
def test_cut_in_any_way(plan: str, made: Any) -> None:
    model, ids = made(plan), tokens(300)
    states, hidden = read(model, ids, 300)
    for chunk in (2, 37, 128):
        others, parts = read(model, ids, chunk)
        assert same(others, states) and torch.equal(parts, hidden)


@pytest.mark.parametrize("plan", PLANS)
def test_beside_others(plan: str, made: Any) -> None:
    model, counts = made(plan), [70, 3, 200]
    rows = [tokens(count, seed) for seed, count in enumerate(counts)]
    cache = model.new_cache(3)
    hidden = model(torch.cat(rows), Batch.of(counts), cache).split(counts)
    for slot, ids in enumerate(rows):
        states, alone = read(model, ids, 1000)
        assert torch.equal(hidden[slot], alone) and same(left(cache, slot), states)


# ---- narrow K/V ----------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def stores(model: LanguageModel) -> tuple[Store, Store]:
    narrow, wide = store_for(model, 2, torch.bfloat16), store_for(model, 2)
    kv = [x for store in (narrow, wide) for x in (*store.rings, *store.paged)]
    assert [x.element_size() for x in kv] == [2] * (len(kv) // 2) + [4] * (len(kv) // 2)
    for x in kv:
        x.zero_()
    return narrow, wide


@pytest.mark.parametrize("plan", ["hymba", "llama-meta"])
def test_narrow_is_a_wide_cache_rounded_by_hand(
    plan: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also in the middle of a prompt; and near what is not rounded at all."""
    monkeypatch.setattr("hymba.ops.cpu.tiles.exact_asked", lambda: True)
    model, counts = made(plan), [70, 9]
    narrow, wide = stores(model)
    rows, batch = tokens(79), Batch.of(counts)
    plain = model(rows, batch, store_for(model, 2))
    hidden = model(rows, batch, narrow)
    first = HybridMixer.keys_and_values

    def by_hand(self: HybridMixer, *args: Any) -> Any:
        k, v, *others = (left := first(self, *args)).text
        return left._replace(text=State(rounded(k), rounded(v), *others))

    monkeypatch.setattr(HybridMixer, "keys_and_values", by_hand)
    assert torch.equal(model(rows, batch, wide), hidden)
    for x, y in zip((*narrow.rings, *narrow.paged), (*wide.rings, *wide.paged), strict=True):
        assert torch.equal(x.float(), y)
    assert 1e-5 < off(hidden, plain) < 2e-2
    more = Batch.of([30, 30], counts)
    assert torch.equal(model(tokens(60), more, narrow), model(tokens(60), more, wide))


@pytest.mark.parametrize("plan", ["hymba", "llama-meta"])
def test_narrow_and_cut_in_any_way(plan: str, made: Any) -> None:
    model, ids, found = made(plan), tokens(200), []
    for chunk in (200, 37):
        store, _ = stores(model)
        for at in range(0, 200, chunk):
            some = ids[at : at + chunk]
            hidden = model(some, Batch.of([len(some)], [at]), store)
        found.append([hidden[-1], *(x.clone() for x in (*store.rings, *store.paged))])
    assert same(found[0], found[1])


@pytest.mark.parametrize("plan", ["hymba", "llama-meta"])
def test_narrow_by_torch(plan: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers between two of bfloat16's go here up and there down, so they are near, not equal."""
    monkeypatch.setattr("hymba.ops.cpu.tiles.exact_asked", lambda: True)
    model, hidden = made(plan), []
    for backend in ("numba", "torch"):
        monkeypatch.setenv("HYMBA_BACKEND", backend)
        forget()
        store, _ = stores(model)
        model(tokens(79), Batch.of([70, 9]), store)
        hidden.append(model(tokens(60), Batch.of([30, 30], [70, 9]), store))
    assert off(*hidden) < 5e-3
