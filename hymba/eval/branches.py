"""Log-probabilities of how rows end, where what rows share at their beginnings is computed once.

    scores = Scorer(model).score([Ask(context + option, len(option)) for option in options])

Rows are put into a tree of their beginnings: the examples in front of a question, the question, its
options. A level of the tree is one flat batch of rows of any length, without padding; the next one
goes on from copies of the cache that it left. An obvious twin computes each row alone: the numbers
are the same but for rounding, however the rows are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

Row = tuple[int, ...]

# Another level is another pass over all weights: worth it for so many rows less.
WORTH = 32
# New rows in a batch of "auto": what fills a device. Each costs a few hundred kB at most.
AUTO = {"cuda": 16384, "cpu": 2048}
# Sequences of a level hold copies of what came before: in tokens, for each row of the budget.
HELD = 8
SEQUENCES = 256  # each with the states of its SSM, which are as large for a short one
LOGITS = {"cuda": 4096, "cpu": 256}  # rows of the vocabulary's width at once


class Ask(NamedTuple):
    """A row of tokens, of which the last so many (1 or more) are asked for."""

    tokens: Row
    last: int


class Score(NamedTuple):
    logprob: float  # of the asked tokens together, in nats
    greedy: bool  # each of them is the likeliest there


@dataclass
class Node:
    """Tokens start to end of a row, which all `rows` (numbers of rows) have in common."""

    row: Row
    start: int
    end: int
    parent: int = -1  # its place in the level before
    children: list[Node] = field(default_factory=list)


def shared(a: Row, b: Row) -> int:
    """How many tokens two rows begin with alike."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


def tree(rows: Sequence[Row], worth: int = WORTH) -> list[Node]:
    """The tree of different rows, sorted; each row ends where a node does."""
    return list(_grow(rows, 0, 0, worth))


def _grow(rows: Sequence[Row], at: int, depth: int, worth: int) -> Iterator[Node]:
    """Nodes from token `at` on for rows whose first `depth` tokens are alike."""
    if rows and len(rows[0]) == depth:  # sorted: only the first can end here
        if depth > at:
            yield Node(rows[0], at, depth)
        rows = rows[1:]
    for _, group in groupby(rows, lambda row: row[depth]):
        alike = list(group)
        end = shared(alike[0], alike[-1])
        if len(alike) == 1 or (len(alike) - 1) * (end - at) >= worth:
            yield Node(alike[0], at, end, children=list(_grow(alike, end, end, worth)))
        else:
            yield from _grow(alike, at, end, worth)


def levels(roots: list[Node]) -> Iterator[list[Node]]:
    """The tree from its roots on, a level at a time; `parent` is filled in."""
    level = roots
    while level:
        yield level
        below = []
        for place, node in enumerate(level):
            for child in node.children:
                child.parent = place
                below.append(child)
        level = below


def first_batch(asks: Sequence[Ask], order: Sequence[int], room: Room) -> list[int]:
    """The first of the numbers of asks in `order` (sorted), as many as are computed together."""
    batch: list[int] = []
    new = held = 0
    for number in order:
        row = asks[number].tokens[:-1]
        alike = shared(row, asks[batch[-1]].tokens[:-1]) if batch else 0
        # Rows that are alike, but for the last token, are one sequence.
        new, held = new + len(row) - alike, held + len(row) * (alike < len(row))
        if batch and not room.takes(len(batch) + 1, new, held):
            break
        batch.append(number)
    return batch


