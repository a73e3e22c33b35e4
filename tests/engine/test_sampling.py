"""The batch on the device chooses what its slow twin chooses, row by row, and both choose by the
probabilities that were asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba.engine import sampling as sampling_module
from hymba.engine.noise import gumbel, token_steps
from hymba.engine.sampling import Drawn, Sampler, Sampling
from hymba.engine.sampling_reference import edited, filtered, sample_reference
from hymba.errors import UserError
from tests.engine.chances import passes

V = 61
INF = math.inf


def lively(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def words(allowed: Tensor) -> Tensor:
    """(S, V) bool -> (S, ceil(V / 32)) int32, bit by bit."""
    rows = []
    for row in allowed.tolist():
        bits = [sum(1 << j for j, x in enumerate(row[i : i + 32]) if x) for i in range(0, V, 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in bits])
    return torch.tensor(rows, dtype=torch.int32)


class Batch:
    """A Sampler and the lists from which its twin computes the same."""

    def __init__(self, slots: int = 8, device: str = "cpu") -> None:
        self.sampler, self.device = Sampler(slots, V, device), device
        self.asked: dict[int, tuple[Sampling, int, int, list[int]]] = {}
        self.said: dict[int, list[int]] = {}

    def admit(
        self, slot: int, how: Sampling, seed: int = 0, index: int = 0, prompt: Any = (1, 2, 3)
    ) -> None:
        self.asked[slot], self.said[slot] = (how, seed, index, list(prompt)), []
        self.sampler.admit(slot, how, seed, index, prompt)

    def resume(self, slot: int, into: int) -> None:
        """As after a preemption: another slot, which is told what was said."""
        asked, said = self.asked.pop(slot), self.said.pop(slot)
        self.sampler.release(slot)
        self.asked[into], self.said[into] = asked, said
        self.sampler.admit(into, *asked, said)

    def step(self, logits: Tensor, slots: list[int], allowed: Tensor | None = None) -> Drawn:
        masks = None if allowed is None else words(allowed)
        places = torch.tensor(slots, device=self.device)
        drawn = self.sampler.sample(logits.to(self.device), slots, places, masks)
        for slot, token in zip(slots, drawn.tokens.tolist(), strict=True):
            self.said.setdefault(slot, []).append(token)
        return drawn

    def twin(self, logits: Tensor, slots: list[int], allowed: Tensor | None = None) -> list[int]:
        found = []
        for i, slot in enumerate(slots):
            row = None if allowed is None else allowed[i]
            found.append(sample_reference(logits[i], *self.asked[slot], self.said[slot], row))
        return found


anything = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 7, 60, 61, 1000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    logit_bias=st.sampled_from([None, None, {3: 2.5}, {0: -100, 60: 4.0}]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)


@given(each=st.lists(anything, min_size=1, max_size=8), seed=st.integers(0, 2**40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_batch_is_its_twin(each: list[Sampling], seed: int, data: st.DataObject) -> None:
    """Rows of any kind beside each other, in any order, some absent, some constrained, some
    interrupted; more logits than rows, as in a captured graph."""
    batch = Batch(slots=9)
    for slot, how in enumerate(each):
        batch.admit(slot, how, seed + slot, index=slot % 3, prompt=range(slot, slot + 9))
    for step in range(6):
        everyone = sorted(batch.asked)
        slots = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
        logits = lively(len(slots) + 2, V, seed=seed % 1000 + step)
        allowed = None
        if data.draw(st.booleans()):
            allowed = lively(len(slots), V, seed=step) > 0
        want = batch.twin(logits, slots, allowed)
        assert batch.step(logits, slots, allowed).tokens.tolist() == want
        if data.draw(st.booleans()):
            free = next(slot for slot in range(9) if slot not in batch.asked)
            batch.resume(slots[0], free)


ALL_KINDS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=0.8, top_k=9, min_p=0.05),
    Sampling(temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.4),
    Sampling(presence_penalty=0.5, logit_bias={7: 3.0}),
    Sampling(temperature=1.2, logprobs=4),
]


@pytest.mark.parametrize("how", ALL_KINDS, ids=range(7))
def test_neighbours_change_nothing(how: Sampling, device: str) -> None:
    """The same tokens and the same bits of log-probabilities, alone and beside all others."""
    alone, crowd = Batch(device=device), Batch(device=device)
    alone.admit(0, how, seed=5)
    crowd.admit(3, how, seed=5)
    for slot, other in zip((0, 1, 2, 4, 5, 6, 7), ALL_KINDS, strict=True):
        crowd.admit(slot, other, seed=slot)
    for step in range(30):
        logits = lively(8, V, seed=step)
        one, many = alone.step(logits[:1], [0]), crowd.step(logits, [3, 0, 1, 2, 4, 5, 6, 7])
        assert one.tokens[0] == many.tokens[0]
        if how.logprobs is not None and one.top and many.top and one.logprobs is not None:
            assert many.logprobs is not None and torch.equal(one.logprobs, many.logprobs[:1])
            assert torch.equal(one.top[1], many.top[1][:1])


def test_nothing_waits_for_the_host() -> None:
    """The meta device has no values, so whatever asked for one would fail here. With every path
    at once, a resumed request, a released slot, and a slot that never was."""
    sampler = Sampler(12, V, "meta")
    for slot, how in enumerate(ALL_KINDS):
        sampler.admit(slot, how, 1, 0, [1, 2], said=[3] * slot)
    sampler.release(2)
    slots, masks = [4, 2, 0, 1, 3, 5, 6, 11], torch.zeros(8, 2, dtype=torch.int32, device="meta")
    logits, places = torch.randn(9, V, device="meta"), torch.tensor(slots, device="meta")
    drawn = sampler.sample(logits, slots, places, masks)
    assert drawn.tokens.shape == (8,) and drawn.top is not None and drawn.top[0].shape == (8, 4)


@pytest.mark.gpu
def test_nothing_waits_for_the_host_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batch, slots = Batch(device="cuda"), list(range(len(ALL_KINDS)))
    logits, places = lively(8, V).cuda(), torch.tensor(slots, device="cuda")
    for repeat in range(2):  # the first time pinned memory and kernels are made
        if repeat:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for slot, how in enumerate(ALL_KINDS):
                batch.sampler.admit(slot, how, 1, 0, [1, 2], said=[3] * slot)
            batch.sampler.sample(logits, slots, places)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype, device: str) -> None:
    logits = torch.zeros(4, V, dtype=dtype, device=device)
    logits[:, [50, 9, 30]] = 1.5
    batch = Batch(device=device)
    batch.admit(1, Sampling(temperature=1, seed=1))
    batch.admit(2, Sampling(presence_penalty=0.5))
    drawn = batch.step(logits, [0, 2, 1])
    assert drawn.tokens[:2].tolist() == [9, 9]
    assert batch.step(logits, [0, 2, 1]).tokens[:2].tolist() == [9, 30]
    assert sample_reference(logits[0], Sampling(), 0, 0, [], []) == 9


# Probabilities


def draws(logits: Tensor, rows: int) -> Tensor:
    """Logits (V,) -> the first token at temperature 1 for each of the seeds 0, 1, 2, ..."""
    found, slots = [], list(range(200))
    sampler = Sampler(200, len(logits), "cpu")
    for first in range(0, rows, 200):
        for slot in slots:
            sampler.admit(slot, Sampling(temperature=1.0), first + slot, 0, [1])
        found.append(sampler.sample(logits.expand(200, -1), slots, torch.tensor(slots)).tokens)
    return torch.cat(found)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_tokens_come_as_often_as_they_should(how: Sampling) -> None:
    """6000 requests with seeds 0, 1, 2, ..., two tokens of each."""
    logits, rows = lively(1, 12, seed=3) / 2, 6000
    want = filtered((logits[0] - logits[0].max()) / how.temperature, how).softmax(-1).double()
    sampler, slots = Sampler(rows, 12, "cpu"), list(range(rows))
    for slot in slots:
        sampler.admit(slot, how, slot, 0, [1])
    for _ in range(2):
        drawn = sampler.sample(logits.expand(rows, 12), slots, torch.tensor(slots))
        counts = torch.bincount(drawn.tokens, minlength=12).double()
        kept = want > 0
        assert counts[~kept].sum() == 0
        assert passes(counts[kept], want[kept] * rows)


def test_what_is_left_out_is_never_drawn(device: str) -> None:
    """Whatever the noise; where one token is left it is that one, also of as little noise as
    there is. Rows without a number give a token of the vocabulary all the same."""
    x = torch.full((V, V), -INF).fill_diagonal_(-1e9)
    keys, steps = torch.arange(V), token_steps(V, "cpu")
    assert sampling_module._draw(x, keys, steps).tolist() == list(range(V))
    x = torch.full((1, V), math.nan, device=device)
    assert 0 <= sampling_module._draw(x, keys[:1].to(device), steps.to(device)).item() < V


def test_equal_sums_give_the_first(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(rows: Tensor, steps: Tensor) -> Tensor:
        return torch.zeros(len(rows), len(steps), device=device)

    monkeypatch.setattr(sampling_module, "gumbel", silence)
    x = torch.tensor([[-1.0, 0, -INF, 0, 0], [0, 0, 0, 0, 0]], device=device)
    places = torch.arange(5, device=device)
    assert sampling_module._draw(x, places[:2], places).tolist() == [1, 0]


def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit of the noise, so that no neighbour turns a choice: some rows at a time."""
    keys, steps = torch.arange(9) * 2**58 + 7, token_steps(1003, "cpu")
    whole = gumbel(keys, steps)
    for size in (1, 2, 4):
        assert torch.equal(torch.cat([gumbel(k, steps) for k in keys.split(size)]), whole)
    x = lively(9, 1003)
    want = sampling_module._draw(x, keys, steps)
    for at_once in (1, 1003, 4 * 1003 + 5):
        monkeypatch.setattr(sampling_module, "AT_ONCE_ON_A_CPU", at_once)
        assert torch.equal(sampling_module._draw(x, keys, steps), want)


