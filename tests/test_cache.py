"""The cache holds what it says: bytes as predicted, windows that stop growing, one meta state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hymba.cache import Cache
from hymba.config import KV_BLOCK, Config, Layer
from hymba.model.accounting import cache_bytes
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]


def fill(model: LanguageModel, cache: Cache, tokens: int, slot: int = 0) -> None:
    """Bring a slot to so many tokens, in chunks."""
    while cache.lengths[slot] < tokens:
        past = cache.lengths[slot]
        count = min(200, tokens - past)
        model(torch.zeros(count, dtype=torch.long), Batch.of([count], [past], [slot]), cache)


def tensors(cache: Cache) -> list[Tensor]:
    """Everything that grows with slots or tokens."""
    stores = [x for x in (*cache.kv, *cache.ssm) if x is not None]
    return [x for store in stores for x in vars(store).values() if isinstance(x, Tensor)]


def small(window: int | None = 5) -> Config:
    """Two layers of few numbers, so that long sequences cost nothing."""
    return Config(
        vocab_size=11, hidden_size=8, num_heads=2, num_kv_heads=1, intermediate_size=4,
        layers=(Layer(), Layer(window=window), Layer(window=window, kv_from=1)),
        meta_tokens=3, ssm_state=2,
    )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [1, 3])
def test_bytes_are_as_predicted(
    plan: str, dtype: torch.dtype, slots: int, tiny: Tiny, lively: Lively
) -> None:
    """Kind by kind, with no token, within the window, past it, and past a block of keys; and the
    numbers are the allocations themselves, not sums of shapes."""
    model = lively(tiny(plan), dtype=dtype)
    cache = model.new_cache(slots)
    for tokens in (0, 1, 5, 6, 7, KV_BLOCK, KV_BLOCK + 1):
        fill(model, cache, tokens)
        found = cache.nbytes()
        want = cache_bytes(model.config, tokens, kv_bytes=dtype.itemsize, state_bytes=4)
        meta = want.pop("meta")
        assert found.pop("meta") == meta
        assert found == {kind: count * slots for kind, count in want.items()}
        assert sum(x.untyped_storage().nbytes() for x in tensors(cache)) == found["total"]


@pytest.mark.parametrize("window", [5, 255, 256, 300])
def test_window_layers_stop_growing(window: int, lively: Lively) -> None:
    """At window + 1 places: the row's own key and `window` before it, and never one more."""
    model = lively(small(window))
    cache = model.new_cache(1)
    sizes = {}
    for tokens in (1, window, window + 1, window + 2, 700, 1500):
        fill(model, cache, tokens)
        sizes[tokens] = cache.nbytes()
    full = sizes[window + 1]["window_kv"]
    width = 4 + 8  # one head: a key and a value twice as wide
    assert full == (window + 1) * width * 4
    assert {sizes[n]["window_kv"] for n in (window + 2, 700, 1500)} == {full}
    assert sizes[700]["global_kv"] == 768 * width * 4
    assert sizes[1500]["global_kv"] == 1536 * width * 4
    for kind in ("conv", "ssm", "meta"):
        assert len({size[kind] for size in sizes.values()}) == 1


class Writes(TorchDispatchMode):
    """The (slot, place) pairs that every write of keys or values names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[tuple[int, int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index_put_.default:
            index = [x.tolist() for x in args[1] if x is not None]
            if len(index) == 2:
                self.found.append(list(zip(*index, strict=True)))
        return func(*args, **(kwargs or {}))


def test_a_place_is_written_once(lively: Lively) -> None:
    """Of a chunk that goes round the ring several times only the end is written: two writes to
    one place in one operation have no order on a GPU."""
    model = lively(small(5))
    cache = model.new_cache(2)
    with Writes() as writes:
        model(torch.zeros(43, dtype=torch.long), Batch.of([23, 20]), cache)
    assert [len(places) for places in writes.found] == [43, 43, 12, 12]  # k, v; whole, ring
    assert all(len(set(places)) == len(places) for places in writes.found)


def test_a_consumer_of_kv_stores_none(tiny: Tiny, lively: Lively) -> None:
    model = lively(tiny("hymba"))
    cache = model.new_cache(1)
    owners = [i for i, store in enumerate(cache.kv) if store is not None]
    assert owners == model.config.kv_owners == [0, 1, 3, 4, 7]


@pytest.mark.parametrize("plan", ["hymba", "samba"])
def test_meta_states_are_shared(plan: str, tiny: Tiny, lively: Lively) -> None:
    """By all slots, by all caches of the same weights, and with the model itself; layers that
    read another's K/V add nothing."""
    model = lively(tiny(plan))
    one, many = model.new_cache(1), model.new_cache(50)
    assert one.nbytes()["meta"] == many.nbytes()["meta"]
    for states in zip(one.meta, many.meta, model.decoder.meta_states(), strict=True):
        for same in zip(*states, strict=True):
            assert len({None if x is None else x.data_ptr() for x in same}) == 1
    owners = [i for i, state in enumerate(one.meta) if state.k is not None]
    assert owners == model.config.kv_owners


@pytest.mark.parametrize("plan", ["hymba", "samba"])
def test_meta_states_hold_no_more_than_themselves(plan: str, tiny: Tiny, lively: Lively) -> None:
    """A view of a larger tensor keeps all of it: the values must not hold on to the projection
    that they were cut from (in the 1.5B, several times what is reported)."""
    model = lively(tiny(plan))
    cache = model.new_cache(1)
    kept = [x for state in cache.meta for x in state if x is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) == cache.nbytes()["meta"]


