"""Recall tasks: the answer stands in the row and can be found nowhere else.

    MQAR             values of keys that stood before, many questions a row
    Phonebook        numbers of several digits by names of several tokens
    Needle           one value hidden in a haystack, at a depth
    SelectiveCopy    scattered items, in order
    Induction        a random text, said again from a random place

A task is a few numbers and draws rows; row i is a function of (task, seed, side, i), so nothing is
stored. Training and test rows are never equal: a row belongs to the side that a hash of its own
tokens says, whatever its seed, and rows of the other side are drawn again. An answer is a run of
labels that are not -100; all else is context and never trained on.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hymba.errors import UserError
from hymba.ops.loss import IGNORE
from hymba.train.rows import Packed

Ids = NDArray[np.int64]
Side = Literal["train", "test"]
SIDES: tuple[Side, Side] = ("train", "test")

BEGIN, MARK, ASK, NEXT = 3, 4, 5, 6  # 0 to 2 are <pad>, <s>, </s> elsewhere and are not used
FIRST = 8  # a task's own tokens begin here
MOST_DRAWS = 1000  # half of all rows are the other side's, so this many only where there is one row


class RecallError(UserError):
    """A task that cannot be drawn; the message says which number is wrong."""


@dataclass(frozen=True)
class Task(ABC):
    """`length` tokens a row, the last answer included but for its last token."""

    length: int = 256

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are below this; every row of a task draws from the same, whatever its length."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Token accuracy of a guess that knows the task and the row, not what is asked for."""

    @abstractmethod
    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        """(length + 1,) ids, and which of them are answers."""

    def row(self, seed: int, number: int, side: Side = "train") -> Packed:
        """Row `number` of a seed, one piece of `length` tokens."""
        random = _seeded(seed % 2**32, number, zlib.crc32(self.name.encode()))
        for _ in range(MOST_DRAWS):
            ids, answers = self.draw(random)
            if _side(ids) == side:
                labels = np.where(answers[1:], ids[1:], IGNORE)
                lengths = (self.length,)
                return Packed(torch.from_numpy(ids[:-1].copy()), torch.from_numpy(labels), lengths)
        raise RecallError(f"{self.name} with {self} has too few different rows to hold some out")


_local = threading.local()


def _seeded(*seed: int) -> np.random.RandomState:
    """RandomState(seed), in a seventh of the time: a thread's own is seeded again.

    Not default_rng: numpy promises that RandomState's numbers never change."""
    if not hasattr(_local, "random"):
        _local.random = np.random.RandomState(0)
    random: np.random.RandomState = _local.random
    random.seed(seed)
    return random


def _side(ids: Ids) -> Side:
    """Half of all rows are test rows. (Not by a CRC: it is linear, and a row that says its items
    twice could cancel.)"""
    return SIDES[hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=1).digest()[0] % 2]


def _need(good: bool, message: str) -> None:
    if not good:
        raise RecallError(message)


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: pairs of key and value, then some of the keys again, each to
    be followed by its value.

    From Zoology (Arora et al. 2023, arXiv 2312.04927, section 4 and appendix): keys of a row are
    distinct, a question's distance follows a power law, and all pairs are asked for. Two things
    differ: filler has tokens of its own (theirs may look like keys), and `gap` keeps all
    questions further away than a window. Needs recall at a distance, of many things at once: the
    state of an SSM must hold all pairs. Chance: 1 / pairs, one of the values that stand there.
    """

    pairs: int = 16
    gap: int = 0  # tokens of filler between the last pair and the first question
    keys: int = 512
    values: int = 512
    filler: int = 64
    power: float = 0.01  # of the law: most questions come early

    name = "mqar"

    def __post_init__(self) -> None:
        _need(0 < self.pairs <= self.keys, f"{self.pairs} pairs need as many keys, not {self.keys}")
        _need(
            self._slots >= self.pairs,
            f"{self.length} tokens are too few for {self.pairs} pairs, a gap of {self.gap} and "
            f"their questions: give {4 * self.pairs + self.gap} or more",
        )

    @property
    def _slots(self) -> int:
        return (self.length + 1 - 2 * self.pairs - self.gap) // 2

    @property
    def vocab_size(self) -> int:
        return FIRST + self.keys + self.values + self.filler

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        keys = FIRST + _distinct(random, self.pairs, self.keys)
        values = FIRST + self.keys + random.randint(self.values, size=self.pairs)
        first = FIRST + self.keys + self.values
        ids = first + random.randint(self.filler, size=self.length + 1)
        ids[: 2 * self.pairs : 2], ids[1 : 2 * self.pairs : 2] = keys, values
        # As drawn one by one, each with its weight among those left: the first of many clocks.
        clocks = random.standard_exponential(self._slots) * _power_law(self._slots, self.power)
        slots = np.argsort(clocks)[: self.pairs]
        places = 2 * self.pairs + self.gap + 2 * slots
        ids[places], ids[places + 1] = keys, values
        return ids, _where(places + 1, self.length + 1)


@lru_cache
def _power_law(slots: int, power: float) -> NDArray[np.float64]:
    """One over each slot's weight, which is (slot + 1) ** (power - 1)."""
    return np.asarray(np.arange(1, slots + 1) ** (1.0 - power), np.float64)


