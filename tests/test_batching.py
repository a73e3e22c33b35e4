"""A row of a batch gives what it gives alone: whatever stands beside it, however it was cut into
chunks, whichever slot it is in, and whatever that slot held before.

The measure is always the same: the plain forward of one whole sequence, without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba.cache import Cache, Snapshot
from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.presets import hymba

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
Text = Callable[..., list[Tensor]]


@torch.no_grad()
def alone(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one sequence."""
    return model.logits(model(tokens, Batch.of([len(tokens)], device=tokens.device)))


def feed(
    model: LanguageModel, cache: Cache, pieces: Sequence[Tensor], slots: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Continue the sequences in `slots` by these tokens; the logits of each."""
    lengths, places = [len(x) for x in pieces], list(range(len(pieces)) if slots is None else slots)
    past = [cache.lengths[slot] for slot in places]
    hidden = model(torch.cat(list(pieces)), Batch.of(lengths, past, places), cache)
    return model.logits(hidden).split(lengths)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Close, and the same greedy choice wherever the best two words are not a tie."""
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    best = want.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * tolerance
    assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["f32", "f64"])
def model(request: pytest.FixtureRequest, tiny: Tiny, lively: Lively) -> LanguageModel:
    """Everything at once: windows of 5, so rings of 6 places, in most layers."""
    return lively(tiny("hymba"), dtype=request.param)


@pytest.fixture
def exact(tiny: Tiny, lively: Lively) -> LanguageModel:
    return lively(tiny("hymba"), dtype=torch.float64)


# Rows of one forward


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_ragged_rows(plan: str, grad: bool, tiny: Tiny, lively: Lively, text: Text) -> None:
    model, rows = lively(tiny(plan)), text([17, 1, 30, 5, 17])
    with torch.set_grad_enabled(grad):
        hidden = model(torch.cat(rows), Batch.of([len(x) for x in rows]))
        found = model.logits(hidden).detach().split([len(x) for x in rows])
    for row, logits in zip(rows, found, strict=True):
        assert_same(logits, alone(model, row))


@pytest.mark.parametrize("plan", PLANS)
def test_packed_documents(plan: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    """Loss and every gradient of documents in one row are those of the documents apart: each sees
    the meta tokens, starts from their states, and gives gradients back into them."""
    model, documents = lively(tiny(plan), dtype=torch.float64), text([17, 2, 30, 5])

    def gradients(parts: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        labels = [torch.cat([x[1:], x.new_tensor([-100])]) for x in parts]
        hidden = model(torch.cat(parts), Batch.of([len(x) for x in parts]))
        loss = model.loss(hidden, torch.cat(labels), reduction="sum")
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, packed = gradients(documents)
    apart = [gradients([document]) for document in documents]
    assert loss == pytest.approx(sum(part for part, _ in apart), rel=1e-12)
    assert ("decoder.meta_tokens.weight" in packed) == (model.config.meta_tokens > 0)
    for name, got in packed.items():
        want = torch.stack([grads[name] for _, grads in apart]).sum(0)
        assert want.norm() > 0, name
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9, msg=name)


# Chunks


@given(cuts=st.sets(st.integers(1, 39)))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_chunked_prefill(exact: LanguageModel, text: Text, cuts: set[int]) -> None:
    """In any chunks: of one token, across the window's edge, longer than the ring."""
    (tokens,) = text([40])
    cache = exact.new_cache(1)
    found = [feed(exact, cache, [tokens[a:b]])[0] for a, b in pairwise([0, *sorted(cuts), 40])]
    assert_same(torch.cat(found), alone(exact, tokens))


@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 19])
def test_chunks_of_one_size(model: LanguageModel, text: Text, chunk: int) -> None:
    """Sizes below, at, and above the ring's 6 places, and one that does not divide the rows."""
    (tokens,) = text([40])
    cache = model.new_cache(1)
    found = [feed(model, cache, [part])[0] for part in tokens.split(chunk)]
    assert_same(torch.cat(found), alone(model, tokens))


