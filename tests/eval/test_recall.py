"""The recall tasks: solvable from the tokens alone, exact labels, sides that never meet, a scorer
that counts what it says. The oracles here are written from the tasks' docstrings."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hymba import presets
from hymba.eval.recall import RecallRows, answer_sizes, check, score
from hymba.eval.tasks import (
    ASK,
    BEGIN,
    FIRST,
    MARK,
    MQAR,
    NEXT,
    SIDES,
    TASKS,
    Induction,
    Needle,
    Phonebook,
    RecallError,
    SelectiveCopy,
    Task,
)
from hymba.model.decoder import LanguageModel
from hymba.train.rows import Packed

SOME: list[Task] = [
    MQAR(length=64, pairs=8),
    MQAR(length=256, pairs=16, gap=100),
    MQAR(length=32, pairs=8),  # no room to spare
    Phonebook(length=128),
    Phonebook(length=100, questions=2, name_tokens=2, digits=3),
    Needle(length=128),
    Needle(length=300, depth=0.0),
    Needle(length=300, depth=0.5, others=0),
    Needle(length=300, depth=1.0, value_tokens=1),
    SelectiveCopy(length=64),
    SelectiveCopy(length=33, items=16),
    Induction(length=64),
    Induction(length=10),
]
each_task = pytest.mark.parametrize("task", SOME, ids=repr)


def ask_mqar(task: Task, ids: list[int]) -> list[int]:
    """Looks each key up among the pairs; whatever is no key is no question."""
    assert isinstance(task, MQAR)
    said = dict(zip(ids[: 2 * task.pairs : 2], ids[1 : 2 * task.pairs : 2], strict=True))
    return [said.get(x, -100) if i >= 2 * task.pairs else -100 for i, x in enumerate(ids)]


def ask_phonebook(task: Task, ids: list[int]) -> list[int]:
    assert isinstance(task, Phonebook)
    n, d = task.name_tokens, task.digits
    asked = ids.index(ASK)
    book = [x for x in ids[:asked] if x != BEGIN]
    entries = [book[i : i + n + d] for i in range(0, len(book), n + d + 1)]
    numbers = {tuple(entry[:n]): entry[n:] for entry in entries}
    labels = [-100] * len(ids)
    for place in (i for i, x in enumerate(ids) if x == ASK):
        number = numbers[tuple(ids[place + 1 : place + 1 + n])]
        labels[place + n : place + n + d] = number
    return labels


def ask_needle(task: Task, ids: list[int]) -> list[int]:
    assert isinstance(task, Needle)
    asked = ids.index(ASK)
    marks = [i for i, x in enumerate(ids) if x == MARK]
    (place,) = [i for i in marks if ids[i + 1] == ids[asked + 1]]
    value = ids[place + 2 : place + 2 + task.value_tokens]
    return [-100] * (asked + 1) + value


def ask_copy(task: Task, ids: list[int]) -> list[int]:
    assert isinstance(task, SelectiveCopy)
    asked = ids.index(ASK)
    items = [x for x in ids[:asked] if FIRST <= x < FIRST + task.kinds]
    return [-100] * asked + items


def ask_induction(task: Task, ids: list[int]) -> list[int]:
    """What followed the token the first time, unless it was the text's last."""
    labels, last = [], len(ids) // 2
    for i, x in enumerate(ids):
        before = ids.index(x)
        labels.append(ids[before + 1] if before < i and before != last else -100)
    return labels


ORACLES: dict[str, Callable[[Task, list[int]], list[int]]] = {
    "mqar": ask_mqar,
    "phonebook": ask_phonebook,
    "needle": ask_needle,
    "copy": ask_copy,
    "induction": ask_induction,
}


def test_every_task_has_an_oracle() -> None:
    assert ORACLES.keys() == TASKS.keys()