def test_slots_begin_with_the_state_after_the_meta_tokens(tiny: Tiny, lively: Lively) -> None:
    model = lively(tiny("hymba"))
    cache = model.new_cache(2)
    for store, begin in zip(cache.ssm, model.decoder.meta_states(), strict=True):
        for slot in range(2):
            assert torch.equal(store.ssm[slot], begin.ssm[0])
            assert torch.equal(store.conv[slot], begin.conv[0])
        assert store.ssm.norm() > 0 and store.conv.norm() > 0


def test_lengths_count_text_only(tiny: Tiny, lively: Lively) -> None:
    """transformers and every limit read this number: meta tokens are never in it."""
    model = lively(tiny("hymba"))
    cache = model.new_cache(2)
    assert cache.slots == 2 and cache.lengths == [0, 0]
    fill(model, cache, 9, slot=1)
    assert cache.lengths == [0, 9]
    cache.reset(1)
    assert cache.lengths == [0, 0]


def test_states_are_wide(tiny: Tiny, lively: Lively) -> None:
    """SSM states in float32 beside bfloat16 keys, unless asked otherwise, and never narrower
    than the weights."""
    kinds = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for state_dtype in (torch.bfloat16, torch.float32):
            cache = lively(tiny("hymba"), dtype=dtype).new_cache(1, state_dtype=state_dtype)
            assert {x.dtype for store in cache.kv if store for x in (store.k, store.v)} == {dtype}
            assert {store.conv.dtype for store in cache.ssm} == {dtype}
            (kinds[dtype, state_dtype],) = {store.ssm.dtype for store in cache.ssm}
    assert kinds[torch.bfloat16, torch.float32] == torch.float32
    assert kinds[torch.bfloat16, torch.bfloat16] == torch.bfloat16
    assert kinds[torch.float32, torch.bfloat16] == torch.float32
    assert kinds[torch.float64, torch.float32] == torch.float64


def test_a_snapshot_is_a_copy_of_one_sequence(tiny: Tiny, lively: Lively) -> None:
    """It does not change when the cache does, and costs a sequence's bytes, not the cache's."""
    model = lively(tiny("hymba"))
    cache = model.new_cache(4)
    fill(model, cache, 9)
    kept = cache.snapshot(0)
    before = [x.clone() for pair in (*kept.kv, *kept.ssm) if pair for x in pair]
    fill(model, cache, 30)
    after = [x for pair in (*kept.kv, *kept.ssm) if pair for x in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in after}
    assert kept.length == 9
    assert kept.nbytes == sum(storages.values()) < cache.nbytes()["total"] / 4


def test_select_gives_memory_back(tiny: Tiny, lively: Lively) -> None:
    model = lively(tiny("hymba"))
    cache = model.new_cache(4)
    fill(model, cache, 9, slot=2)
    four = cache.nbytes()["total"]
    cache.select([2])
    assert cache.nbytes()["total"] == four // 4 and cache.lengths == [9]


@pytest.mark.parametrize("slot", [-1, 2, 7])
@pytest.mark.parametrize("act", ["reset", "snapshot", "restore", "select"])
def test_a_slot_that_is_not_there(slot: int, act: str, tiny: Tiny, lively: Lively) -> None:
    cache = lively(tiny("hymba")).new_cache(2)
    given = {"restore": (slot, cache.snapshot(0)), "select": ([0, slot],)}.get(act, (slot,))
    with pytest.raises(IndexError, match=f"slot {slot} of a cache of 2"):
        getattr(cache, act)(*given)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_batch_of_a_slot_that_is_not_there(slot: int, tiny: Tiny, lively: Lively) -> None:
    """-1 would be Python's last row: another user's sequence, or the same slot twice."""
    model = lively(tiny("hymba"))
    cache = model.new_cache(2)
    with pytest.raises((IndexError, ValueError)):
        model(torch.tensor([1, 2]), Batch.of([1, 1], slots=[1, slot]), cache)
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_after_a_sequence_that_overflowed(bad: float, tiny: Tiny, lively: Lively) -> None:
    """What is left of it in a slot must not reach the slot's next sequence: a key that is masked
    has weight 0, and 0 times NaN is NaN. A longer neighbour makes the forward look at the places
    that the new sequence has not written yet."""
    model = lively(tiny("hymba"))
    cache, tokens = model.new_cache(2), torch.arange(4)
    want = model(tokens, Batch.of([4]), cache)
    cache.reset(0)
    fill(model, cache, 9, slot=1)
    model(torch.full((9, model.config.hidden_size), bad), Batch.of([9]), cache)
    cache.reset(0)
    found = []
    for i, token in enumerate(tokens):
        both = Batch.of([1, 1], [i, 9 + i], [0, 1])
        found.append(model(torch.stack([token, token]), both, cache)[:1])
    torch.testing.assert_close(torch.cat(found), want, atol=1e-4, rtol=0)


def test_a_step_that_fails_leaves_its_slot_marked(
    tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> None:
    """A step of one token changes SSM states as it goes: what it left half-way is no state."""
    model, batch = lively(tiny("hymba")), Batch.of((5, 5))
    cache = model.new_cache(2)
    model(torch.arange(10), batch, cache)
    kept = cache.snapshot(0)

    def fail(*_: object) -> None:
        raise MemoryError

    hook = model.decoder.layers[-1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(torch.tensor([7]), Batch.of((1,), past=(5,), slots=(0,)), cache)
    hook.remove()
    with pytest.raises(ValueError, match="slot 0 was cut off half-way"):
        model(torch.tensor([7]), Batch.of((1,), past=(5,), slots=(0,)), cache)
    assert cache.length(1) == 5
    cache.restore(0, kept)
    model(torch.tensor([7]), Batch.of((1,), past=(5,), slots=(0,)), cache)
