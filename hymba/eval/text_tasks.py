"""Recall as text, for any model with a tokenizer: what is asked for stands in the row.

    needle       one sentence with a number in a haystack, at a depth
    passkey      the same in a few dull sentences, said over and over
    multikey     a needle among others that differ from it in their names alone
    multivalue   several numbers of one name, all to be told in their order
    variables    names that were set to each other: which have the value?
    phonebook    a page of names and numbers: one number
    mqar         pairs of names and metals, strewn questions: multi-query associative recall

Needle, multikey, multivalue and variables are after RULER (Hsieh et al. 2024, arXiv 2404.06654),
passkey after Mohtashami and Jaggi (2023, arXiv 2305.16300), phonebook after Jelassi et al. (2024,
arXiv 2402.01032), mqar after Zoology (Arora et al. 2023, arXiv 2312.04927). tasks.py has tasks of
bare tokens, for models that are trained on them.

A row has exactly `length` of the subject's own tokens, its last answer included. It is a function
of (task, tokenizer, text around, length, depth, seed, number) and nothing else.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hymba.errors import UserError
from hymba.eval.hay import Hay

COLOURS = (
    "amber azure beige black blue bronze brown copper coral crimson cyan gold green grey indigo"
    " ivory jade khaki lemon lilac lime maroon mauve mint navy ochre olive orange peach pink plum"
    " purple red rose ruby rust sand scarlet silver tan teal umber violet white yellow"
).split()
ANIMALS = (
    "badger beaver bison camel crane crow deer dove duck eagle falcon ferret finch fox frog gecko"
    " goose hare hawk heron horse ibis jackal koala lark lemur lion llama lynx magpie marten mole"
    " moose newt otter owl panda pigeon puma quail rabbit raven robin seal shrew sloth stork swan"
    " tapir tiger toad trout viper walrus weasel whale wolf wombat wren yak zebra"
).split()
THINGS = (
    "anchor apple basket bell bottle bridge brush bucket button candle carpet castle chair chalk"
    " clock cloud comb cork crown cup curtain desk drum engine feather fence flag flute fork"
    " garden glove hammer hat helmet island jacket jar kettle key kite ladder lamp lantern leaf"
    " lemon map mirror nail needle oven paddle pencil pillow pipe plate pocket river rope saddle"
    " scarf shell shovel spoon stone table tent ticket tower violin wagon wheel window"
).split()
FIRST = (
    "Ada Alan Anna Bela Carl Cora Dana Dora Edna Emil Erik Esra Finn Gina Greta Hana Hugo Ida Igor"
    " Ines Ivan Jana Joan Jonas Karl Kira Lars Lena Leo Lina Luis Mara Marco Mina Nadia Nils Nora"
    " Olga Omar Otto Paul Petra Rana Rita Rosa Sara Sofia Sven Tara Theo Uma Vera Viktor Yara Zoe"
).split()
LAST = (
    "Abel Adler Baker Bauer Berg Brandt Brook Carter Castro Costa Cruz Dahl Diaz Dunn Egan Engel"
    " Evans Falk Ferro Fisk Frost Gallo Gray Haas Hale Hill Holm Horn Iyer Jung Kaya Kern Klein"
    " Kruse Lang Leone Lind Lowe Mann Marsh Meyer Moss Nagy Noor Olsen Ortiz Pace Park Pohl Quist"
    " Rao Reed Rossi Ruiz Sato Shaw Silva Stone Tran Vogel Wade West Wolff Wood Yang Young Zeller"
).split()


class TaskError(UserError):
    """A row that cannot be written; the message says which number is wrong."""


class TooShort(TaskError):
    """A length without room for a row; `least` would have had it."""

    def __init__(self, name: str, length: int, least: int) -> None:
        super().__init__(f"{length} tokens are too few for {name}: give lengths of {least} or more")
        self.least = least


@dataclass(frozen=True)
class Ask:
    """One question of a row."""

    at: int  # tokens of the row that stand before the answer
    answers: tuple[str, ...]  # strings that it must contain
    spans: tuple[tuple[int, int], ...]  # their tokens in the row: from, to

    def moved(self, by: int) -> Ask:
        return Ask(self.at + by, self.answers, tuple((a + by, b + by) for a, b in self.spans))


@dataclass(frozen=True)
class Sample:
    """A row with its answers in it, and its questions."""

    ids: list[int]
    asks: tuple[Ask, ...]
    blind: float  # share of answers that a guess gets right that has read all but the question
    depth: float | None = None  # where the needle came to lie: at a line's end


@dataclass(frozen=True)
class TextTask(ABC):
    name: ClassVar[str]
    about: ClassVar[str]
    chance: ClassVar[float]  # share of answers right by a guess that knows the task, not the row
    has_depth: ClassVar[bool] = False

    @abstractmethod
    def draw(self, row: Row) -> Sample: ...

    def sample(
        self,
        hay: Hay,
        begin: Sequence[int],
        length: int,
        depth: float | None = None,
        seed: int = 0,
        number: int = 0,
    ) -> Sample:
        """Row `number` of a seed. TaskError where the length has no room for it."""
        if depth is not None and not 0 <= depth <= 1:
            raise TaskError(f"a depth is between 0 (the beginning) and 1, not {depth}")
        where = "any" if depth is None else f"{depth:.6f}"
        by = random.Random(f"{self.name} {length} {where} {seed} {number}")
        depth = by.random() if depth is None else depth
        sample = self.draw(Row(self.name, hay, list(begin), length, depth, by))
        assert len(sample.ids) == length, (self.name, len(sample.ids), length)
        return sample


@dataclass
class Row:
    """What a task writes with: pieces of text laid around in a haystack, questions behind it."""

    name: str
    hay: Hay
    begin: list[int]
    length: int
    depth: float
    by: random.Random

    def number(self, digits: int = 7) -> str:
        """One that the text around does not hold."""
        while (found := str(self.by.randrange(10 ** (digits - 1), 10**digits))) in self.hay.text:
            pass
        return found

    def numbers(self, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.number()] = None
        return list(found)

    def names(self, count: int) -> list[str]:
        """Different ones, of a colour and an animal."""
        picked = self.by.sample(range(len(COLOURS) * len(ANIMALS)), count)
        return [f"{COLOURS[i % len(COLOURS)]} {ANIMALS[i // len(COLOURS)]}" for i in picked]

    def places(self, count: int) -> list[float]:
        return [self.by.random() for _ in range(count)]

    def finish(
        self,
        pieces: Sequence[str],
        depths: Sequence[float],
        questions: Sequence[Question],
        blind: float,
        told: int | None = None,
        hay: Hay | None = None,
    ) -> Sample:
        """The row: `pieces` at their depths in as much of `hay` as there is room for, then the
        questions. `told`: the piece whose depth the sample has."""
        hay = hay or self.hay
        written = [hay.pen.ids(piece) for piece in pieces]
        end, asks = _tail(hay, questions)
        room = self.room(*written, end)
        ids, found = hay.around(written, depths, hay.cut(room, self.by))
        ids = [*self.begin, *ids]
        moved = tuple(ask.moved(len(ids)) for ask in asks)
        return Sample([*ids, *end], moved, blind, None if told is None else found[told])

    def room(self, *parts: Sequence[int]) -> int:
        """Tokens left for the text around."""
        used = len(self.begin) + sum(map(len, parts))
        if used > self.length:
            raise TooShort(self.name, self.length, used)
        return self.length - used


Question = tuple[str, Sequence[str]]  # what is asked, and what must be answered


def _tail(hay: Hay, questions: Sequence[Question]) -> tuple[list[int], list[Ask]]:
    """Questions with their answers behind them. "and" between two answers is not scored."""
    ids: list[int] = []
    asks = []
    for question, answers in questions:
        ids += hay.pen.ids(question)
        at, spans = len(ids), []
        for number, answer in enumerate(answers):
            ids += hay.pen.ids(" and") if number else []
            said = hay.pen.ids(f" {answer}")
            spans.append((len(ids), len(ids) + len(said)))
            ids += said
        asks.append(Ask(at, tuple(answers), tuple(spans)))
    return ids, asks


# ---- the tasks


@dataclass(frozen=True)
class Needle(TextTask):
    """Whoever finds the one number of seven digits in a program's source has it."""

    name = "needle"
    about = "a sentence with a number, somewhere in Python sources"
    chance = 1 / 9_000_000
    has_depth = True

    others: ClassVar[int] = 0

    def draw(self, row: Row) -> Sample:
        names, values = row.names(1 + self.others), row.numbers(1 + self.others)
        pieces = [f"\n{_fact(*pair)}." for pair in zip(names, values, strict=True)]
        depths = [row.depth, *row.places(self.others)]
        question = f"\n\nWhat is the magic number of {names[0]}? {_fact(names[0])}"
        blind = 1 / (1 + self.others)
        return row.finish(pieces, depths, [(question, values[:1])], blind, told=0)