@each_task
@pytest.mark.parametrize("side", SIDES)
def test_oracles_solve_every_row_from_its_tokens(task: Task, side: str) -> None:
    """So the answers stand in the row, and labels are right, at answers only and nowhere else."""
    for number in range(20):
        packed = task.row(seed=3, number=number, side=side)
        assert packed.labels.tolist() == ORACLES[task.name](task, packed.tokens.tolist())
        assert packed.lengths == (task.length,) == tuple(packed.tokens.shape)
        assert packed.tokens.dtype == packed.labels.dtype == torch.int64
        assert 0 < int(packed.tokens.min()) and int(packed.tokens.max()) < task.vocab_size
        assert int(packed.labels.max()) < task.vocab_size


@each_task
def test_answers_are_counted_as_they_are_asked(task: Task) -> None:
    sizes = answer_sizes(task.row(0, 0))
    expected = {
        "mqar": lambda: [1] * task.pairs,
        "phonebook": lambda: [task.digits] * task.questions,
        "needle": lambda: [task.value_tokens],
        "copy": lambda: [task.items],
        "induction": lambda: [n for n in sizes if n > 0],
    }
    assert sizes == expected[task.name]()
    if task.name == "induction":  # all but the first, and the one where the copy comes round
        assert len(sizes) <= 2 and sum(sizes) in (task.length // 2 - 1, task.length // 2 - 2)


@each_task
def test_rows_are_functions_of_seed_number_and_side(task: Task) -> None:
    def key(*which: object) -> bytes:
        return task.row(*which).tokens.numpy().tobytes()

    assert key(5, 7, "train") == key(5, 7, "train")
    different = [key(s, n, side) for s in (0, 1) for n in range(8) for side in SIDES]
    if task.length > 10:  # the smallest has few rows
        assert len(set(different)) == len(different)


def test_rows_stay_what_they_were() -> None:
    """Published results are of these rows, and numpy promises RandomState's numbers for ever."""
    row = MQAR(length=16, pairs=3, keys=8, values=8, filler=4).row(0, 0)
    again = MQAR(length=16, pairs=3, keys=8, values=8, filler=4).row(0, 0, "test")
    assert row.tokens.tolist() != again.tokens.tolist()
    assert row.tokens.tolist() == [13, 18, 9, 23, 11, 19, 9, 23, 13, 18, 26, 24, 24, 24, 11, 19]


def test_train_and_test_never_meet_even_where_rows_are_few() -> None:
    """24 different rows: drawn hundreds of times with many seeds, a row is always on one side."""
    task = SelectiveCopy(length=6, items=2, kinds=2, filler=1)
    seen = {side: set() for side in SIDES}
    for side in SIDES:
        for number in range(300):
            row = task.row(seed=number % 7, number=number, side=side)
            seen[side].add((*row.tokens.tolist(), *row.labels.tolist()))
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_one_row_alone_cannot_be_held_out() -> None:
    task = SelectiveCopy(length=2, items=1, kinds=1, filler=1)
    with pytest.raises(RecallError, match="too few different rows"):
        for side in SIDES:
            task.row(0, 0, side)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needles_lie_at_their_depth(depth: float) -> None:
    task = Needle(length=600, depth=depth)
    for number in range(10):
        ids = task.row(0, number).tokens.tolist()
        asked = ids.index(ASK)
        place = next(i for i, x in enumerate(ids) if x == MARK and ids[i + 1] == ids[asked + 1])
        assert abs(place / (asked - 6) - depth) < 0.01


def test_a_gap_keeps_questions_away() -> None:
    task = MQAR(length=300, pairs=4, gap=200)
    for number in range(10):
        labels = task.row(0, number).labels
        assert int((labels != -100).nonzero()[0]) >= 8 + 200


def test_questions_follow_a_power_law() -> None:
    """With Zoology's 0.01 half of the questions come in the first tenth of what is left."""
    task = MQAR(length=1024, pairs=1)
    places = [int((task.row(0, n).labels != -100).nonzero()[0]) for n in range(400)]
    assert 0.4 < np.mean(np.array(places) < 34) < 0.6  # sqrt(512) slots: half of sum 1/i
    with_flat = MQAR(length=1024, pairs=1, power=1.0)
    places = [int((with_flat.row(0, n).labels != -100).nonzero()[0]) for n in range(100)]
    assert np.mean(np.array(places) < 34) < 0.15


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MQAR(length=20, pairs=8),
        lambda: MQAR(pairs=600),
        lambda: Phonebook(length=30),
        lambda: Phonebook(length=4096, letters=4),
        lambda: Needle(length=20),
        lambda: Needle(depth=1.5),
        lambda: SelectiveCopy(length=16),
        lambda: Induction(length=33),
        lambda: Induction(length=4096),
    ],
)
def test_impossible_tasks_are_told(wrong: Callable[[], Task]) -> None:
    with pytest.raises(RecallError):
        wrong()