@pytest.mark.parametrize("plan", PLANS)
def test_mixed_step(plan: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    """One forward of a decode step, a chunk of a running prompt and a new prompt, as a scheduler
    mixes them."""
    model = lively(tiny(plan))
    rows, cuts = text([21, 33, 12]), (20, 9, 0)
    cache = model.new_cache(3)
    feed(model, cache, [rows[0][:20], rows[1][:9]], slots=[0, 1])
    found = feed(model, cache, [x[cut:] for x, cut in zip(rows, cuts, strict=True)])
    for row, cut, logits in zip(rows, cuts, found, strict=True):
        assert_same(logits, alone(model, row)[cut:])


# Decode


@pytest.mark.parametrize("plan", PLANS)
def test_ragged_decode(plan: str, tiny: Tiny, lively: Lively, text: Text, device: str) -> None:
    """Prompts on both sides of the window's edge, each decoded past it and round the ring."""
    model = lively(tiny(plan)).to(device)
    prompts = [3, 14, 1, 6]
    rows = [x.to(device) for x in text([n + 20 for n in prompts])]
    cache = model.new_cache(4)
    found = [[x] for x in feed(model, cache, [x[:n] for x, n in zip(rows, prompts, strict=True)])]
    for step in range(20):
        new = [x[n + step : n + step + 1] for x, n in zip(rows, prompts, strict=True)]
        for logits, row in zip(feed(model, cache, new), found, strict=True):
            row.append(logits)
    for row, logits in zip(rows, found, strict=True):
        assert_same(torch.cat(logits), alone(model, row))


def test_decode_in_float64(exact: LanguageModel, text: Text) -> None:
    (tokens,) = text([30])
    cache = exact.new_cache(1)
    found = [feed(exact, cache, [part])[0] for part in tokens.split(1)]
    assert_same(torch.cat(found), alone(exact, tokens))


@pytest.mark.parametrize("window", [254, 255, 256, 300])
def test_beyond_a_block_of_keys(window: int, lively: Lively, text: Text) -> None:
    """Global layers and long windows grow by blocks of 256 keys: a short and a long sequence
    beside each other, over the edge of a block by prefill and then by decode."""
    sizes = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}
    small = hymba(num_layers=2, window=window, meta_tokens=2, vocab_size=61, ssm_state=2, **sizes,
                  global_layers=(0,))  # fmt: skip
    model = lively(small)
    rows, prompts, steps = text([524, 9]), (507, 2), 5
    cache = model.new_cache(2)
    feed(model, cache, [rows[0][:250]], slots=[0])
    feed(model, cache, [rows[0][250:507], rows[1][:2]])
    for step in range(steps):
        found = feed(
            model, cache, [x[n + step : n + step + 1] for x, n in zip(rows, prompts, strict=True)]
        )
    for row, logits, n in zip(rows, found, prompts, strict=True):
        assert_same(logits, alone(model, row[: n + steps])[-1:])


# Slots


def test_slots_in_any_order_and_subset(model: LanguageModel, text: Text) -> None:
    rows = text([16, 16, 16, 16])
    cache = model.new_cache(5)
    plan = [([4, 0, 2], 5), ([2, 1], 3), ([0], 4), ([1, 4], 2), ([2, 0, 1, 4], 1)]
    owner, done = {4: 0, 0: 1, 2: 2, 1: 3}, [0] * 4
    for slots, count in plan:
        pieces = [rows[owner[s]][done[owner[s]] : done[owner[s]] + count] for s in slots]
        found = feed(model, cache, pieces, slots)
        for slot, logits in zip(slots, found, strict=True):
            done[owner[slot]] += count
            assert_same(logits, alone(model, rows[owner[slot]][: done[owner[slot]]])[-count:])
    assert cache.lengths == [10, 6, 9, 0, 8]