@dataclass(frozen=True)
class Phonebook(Task):
    """A book of names and numbers that fills the row, then some of the names again.

    From "Repeat After Me" (Jelassi et al. 2024, arXiv 2402.01032, section 4): there names and
    numbers are text and one is asked for; here both are tokens (so that letters and digits are
    shared by all entries) and `questions` are asked. Needs recall by a key of several tokens, and
    copying of several. Chance: 1 / 10 a digit, 10 ** -digits a number.
    """

    questions: int = 4
    name_tokens: int = 3
    digits: int = 4
    letters: int = 26

    name = "phonebook"

    def __post_init__(self) -> None:
        least = 2 * self._entry * self.questions
        _need(self.length >= least, f"{self.length} tokens hold no phonebook: give {least} or more")
        most = self.letters**self.name_tokens // 2
        _need(self.entries <= most, f"{self.entries} entries need more letters, or longer names")

    @property
    def _entry(self) -> int:
        """Tokens of an entry, and of a question with its answer."""
        return self.name_tokens + self.digits + 1

    @property
    def entries(self) -> int:
        return (self.length + 1 - self.questions * self._entry) // self._entry

    @property
    def vocab_size(self) -> int:
        return FIRST + self.letters + 10

    @property
    def chance(self) -> float:
        return 0.1

    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        codes = _distinct(random, self.entries, self.letters**self.name_tokens)
        powers = self.letters ** np.arange(self.name_tokens)
        names = FIRST + codes[:, None] // powers % self.letters  # (entries, name_tokens)
        shape = self.entries, self.digits
        numbers = FIRST + self.letters + random.randint(10, size=shape)
        book = np.hstack([names, numbers, np.full((self.entries, 1), NEXT)]).reshape(-1)
        asked = random.permutation(self.entries)[: self.questions]
        mark = np.full((self.questions, 1), ASK)
        questions = np.hstack([mark, names[asked], numbers[asked]]).reshape(-1)
        front = np.full(self.length + 1 - len(book) - len(questions), BEGIN)
        ids = np.concatenate([front, book, questions])
        answers = np.zeros(self._entry, bool)
        answers[-self.digits :] = True
        before = np.zeros(len(front) + len(book), bool)
        return ids, np.concatenate([before, np.tile(answers, self.questions)])