# ------------------------------------------------------------------------------------ many rows


def test_rows_are_filled_with_pieces() -> None:
    rows = RecallRows((Induction(length=64), Induction(length=16)), seed=1)
    assert rows.sequence_length == 64
    assert rows.row(0).lengths == (64,) and rows.row(1).lengths == (16,) * 4
    numbers = [tuple(rows.row(n).tokens.tolist()) for n in range(40)]
    assert len(set(numbers)) == 40
    pieces = {tuple(p.tolist()) for n in range(1, 40, 2) for p in rows.row(n).tokens.split(16)}
    assert len(pieces) == 80
    assert rows.epochs(1000) == 0.0 and rows.bytes_per_label is None
    assert json.loads(json.dumps(rows.identity)) == rows.identity
    with pytest.raises(RecallError, match="divide each other"):
        RecallRows((Induction(length=64), Induction(length=48)))


def test_answers_end_where_pieces_do() -> None:
    """The copy's last label and the next piece's first may stand side by side."""
    labels = torch.tensor([-100, 5, 6, 7, -100, 8])
    packed = Packed(torch.ones(6, dtype=torch.long), labels, (3, 3))
    assert answer_sizes(packed) == [2, 1, 1]
    assert answer_sizes(Packed(labels, torch.full((6,), -100), (6,))) == []


# ---------------------------------------------------------------------------------------- score


class Oracle(LanguageModel):
    """Knows the labels and is wrong on purpose at some tokens."""

    def __init__(self, task: Task, wrong: Callable[[int], bool]) -> None:
        super().__init__(presets.mamba(hidden_size=8, num_layers=1, vocab_size=task.vocab_size))
        self.task, self.wrong = task, wrong

    def forward(self, tokens, batch, cache=None):
        pieces = tokens.split(list(batch.segments.lengths))
        labels = [x for p in pieces for x in ORACLES[self.task.name](self.task, p.tolist())]
        asked = [i for i, x in enumerate(labels) if x != -100]
        for count, place in enumerate(asked):
            labels[place] += int(self.wrong(count))
        return torch.tensor(labels)[:, None]

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[:, 0] % (self.task.vocab_size + 1)).float()


def test_scores_count_tokens_and_whole_answers() -> None:
    task = Phonebook(length=64, questions=2, digits=4)
    rows = RecallRows((task,), side="test")
    whole = score(Oracle(task, lambda i: False), rows, count=5, at_once=2)
    assert (whole.rows, whole.answers, whole.tokens) == (5, 10, 40)
    assert whole.answer_accuracy == whole.token_accuracy == 1.0
    one_digit = score(Oracle(task, lambda i: i == 0), rows, count=5, at_once=5)
    assert one_digit.token_accuracy == 39 / 40 and one_digit.answer_accuracy == 9 / 10
    first = score(Oracle(task, lambda i: i % 4 == 0), rows, count=5)
    assert first.token_accuracy == 0.75 and first.answer_accuracy == 0.0


def test_an_untrained_model_knows_nothing() -> None:
    config = presets.hymba(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=32,
        window=8,
        meta_tokens=2,
        vocab_size=SelectiveCopy().vocab_size,
    )
    model = LanguageModel(config).init_weights(seed=0)
    right, answers = check(model, SelectiveCopy(length=64).row(0, 0))
    assert right.shape == (16,) and answers.shape == (1,)
    found = score(model, RecallRows((SelectiveCopy(length=64),), side="test"), count=16)
    assert found.token_accuracy < 3 / 16 and found.answer_accuracy == 0.0


def test_next_is_no_answer() -> None:
    assert NEXT not in Phonebook(length=128).row(0, 0).labels.tolist()
