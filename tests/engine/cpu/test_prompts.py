"""Prompts on a CPU: what they leave behind is the same however they are cut and whatever is beside
them, bit for bit, and as torch has it within float error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.cache import Cache
from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops.backend import forget
from tests.engine.cpu.packing import pair

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