@dataclass(frozen=True)
class MultiKey(Needle):
    """The needles differ in their names alone."""

    name = "multikey"
    about = "the same, with three more needles of other names"
    others: ClassVar[int] = 3


def _fact(name: str, value: str = "") -> str:
    return f"The magic number of {name} is {value}".rstrip()


@dataclass(frozen=True)
class Passkey(TextTask):
    """Nothing in the row is surprising but the key."""

    name = "passkey"
    about = "five digits between the same dull sentences, over and over"
    chance = 1 / 90_000
    has_depth = True

    def draw(self, row: Row) -> Sample:
        key = row.number(digits=5)
        piece = f"\nThe pass key is {key}. Keep it in mind: {key} is the pass key."
        question = ("\n\nWhat is the pass key? The pass key is", [key])
        return row.finish([piece], [row.depth], [question], 1.0, told=0, hay=row.hay.dull)


@dataclass(frozen=True)
class MultiValue(TextTask):
    """Two names have several numbers each, strewn; those of one are asked for, in their order."""

    name = "multivalue"
    about = "four numbers of one name, strewn among four of another: all, in order"
    chance = 1 / 9_000_000
    values: ClassVar[int] = 4

    def draw(self, row: Row) -> Sample:
        asked, other = row.names(2)
        values = row.numbers(2 * self.values)
        names = [asked] * self.values + [other] * self.values
        depths = sorted(row.places(self.values)) + row.places(self.values)
        pieces = [f"\nA magic number of {n} is {v}." for n, v in zip(names, values, strict=True)]
        question = (
            f"\n\nWhat are the magic numbers of {asked}, in their order?"
            f" The magic numbers of {asked} are"
        )
        return row.finish(pieces, depths, [(question, values[: self.values])], 0.5)