def deal(asks: Sequence[Ask], shares: int) -> list[list[int]]:
    """Numbers of asks for each of several processes: about as much work, neighbours together."""
    order = sorted(range(len(asks)), key=lambda number: asks[number].tokens)
    costs: list[int] = []
    before: Row = ()
    for number in order:
        row = asks[number].tokens[:-1]
        costs.append(len(row) - shared(row, before) + 1)  # no ask is for nothing
        before = row
    hands: list[list[int]] = [[] for _ in range(shares)]
    done, total = 0, sum(costs)
    for number, cost in zip(order, costs, strict=True):
        hands[min(shares - 1, done * shares // total)].append(number)
        done += cost
    return hands


class Room(NamedTuple):
    """What may be computed together: so many asks, or as many as fit a budget of tokens."""

    asks: int | None
    tokens: int

    def takes(self, asks: int, new: int, held: int) -> bool:
        if self.asks is not None:
            return asks <= self.asks
        return new <= self.tokens and held <= HELD * self.tokens and asks <= 4 * SEQUENCES


class Scorer:
    """Scores asks with a model: `batch` at a time, or as many as fit a budget of tokens."""

    def __init__(self, model: LanguageModel, batch: int | None = None, worth: int = WORTH):
        self.model, self.worth = model, worth
        self.room = Room(batch, AUTO.get(model.device.type, AUTO["cpu"]))
        self.computed = 0  # rows that went through the model, all beginnings once

    def score(self, asks: Sequence[Ask], done: Callable[[int], object] = int) -> list[Score]:
        """One score for each ask, in their order; `done` is told how many more are known."""
        scores: list[Score | None] = [None] * len(asks)
        left = sorted(range(len(asks)), key=lambda number: asks[number].tokens)
        while left:
            batch = first_batch(asks, left, self.room)
            try:
                found = self._together([asks[number] for number in batch])
            except torch.OutOfMemoryError:
                self._shrink(len(batch))
                continue
            for number, score in zip(batch, found, strict=True):
                scores[number] = score
            left = left[len(batch) :]
            done(len(batch))
        return [score for score in scores if score is not None]

    def _shrink(self, asks: int) -> None:
        torch.cuda.empty_cache()
        if asks == 1:
            raise UserError("the device has too little memory for one row of this task")
        if self.room.asks is not None:
            raise UserError(f"the device has too little memory for --batch {self.room.asks}")
        self.room = self.room._replace(tokens=max(1, self.room.tokens // 2))

    @torch.no_grad()
    def _together(self, asks: Sequence[Ask]) -> list[Score]:
        wanted = _Wanted(asks)
        roots = tree(sorted({ask.tokens[:-1] for ask in asks}), self.worth)
        cache = None
        for level in levels(roots):
            lengths = [node.end - node.start for node in level]
            self.computed += sum(lengths)
            if cache is not None:
                cache.select([node.parent for node in level])
            elif any(node.children for node in level):
                cache = self.model.new_cache(len(level))
            batch = Batch.of(lengths, [node.start for node in level], device=self.model.device)
            ids = [token for node in level for token in node.row[node.start : node.end]]
            rows = torch.tensor(ids, device=self.model.device)
            hidden = self.model(rows, batch, cache)  # (N, D)
            wanted.take(self.model, hidden, level)
        return wanted.scores()


class _Wanted:
    """Which rows of a level answer which asks, and what they said."""

    def __init__(self, asks: Sequence[Ask]):
        self.asks = asks
        self.logprobs = [0.0] * len(asks)
        self.greedy = [True] * len(asks)
        self.of: dict[Row, list[int]] = {}
        for number, ask in enumerate(asks):
            self.of.setdefault(ask.tokens[:-1], []).append(number)
        self.sorted = sorted(self.of)

    def take(self, model: LanguageModel, hidden: Tensor, level: Sequence[Node]) -> None:
        pairs = list(self._pairs(level))  # (row of the level, its next token, ask)
        rows = sorted({row for row, _, _ in pairs})
        place = {row: i for i, row in enumerate(rows)}
        at_once = LOGITS.get(hidden.device.type, LOGITS["cpu"])
        pairs.sort()
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            mine = [pair for pair in pairs if first <= place[pair[0]] < first + at_once]
            x = model.logits(hidden[torch.tensor(part, device=hidden.device)]).float()  # (n, V)
            at, tokens = torch.tensor([(place[r] - first, t) for r, t, _ in mine]).T.to(x.device)
            chosen = x[at, tokens] - x.logsumexp(-1)[at]
            likeliest = x.argmax(-1)[at] == tokens
            found = zip(mine, chosen.tolist(), likeliest.tolist(), strict=True)
            for (_, _, ask), logprob, best in found:
                self.logprobs[ask] += logprob
                self.greedy[ask] &= best

    def _pairs(self, level: Sequence[Node]) -> Iterator[tuple[int, int, int]]:
        offset = 0
        for node in level:
            for row in self._below(node):
                for number in self.of[row]:
                    ask = self.asks[number]
                    begin = max(node.start, len(row) - ask.last)
                    for at in range(begin, min(node.end, len(row))):
                        yield offset + at - node.start, ask.tokens[at + 1], number
            offset += node.end - node.start

    def _below(self, node: Node) -> Iterator[Row]:
        """Rows that go through a node."""
        if not node.children:
            yield node.row
            return
        # Of the rows that begin like this one, those of its children, and the one that ends here.
        if node.row[: node.end] in self.of:
            yield node.row[: node.end]
        for child in node.children:
            yield from self._below(child)

    def scores(self) -> list[Score]:
        return [Score(*pair) for pair in zip(self.logprobs, self.greedy, strict=True)]
