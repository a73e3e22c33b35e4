"""Rows that share beginnings: the same numbers as each row alone, however they are batched."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from hymba.config import Config
from hymba.eval.branches import Ask, Room, Score, Scorer, deal, first_batch, levels, tree
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> LanguageModel:
    return lively(tiny("hymba"))


def alone(model: LanguageModel, ask: Ask) -> Score:
    """The obvious twin: one row, no cache, the whole softmax."""
    row = torch.tensor(ask.tokens)
    with torch.no_grad():
        hidden = model(row[:-1], Batch.of([len(row) - 1]))
        logprobs = model.logits(hidden).log_softmax(-1)
    at, asked = logprobs[-ask.last :], row[-ask.last :]
    chosen = at.gather(1, asked[:, None]).sum()
    return Score(float(chosen), bool((at.argmax(-1) == asked).all()))


def questions(model: LanguageModel, seed: int = 0) -> list[Ask]:
    """Six of one set of examples and four of another, with options of 1 to 5 tokens; whole texts;
    a row of two tokens; the same ask twice; an option that another one begins with."""
    draw = random.Random(seed)
    size = model.config.vocab_size

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(size) for _ in range(count))

    asks = []
    for examples, count in ((some(41), 6), (some(23), 4)):
        for _ in range(count):
            context = examples + some(draw.randrange(3, 20))
            options = [some(draw.choice((1, 1, 2, 5))) for _ in range(4)]
            options.append(options[-1] + some(2))
            asks += [Ask(context + option, len(option)) for option in options]
    asks += [Ask(some(n), n - 1) for n in (2, 17, 60)]
    asks.append(asks[3])
    draw.shuffle(asks)
    return asks


@pytest.mark.parametrize("worth", [1, 8, 10**6])
@pytest.mark.parametrize("batch", [1, 7, None])
def test_scores_are_those_of_each_row_alone(
    model: LanguageModel, batch: int | None, worth: int
) -> None:
    asks = questions(model)
    scores = Scorer(model, batch, worth).score(asks)
    for ask, score in zip(asks, scores, strict=True):
        twin = alone(model, ask)
        assert score.logprob == pytest.approx(twin.logprob, abs=1e-4)
        assert score.greedy == twin.greedy


@pytest.mark.parametrize("plan", ["llama", "mamba", "samba", "hymba-no-meta"])
def test_other_plans_too(
    plan: str, tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> None:
    model = lively(tiny(plan))
    asks = questions(model, seed=1)
    found = [score.logprob for score in Scorer(model, worth=4).score(asks)]
    assert found == pytest.approx([alone(model, ask).logprob for ask in asks], abs=1e-4)


def test_greedy_answers_are_seen(model: LanguageModel) -> None:
    row = (5, 6, 7)
    for _ in range(3):
        with torch.no_grad():
            hidden = model(torch.tensor(row), Batch.of([len(row)]))
        row = (*row, int(model.logits(hidden[-1]).argmax()))
    wrong = (*row[:-2], (row[-2] + 1) % model.config.vocab_size, row[-1])
    right, other = Scorer(model).score([Ask(row, 3), Ask(wrong, 3)])
    assert right.greedy and not other.greedy


def test_what_is_shared_is_computed_once(model: LanguageModel) -> None:
    context = tuple(range(50))
    asks = [Ask((*context, option), 1) for option in (1, 2, 3, 4)]
    scorer = Scorer(model)
    scorer.score(asks)
    assert scorer.computed == 50  # one row for four options
    scorer = Scorer(model)
    scorer.score([Ask((*context, option, 9), 2) for option in (1, 2, 3, 4)])
    assert scorer.computed == 50 + 4
    scorer = Scorer(model, batch=1)
    scorer.score(asks)
    assert scorer.computed == 200


def test_a_tree_of_rows() -> None:
    rows = sorted([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2), (7,)])
    first, second, third = levels(tree(rows, worth=1))
    assert [(node.start, node.end) for node in first] == [(0, 2), (0, 1)]
    assert [(node.start, node.end, node.parent) for node in second] == [(2, 3, 0)]
    assert [(node.start, node.end, node.parent) for node in third] == [(3, 4, 0), (3, 4, 0)]


def test_a_short_beginning_is_not_worth_a_level() -> None:
    rows = [(1, *range(10, 20)), (1, *range(30, 40))]
    (only,) = levels(tree(rows, worth=32))
    assert [(node.start, node.end) for node in only] == [(0, 11), (0, 11)]


def test_batches_keep_to_their_room() -> None:
    asks = [Ask((number,) * 11, 1) for number in range(30)]
    order = range(30)
    assert first_batch(asks, order, Room(7, 10**6)) == list(range(7))
    assert first_batch(asks, order, Room(None, 45)) == [0, 1, 2, 3]
    assert first_batch(asks, order, Room(None, 1)) == [0]  # one at least
    assert len(first_batch([asks[0]] * 30, order, Room(None, 11))) == 30  # all of one sequence


def test_less_at_once_where_memory_ends(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks, whole = questions(model), Scorer(model)
    expected = whole.score(asks)
    scorer, together = Scorer(model), Scorer._together
    sizes = []

    def narrow(self: Scorer, some: list[Ask]) -> list[Score]:
        sizes.append(len(some))
        if len(some) > 20:
            raise torch.OutOfMemoryError("no")
        return together(self, some)

    monkeypatch.setattr(Scorer, "_together", narrow)
    found = scorer.score(asks)
    assert max(sizes) > 20 and sizes[-1] <= 20
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-4)


def test_progress_counts_every_ask(model: LanguageModel) -> None:
    told: list[int] = []
    asks = questions(model)
    Scorer(model, batch=7).score(asks, told.append)
    assert sum(told) == len(asks) and max(told) == 7


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_work_is_dealt_out_evenly(model: LanguageModel, shares: int) -> None:
    asks = questions(model)
    hands = deal(asks, shares)
    assert sorted(number for hand in hands for number in hand) == list(range(len(asks)))
    work = []
    for hand in hands:
        scorer = Scorer(model, worth=1)
        scorer.score([asks[number] for number in hand])
        work.append(scorer.computed)
    # A neighbour's beginning is computed again, and a row is not cut in two.
    assert max(work) - min(work) <= 120


def test_more_processes_than_asks() -> None:
    assert sorted(map(len, deal([Ask((1, 2), 1)], 3))) == [0, 0, 1]
    assert deal([], 2) == [[], []]