@dataclass(frozen=True)
class Needle(Task):
    """A key and a value of some tokens hidden at `depth` of a haystack, asked for at the end.

    After Kamradt's "needle in a haystack" (2023) and the paper's section 3.3, on tokens: the hay
    is random, and `others` needles with other keys lie in it, so that finding a needle is not
    enough. Needs recall at a distance with little to hold. Chance: 1 / (1 + others), the value of
    one of the needles.
    """

    depth: float | None = None  # 0: at the beginning, 1: right before the question; None: anywhere
    others: int = 3
    value_tokens: int = 4
    keys: int = 64
    values: int = 64
    hay: int = 128

    name = "needle"

    def __post_init__(self) -> None:
        if self.depth is not None:
            _need(0 <= self.depth <= 1, f"a depth is between 0 and 1, not {self.depth}")
        least = 2 * (2 + self.others) * self._size
        _need(self.length >= least, f"{self.length} tokens hold no haystack: give {least} or more")
        _need(self.others < self.keys, f"{self.others} others need as many keys more")

    @property
    def _size(self) -> int:
        return 2 + self.value_tokens

    @property
    def vocab_size(self) -> int:
        return FIRST + self.keys + self.values + self.hay

    @property
    def chance(self) -> float:
        return 1 / (1 + self.others)

    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        size, room = self._size, self.length + 1 - self._size
        ids = FIRST + self.keys + self.values + random.randint(self.hay, size=self.length + 1)
        count = 1 + self.others
        keys = FIRST + _distinct(random, count, self.keys)
        values = FIRST + self.keys + random.randint(self.values, size=(count, self.value_tokens))
        for place, key, value in zip(self._places(random, room), keys, values, strict=True):
            ids[place : place + size] = [MARK, key, *value]
        ids[room:] = [ASK, keys[0], *values[0]]
        return ids, _where(np.arange(room + 2, room + size), self.length + 1)

    def _places(self, random: np.random.RandomState, room: int) -> Ids:
        """Where the needle and the others begin, none over another."""
        size, count = self._size, 1 + self.others
        first = random.randint(room - size + 1)
        if self.depth is not None:
            first = round(self.depth * (room - size))
        free = [np.arange(first % size, first - size + 1, size)]
        free.append(np.arange(first + size, room - size + 1, size))
        return np.array([first, *random.permutation(np.concatenate(free))[: count - 1]])


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Items strewn over the row, then asked for in order.

    From Mamba (Gu and Dao 2023, arXiv 2312.00752, section 4.1): 16 items of 16 kinds, in their
    order, from places that differ from row to row. Needs selection by content and counting;
    distance is no help. Chance: 1 / kinds a token, kinds ** -items an answer.
    """

    items: int = 16
    kinds: int = 16
    filler: int = 16

    name = "copy"

    def __post_init__(self) -> None:
        least = 2 * self.items
        _need(self.length >= least, f"{self.items} items need {least} tokens, not {self.length}")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.kinds + self.filler

    @property
    def chance(self) -> float:
        return 1 / self.kinds

    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        ids = FIRST + self.kinds + random.randint(self.filler, size=self.length + 1)
        asked = self.length - self.items  # where the mark stands; the items are behind it
        items = FIRST + random.randint(self.kinds, size=self.items)
        ids[np.sort(random.permutation(asked)[: self.items])] = items
        ids[asked], ids[asked + 1 :] = ASK, items
        return ids, _where(np.arange(asked + 1, self.length + 1), self.length + 1)


@dataclass(frozen=True)
class Induction(Task):
    """Distinct random tokens, then all of them again, from a random place on and round.

    The induction heads' task as Olsson et al. state it (2022, arXiv 2209.11895: a repeated random
    sequence; Mamba's section 4.1 has one such pair a row). What follows a token is what followed
    it before; the copy's first token and the one where it comes round are not asked for. Needs
    recall of everything, by what a token is: without the random place, it would be enough to look
    back a fixed distance. Chance: 1 / (length / 2), one of the tokens that stand there.
    """

    symbols: int = 1024

    name = "induction"

    def __post_init__(self) -> None:
        _need(self.length % 2 == 0 and self.length >= 4, f"length {self.length} has no halves")
        half = self.length // 2
        _need(half <= self.symbols, f"{half} distinct tokens need as many symbols: {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return FIRST + self.symbols

    @property
    def chance(self) -> float:
        return 2 / self.length

    def draw(self, random: np.random.RandomState) -> tuple[Ids, NDArray[np.bool_]]:
        half = self.length // 2
        text = FIRST + _distinct(random, half, self.symbols)
        turn = random.randint(half)
        ids = np.concatenate([[BEGIN], text, text[turn:], text[:turn]])
        answers = _where(np.arange(half + 2, self.length + 1), self.length + 1)
        answers[-turn or half] = False  # where it comes round
        return ids, answers


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (MQAR, Phonebook, Needle, SelectiveCopy, Induction)
}


def _distinct(random: np.random.RandomState, count: int, below: int) -> Ids:
    """`count` different numbers below `below`, in random order."""
    if below <= 4096:
        return random.permutation(below)[:count].astype(np.int64)
    found: dict[int, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(random.randint(below, size=count).tolist()))
    return np.array(list(found)[:count], np.int64)


def _where(places: Ids, size: int) -> NDArray[np.bool_]:
    answers = np.zeros(size, bool)
    answers[places] = True
    return answers