@pytest.mark.parametrize("plan", PLANS)
def test_a_reused_slot_remembers_nothing(plan: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    """After `reset` a slot begins after the meta tokens, whatever was in it, while its neighbour
    goes on. The new sequence is shorter than the old one, then longer."""
    model = lively(tiny(plan))
    neighbour, old, new, last = text([30, 19, 4, 25])
    cache = model.new_cache(2)
    feed(model, cache, [neighbour[:10], old])
    cache.reset(1)
    assert_same(feed(model, cache, [new], slots=[1])[0], alone(model, new))
    cache.reset(1)
    found = feed(model, cache, [neighbour[10:], last])
    assert_same(found[0], alone(model, neighbour)[10:])
    assert_same(found[1], alone(model, last))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 0], [2, 2, 1, 0], [1]], ids=str)
def test_beams_are_reordered(
    plan: str, order: list[int], tiny: Tiny, lively: Lively, text: Text
) -> None:
    """Beam search keeps, drops and branches sequences: each goes on as if it had been computed
    from its own tokens, and branches do not see each other."""
    model, rows = lively(tiny(plan)), text([9, 9, 9])
    cache = model.new_cache(3)
    feed(model, cache, rows)
    cache.select(order)
    beams = [rows[i] for i in order]
    for seed in range(2):
        new = text([4] * len(beams), seed=seed)
        beams = [torch.cat([a, b]) for a, b in zip(beams, new, strict=True)]
        for beam, logits in zip(beams, feed(model, cache, new), strict=True):
            assert_same(logits, alone(model, beam)[-4:])


# Snapshots


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("begin", [0, 3, 17])
def test_a_restored_sequence_goes_on_bit_for_bit(
    plan: str, begin: int, tiny: Tiny, lively: Lively, text: Text
) -> None:
    """Taken before, at and after the ring's first round; restored over another future."""
    model, (tokens, other) = lively(tiny(plan)), text([40, 33])
    cache = model.new_cache(1)
    if begin:
        feed(model, cache, [tokens[:begin]])
    kept = cache.snapshot(0)
    first = [feed(model, cache, [part])[0] for part in tokens[begin:].split(7)]
    feed(model, cache, [other])
    cache.restore(0, kept)
    assert cache.lengths == [begin]
    second = [feed(model, cache, [part])[0] for part in tokens[begin:].split(7)]
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert_same(torch.cat(first), alone(model, tokens)[begin:])


@pytest.mark.parametrize("plan", PLANS)
def test_a_snapshot_moves_to_another_slot_and_cache(
    plan: str, tiny: Tiny, lively: Lively, text: Text
) -> None:
    """Into a slot that held a longer sequence, and into a cache that has room for nothing yet;
    every stored bit is the same."""
    model, (tokens, longer) = lively(tiny(plan)), text([22, 31])
    cache = model.new_cache(3)
    feed(model, cache, [tokens[:15], longer], slots=[0, 2])
    kept = cache.snapshot(0)
    cache.restore(2, kept)
    assert cache.lengths == [15, 0, 15]
    found = feed(model, cache, [tokens[15:]] * 2, slots=[2, 0])
    fresh = model.new_cache(2)
    fresh.restore(1, kept)
    for again in (cache.snapshot(0), cache.snapshot(2)):
        assert again.length == 22
    for logits in (*found, *feed(model, fresh, [tokens[15:]], slots=[1])):
        assert_same(logits, alone(model, tokens)[15:])
    fresh.restore(0, kept)
    assert_bits(fresh.snapshot(0), kept)