def test_a_wide_vocabulary_is_not_biased() -> None:
    """32001 tokens, likelier and likelier; counted in 40 groups of nearly the same probability."""
    p = torch.linspace(0, 6, 32001).softmax(0)  # the last 400 times as likely as the first
    groups = (p.double().cumsum(0) * 40).long().clamp(max=39)
    want = torch.zeros(40).double().index_add_(0, groups, p.double())
    found = groups[draws(p.log(), 4000)].bincount(minlength=40).double()
    assert passes(found, want / want.sum() * 4000)


def test_very_unlikely_tokens_come_too() -> None:
    """One token of nearly everything, beside 32000 of a millionth each: 128 of 4000 draws, and
    from all over the vocabulary."""
    logits = torch.zeros(32001)
    logits[16000] = math.log(1e6 - 32000)
    tokens = draws(logits, 4000)
    rare = tokens[tokens != 16000]
    assert abs(len(rare) - 128) < 4 * 128**0.5
    assert passes((rare // 4001).bincount(minlength=8).double(), torch.tensor(len(rare) / 8))


def test_small_errors_turn_few_draws() -> None:
    """Logits as another batch size rounds them: a place on a line of all probabilities gave
    another token for one row in eight of these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 32001, generator=generator)
    near = logits + 1e-3 * torch.randn(400, 32001, generator=generator)
    sampler, slots, found = Sampler(400, 32001, "cpu"), list(range(400)), []
    for x in (logits, near):
        for slot in slots:
            sampler.admit(slot, Sampling(temperature=0.8), slot, 0, [1])
        found.append(sampler.sample(x, slots, torch.tensor(slots)).tokens)
    assert (found[0] != found[1]).sum() < 8


@pytest.mark.parametrize("temperature", [2e-5, 1e-3, 100.0])
def test_cold_and_hot(temperature: float) -> None:
    """Large logits over a small temperature overflow, unless the highest is taken off first."""
    logits = lively(1, V) * 1e4
    batch = Batch()
    batch.admit(0, Sampling(temperature=temperature, top_p=0.9))
    assert batch.step(logits, [0]).tokens.item() == logits.argmax()


# Filters, penalties, masks


@given(st.integers(0, 10**6), st.integers(0, 20), st.floats(0.01, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_filters_by_brute_force(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """From the definition, in float64: first the k likeliest, then the fewest of them that make
    up top_p, then what is likely enough. Where a rounding decides, either is right."""
    x = lively(20, seed=seed)
    p = [math.exp(value) for value in x.double().tolist()]
    order = sorted(range(20), key=lambda token: -p[token])[: top_k or 20]
    mass, kept, close = sum(p[token] for token in order), [], False
    before = 0.0
    for token in order:
        close |= abs(before / mass - top_p) < 1e-5 or abs(p[token] / p[order[0]] - min_p) < 1e-5
        if (before < top_p * mass or top_p == 1) and p[token] >= min_p * p[order[0]]:
            kept.append(token)
        before += p[token]
    how = Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    found = filtered(x - x.max(), how)
    assert close or sorted(kept) == found.isfinite().nonzero().flatten().tolist()


def test_equals_at_the_edge_are_kept() -> None:
    x = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -3.0]])
    for how in (Sampling(temperature=1, top_k=3), Sampling(temperature=1, top_p=0.6)):
        kept = filtered(x[0] - 2, how).isfinite().tolist()
        assert kept == [False, True, True, True, True, False]


def test_penalties_by_their_formulas() -> None:
    """Repetition counts the prompt too, the other two only what was said."""
    how = Sampling(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 10}
    )
    logits = torch.tensor([4.0, 4.0, -4.0, -4.0, 1.0, 3.0])
    found = edited(logits, how, prompt=[0, 2, 2], said=[1, 1, 3])
    want = [4 / 2, 4 / 2 - 0.25 - 2 * 0.5, -4 * 2, -4 * 2 - 0.25 - 0.5, 1 + 10, 3]
    assert found.tolist() == want


def test_tables_are_of_the_request_alone() -> None:
    """Rows that other requests left behind are clean, also after the tables grew."""
    how = Sampling(repetition_penalty=2.0, frequency_penalty=1.0, logit_bias={5: 1.5})
    busy = Sampling(presence_penalty=2.0, logit_bias={token: -50 for token in range(30)})
    logits, batch = torch.full((1, V), 0.25), Batch(slots=12)
    for slot in range(11):
        batch.admit(slot, busy, prompt=range(V))
    for _ in range(3):
        batch.step(logits.expand(11, V), list(range(11)))
    for slot in range(11):
        batch.admit(slot, how, prompt=[0])
    found = [batch.step(logits.expand(11, V), list(range(11))).tokens for _ in range(5)]
    assert [token.unique().tolist() for token in found] == [[5], [5], [1], [2], [3]]


def test_a_mask_leaves_only_what_it_allows() -> None:
    allowed = torch.zeros(3, V, dtype=torch.bool)
    allowed[0, 31] = allowed[1, 32] = allowed[2, 60] = True
    batch = Batch()
    batch.admit(1, Sampling(temperature=1, top_p=0.5))
    assert batch.step(lively(3, V), [0, 1, 2], allowed).tokens.tolist() == [31, 32, 60]


def test_logprobs_are_the_models() -> None:
    """Before temperature, penalties and masks; for greedy and drawn tokens alike."""
    batch, logits = Batch(), lively(3, V)
    batch.admit(0, Sampling(temperature=2.0, logprobs=2))
    batch.admit(1, Sampling(logprobs=0, logit_bias={4: 100}))
    drawn = batch.step(logits, [1, 0])
    assert drawn.logprobs is not None and drawn.top is not None
    every = logits[:2].log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs, every[[0, 1], drawn.tokens])
    best = every.topk(2)
    assert torch.equal(drawn.top[0], best.indices) and torch.equal(drawn.top[1], best.values)
    assert drawn.tokens[0] == 4
    batch.sampler.release(0)
    batch.sampler.release(1)
    assert batch.step(logits, [1, 0]).logprobs is None


# What is asked


def test_what_may_be_asked() -> None:
    how = Sampling(stop="end", stop_ids=[3, 4], logit_bias={9: 1, 2: -1.5}, json_schema={"a": 1})
    assert how.stop == ("end",) and how.stop_ids == (3, 4)
    assert how.bias == ((2, -1.5), (9, 1.0)) and how.json_schema == '{"a": 1}'
    again = replace(how, temperature=1.0)
    assert hash(again) == hash(replace(how, temperature=1.0)) and again.bias == how.bias
    assert how.constrained and how.edits and how.greedy and not Sampling().edits
    assert Sampling(seed=3).some_seed() == 3
    assert Sampling().some_seed() != Sampling().some_seed()
    assert Sampling(stop_ids=()).stop_ids == () and Sampling().stop_ids is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer, 1 or more, got 0"),
        ({"max_tokens": True}, "max_tokens must be an integer, 1 or more, got True"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer, 1 or more, got 1.5"),
        ({"max_tokens": None}, "max_tokens must be an integer, 1 or more, got None"),
        ({"temperature": -1}, "temperature must be a number, between 0 (greedy) and 100, got -1"),
        ({"temperature": math.nan}, "temperature must be a number, between"),
        ({"temperature": INF}, "temperature must be a number, between"),
        ({"temperature": "1"}, "temperature must be a number, between"),
        ({"top_k": -1}, "top_k must be an integer, 0 (off) or more, got -1"),
        ({"top_p": 0}, "top_p must be a number, over 0 and at most 1, got 0"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"min_p": 1.1}, "min_p must be a number, between 0 and 1, got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number, between 0.01 and 100"),
        ({"presence_penalty": 3}, "presence_penalty must be a number, between -2 and 2, got 3"),
        ({"frequency_penalty": -INF}, "frequency_penalty must be a number, between -2 and 2"),
        ({"seed": 2**64}, "seed must be an integer, of at most 64 bits"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"n": 0}, "n must be an integer, between 1 and 128, got 0"),
        ({"n": 129}, "n must be an integer, between 1 and 128, got 129"),
        ({"logprobs": 21}, "logprobs must be an integer, between 0 and 20, got 21"),
        ({"logprobs": True}, "logprobs must be an integer"),
        ({"stop": [""]}, "stop must be strings that are not empty, got ['']"),
        ({"stop": 3}, "stop must be strings that are not empty, got 3"),
        ({"stop": ["x"] * 17}, "stop may have at most 16 strings, got 17"),
        ({"stop_ids": [-1]}, "stop_ids must be token ids, got [-1]"),
        ({"stop_ids": "2"}, "stop_ids must be token ids, got '2'"),
        ({"logit_bias": [1]}, "logit_bias must be token ids with numbers, got [1]"),
        ({"logit_bias": {-1: 1}}, "logit_bias must be token ids with numbers between -100 and 100"),
        ({"logit_bias": {"3": 1}}, "got '3': 1"),
        ({"logit_bias": {3: math.nan}}, "got 3: nan"),
        ({"regex": ""}, "regex must be a string that is not empty, got ''"),
        ({"json_object": 1}, "json_object must be True or False, got 1"),
        ({"json_schema": "{"}, "json_schema is not JSON: "),
        ({"json_schema": "[]"}, "json_schema must be a JSON object, got '[]'"),
        ({"json_schema": {"a": {1}}}, "json_schema is not JSON: "),
        ({"regex": "a", "json_object": True}, "give only one of json_schema, regex and json_obj"),
    ],
    ids=str,
)
def test_what_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Sampling(**wrong)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_bias_of_no_token() -> None:
    Sampling(logit_bias={V - 1: 1}).check_vocabulary(V)
    with pytest.raises(UserError, match=r"token id 61 is outside the vocabulary \(0 to 60\)"):
        Sampling(logit_bias={V: 1}).check_vocabulary(V)