@dataclass(frozen=True)
class Variables(TextTask):
    """Two chains of names, each set to the one before it."""

    name = "variables"
    about = "names set to each other in two chains of four: those of one chain, in order"
    hops: ClassVar[int] = 4
    chance = hops / len(THINGS)

    def draw(self, row: Row) -> Sample:
        names, values = row.by.sample(THINGS, 2 * self.hops), row.numbers(2)
        pieces, depths = [], []
        for chain, value in enumerate(values):
            mine = names[chain * self.hops : (chain + 1) * self.hops]
            pieces += [f"\nSet {a} to {b}." for a, b in zip(mine, [value, *mine], strict=False)]
            depths += sorted(row.places(self.hops))
        question = f"\n\nWhich names have the value {values[0]}, in the order of their setting?"
        asks = [(f"{question} The names are", names[: self.hops])]
        return row.finish(pieces, depths, asks, 0.5)


@dataclass(frozen=True)
class MQAR(TextTask):
    """Multi-query associative recall: pairs strewn over the row, some of them asked for."""

    name = "mqar"
    about = "eight names with a thing each, strewn: four of them again, each to be followed by its"
    chance = 1 / len(THINGS)
    pairs: ClassVar[int] = 8
    questions: ClassVar[int] = 4

    def draw(self, row: Row) -> Sample:
        names, things = row.names(self.pairs), row.by.sample(THINGS, self.pairs)
        pieces = [f"\n{name}: {thing}" for name, thing in zip(names, things, strict=True)]
        picked = row.by.sample(range(self.pairs), self.questions)
        asks = [(f"\n{names[i]}:", [things[i]]) for i in picked]
        asks[0] = ("\n\nAgain:" + asks[0][0], asks[0][1])
        return row.finish(pieces, row.places(self.pairs), asks, 1 / self.pairs)


@dataclass(frozen=True)
class Phonebook(TextTask):
    """As many entries as there is room for; what is left is filled in front."""

    name = "phonebook"
    about = "as many names and numbers as fit: one number"
    chance = 1 / 7_200_000  # 100-1000 to 899-9999
    has_depth = True

    def draw(self, row: Row) -> Sample:
        lines, tails = self._entries(row)
        asked = round(row.depth * (len(lines) - 1))
        end, asks = tails[asked]
        filler = row.hay.cut(row.room(*lines, end), row.by)
        ids = [*row.begin, *filler, *(token for line in lines for token in line)]
        depth = asked / (len(lines) - 1)
        return Sample([*ids, *end], tuple(a.moved(len(ids)) for a in asks), 1 / len(lines), depth)

    def _entries(self, row: Row) -> tuple[list[list[int]], list[tuple[list[int], list[Ask]]]]:
        """Lines of the book, as many as fit beside the longest question; each one's question."""
        pen, taken = row.hay.pen, set[str]()
        lines: list[list[int]] = []
        tails: list[tuple[list[int], list[Ask]]] = []
        used = longest = 0
        while True:
            name = f"{row.by.choice(FIRST)} {row.by.choice(INITIALS)}. {row.by.choice(LAST)}"
            number = f"{row.by.randrange(100, 900)}-{row.by.randrange(1000, 10000)}"
            if taken & {name, number}:
                continue
            taken |= {name, number}
            line = pen.ids(f"\n{name}: {number}")
            tail = _tail(row.hay, [(f"\n\nWhat is the number of {name}?\n{name}:", [number])])
            used, longest = used + len(line), max(longest, len(tail[0]))
            if len(lines) < 2:
                row.room(*lines, line, [0] * longest)
            elif len(row.begin) + used + longest > row.length:
                return lines, tails
            lines.append(line)
            tails.append(tail)


INITIALS = "ABCDEFGHJKLMNOPRSTVWY"
TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        Needle(), Passkey(), MultiKey(), MultiValue(), Variables(), Phonebook(), MQAR()
    )
}  # fmt: skip