def assert_bits(got: Snapshot, want: Snapshot) -> None:
    assert got.length == want.length
    for a, b in zip((*got.kv, *got.ssm), (*want.kv, *want.ssm), strict=True):
        assert (a is None) == (b is None)
        for x, y in zip(a or (), b or (), strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


# Any history


@given(data=st.data())
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_history(exact: LanguageModel, data: st.DataObject) -> None:
    """Feeding, emptying, reordering, snapshots and restores in any order leave every slot with
    the sequence that the same actions on plain lists of tokens leave."""
    cache, held = exact.new_cache(3), [[] for _ in range(3)]
    kept: list[tuple[Snapshot, list[int]]] = []
    slot, token = st.integers(0, 2), st.integers(0, 60)
    for _ in range(data.draw(st.integers(1, 7), label="actions")):
        match data.draw(st.sampled_from(["feed", "feed", "reset", "select", "keep", "restore"])):
            case "reset":
                chosen = data.draw(slot)
                cache.reset(chosen)
                held[chosen] = []
            case "select":
                order = data.draw(st.lists(slot, min_size=3, max_size=3))
                cache.select(order)
                held = [list(held[i]) for i in order]
            case "keep":
                chosen = data.draw(slot)
                kept.append((cache.snapshot(chosen), list(held[chosen])))
            case "restore" if kept:
                chosen, (snapshot, tokens) = data.draw(slot), data.draw(st.sampled_from(kept))
                cache.restore(chosen, snapshot)
                held[chosen] = list(tokens)
            case _:
                slots = data.draw(st.lists(slot, min_size=1, max_size=3, unique=True))
                piece = st.lists(token, min_size=1, max_size=9)
                new = [data.draw(piece) for _ in slots]
                found = feed(exact, cache, [torch.tensor(x) for x in new], slots)
                for chosen, tokens, logits in zip(slots, new, found, strict=True):
                    held[chosen] = held[chosen] + tokens
                    want = alone(exact, torch.tensor(held[chosen]))[-len(tokens) :]
                    torch.testing.assert_close(logits, want, atol=1e-9, rtol=0)
        assert cache.lengths == [len(x) for x in held]


# What a batch refuses


def test_a_batch_that_does_not_fit_the_cache(exact: LanguageModel, text: Text) -> None:
    """A forgotten past would give plausible nonsense: it is an error, and nothing is written."""
    (tokens,) = text([9])
    cache = exact.new_cache(2)
    feed(exact, cache, [tokens])
    before = cache.snapshot(0)
    with pytest.raises(ValueError, match=r"continues \(0,\) tokens, its slots hold \(9,\)"):
        exact(tokens, Batch.of([9]), cache)
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary"):
        exact(torch.tensor([3, 61]), Batch.of([2], [9]), cache)
    with pytest.raises(ValueError, match="token id -100 is outside the vocabulary"):
        exact(torch.tensor([-100]), Batch.of([1], [9]), cache)
    assert cache.lengths == [9, 0]
    assert_bits(cache.snapshot(0), before)


def test_a_step_leaves_the_embeddings_it_was_given(exact: LanguageModel, text: Text) -> None:
    (tokens,) = text([9])
    rows = exact.decoder.embed_tokens(tokens).detach()
    cache, before = exact.new_cache(1), rows.clone()
    for index in range(9):
        exact(rows[index : index + 1], Batch.of([1], [index]), cache)
    assert torch.equal(rows, before)


def test_batch_of() -> None:
    batch = Batch.of([2, 3], past=[4, 0], slots=[7, 1])
    assert batch.positions.tolist() == [4, 5, 0, 1, 2]
    assert (batch.past, batch.slots, batch.segments.lengths) == ((4, 0), (7, 1), (2, 3))
    assert Batch.of([2, 3]).slots == (0, 1) and Batch.of([2, 3]).past == (0, 0)
    with pytest.raises(ValueError, match="a slot may be in a batch once"):
        Batch.of([1, 1], slots=[3, 3])
    with pytest.raises(ValueError, match="2 segments, 1 pasts, 2 slots"):
        Batch.of([1, 1], past=[3])
    with pytest.raises(ValueError, match="positive"):
        Batch.of([1, 0])
