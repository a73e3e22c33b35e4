"""Tokens on disk -> packed rows: an endless stream in which any row can be asked for by number.

    Packed    what one forward of a training step computes
    Rows      row i, a function of i alone       Packer: one store, shuffled; Mixture: several
    Loader    takes rows in order, for one process or a share of them; resumes at the exact row
    HeldOut   whole documents for bits per byte

A document is stored as  <s> t1 t2 ... tn </s>  and read as n+1 pairs of input and label:

    input   <s> t1 t2 ... tn
    label    t1 t2 ... tn </s>

so every token is predicted exactly once and </s> is never fed. Rows are cut from the stream of
pairs, not of tokens: where a row ends inside a document, the label of its last position is the
document's next token and the next row's first input is that token, so no label is lost and none
is missing. What a cut costs is context: a piece of a document always starts afresh from the state
after the meta tokens. Nothing here is padded, and nothing here knows the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hymba.train.sources import DataError
from hymba.train.store import TokenStore

Piece = tuple[int, int]  # where its first input lies in a TokenStore, how many pairs it has


@dataclass(frozen=True)
class Packed:
    """Pieces of documents end to end: what one forward of a training step computes.

    tokens, labels: (N,) int64, `labels[i]` is what follows `tokens[i]` in its document, or -100
    where nothing is to be predicted.
    lengths: tokens of each piece; their sum is N. A piece is a whole document or a cut of one.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, store: TokenStore, pieces: Sequence[Piece]) -> Packed:
        """Pieces of documents; one more token of each is read, for the last label."""
        read = [store.read(first, length + 1) for first, length in pieces]
        return cls(
            _int64([ids[:-1] for ids in read]),
            _int64([ids[1:] for ids in read]),
            tuple(length for _, length in pieces),
        )

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """Several as one, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.labels for part in parts]),
            tuple(length for part in parts for length in part.lengths),
        )


def _int64(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class Rows(Protocol):
    """Row number i of an endless stream, a function of i alone."""

    sequence_length: int

    def row(self, number: int) -> Packed:
        """`sequence_length` tokens in one or more pieces."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what row i is; survives JSON."""
        ...

    @property
    def bytes_per_label(self) -> float | None:
        """Mean UTF-8 bytes that one predicted token stands for; None where there is no text."""
        ...

    def epochs(self, rows: int) -> float:
        """How often the corpus has been seen after so many rows; 0.0 where that means nothing."""
        ...


class Packer:
    """Row i of an endless shuffled stream of rows, as a function of (store, length, seed, i).

    In each epoch the documents are shuffled and laid end to end, the stream is cut into rows of
    `sequence_length` pairs, and the rows are shuffled too (else the cuts of one long document
    would follow each other). The end that fills no row is left out, other documents each epoch.
    Because any row can be asked for, resuming and sharing rows between processes need no state
    but a row number.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int) -> None:
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        self.rows_per_epoch = int(store.pairs.sum()) // sequence_length
        if self.rows_per_epoch == 0:
            raise DataError(
                f"the corpus has {store.pairs.sum()} tokens, too few for one row of "
                f"{sequence_length}: give more text or a smaller sequence_length"
            )
        self._epoch = lru_cache(maxsize=2)(self._shuffle)  # rows of a batch may straddle two

    def row(self, number: int) -> Packed:
        return Packed.of(self.store, self.pieces(number))

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.store.identity,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }

    @property
    def bytes_per_label(self) -> float:
        return self.store.bytes_per_label

    def epochs(self, rows: int) -> float:
        return rows / self.rows_per_epoch

    def pieces(self, row: int) -> list[Piece]:
        """The pieces of documents that make up row number `row`, in order."""
        epoch, place = divmod(row, self.rows_per_epoch)
        documents, ends, rows = self._epoch(epoch)
        begin = int(rows[place]) * self.sequence_length
        stop = begin + self.sequence_length
        at = int(np.searchsorted(ends, begin, side="right"))
        found: list[Piece] = []
        while begin < stop:
            document, end = documents[at], int(ends[at])
            length = min(end, stop) - begin
            inside = begin - (end - int(self.store.pairs[document]))
            found.append((int(self.store.starts[document]) + inside, length))
            begin, at = begin + length, at + 1
        return found

    def _shuffle(
        self, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Order of the documents, where each ends in the stream of pairs, order of the rows."""
        # RandomState, not default_rng: numpy promises that its numbers never change.
        random = np.random.RandomState([self.seed % 2**32, epoch])
        documents = random.permutation(len(self.store.pairs))
        return (
            documents,
            np.cumsum(self.store.pairs[documents]),
            random.permutation(self.rows_per_epoch),
        )


class Mixture:
    """Rows of several sources by weights, as a function of (sources, weights, seed, i).

    Every BLOCK rows have a fixed number of each source's, the largest remainders of its share, in
    a shuffled order of their own. So the shares are exact at the end of a block, never far off
    inside one, and it needs no history to say which row of which source row i is.
    """

    BLOCK = 1024

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int) -> None:
        self.sources, self.seed = tuple(sources), seed
        self.sequence_length = sources[0].sequence_length
        if any(each.sequence_length != self.sequence_length for each in sources):
            raise ValueError("the sources of a mixture have rows of different lengths")
        self.counts = shares(weights, self.BLOCK)
        if 0 in self.counts:
            raise DataError(
                f"a source with weight {weights[self.counts.index(0)]:g} of {sum(weights):g} has "
                f"less than one row in {self.BLOCK}: give it more weight or leave it out"
            )
        self._block = lru_cache(maxsize=2)(self._shuffle)

    def row(self, number: int) -> Packed:
        source, place = self.place(number)
        return self.sources[source].row(place)

    def place(self, number: int) -> tuple[int, int]:
        """(source, its row) that row `number` is."""
        block, at = divmod(number, self.BLOCK)
        sources, before = self._block(block)
        source = int(sources[at])
        return source, block * self.counts[source] + int(before[at])

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": [each.identity for each in self.sources],
            "rows of each": list(self.counts),
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }

    @property
    def bytes_per_label(self) -> float | None:
        found = [each.bytes_per_label for each in self.sources]
        known = [(b, n) for b, n in zip(found, self.counts, strict=True) if b is not None]
        if len(known) < len(found):
            return None
        return sum(b * n for b, n in known) / self.BLOCK

    def epochs(self, rows: int) -> float:
        """Of all sources together: the rows taken over the rows there are."""
        seen = [each.epochs(self.BLOCK) for each in self.sources]  # by so many rows of each
        return rows / sum(self.BLOCK / each for each in seen) if all(seen) else 0.0

    def _shuffle(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row of a block: its source, and how many of that source lie before it."""
        random = np.random.RandomState([self.seed % 2**32, block, 1])  # 1: no packer's numbers
        sources = random.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        before = np.empty(self.BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            before[sources == source] = np.arange(count)
        return sources, before


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers that add up to `total` and are as near to the weights as can be."""
    if not weights or any(not math.isfinite(w) or w <= 0 for w in weights):
        raise DataError(f"weights must be numbers above 0, not {', '.join(map(str, weights))}")
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [math.floor(each) for each in exact]
    remainders = [floor - each for each, floor in zip(exact, counts, strict=True)]  # negative
    for source in sorted(range(len(weights)), key=lambda i: remainders[i])[: total - sum(counts)]:
        counts[source] += 1
    return tuple(counts)


class Loader:
    """Takes rows in order, alone or as one of several processes; its state is the next row."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.row = rows, 0
        self._made: tuple[tuple[int, ...], list[Packed]] | None = None

    def take(
        self, rows: int, micro: int | None = None, rank: int = 0, world: int = 1
    ) -> list[Packed]:
        """The next `rows` rows of all processes together, as micro-batches.

        Process `rank` of `world` gets every world-th of them, in micro-batches of at most `micro`
        rows (one if None). Which rows a step has does not depend on either number.
        """
        self.prepare(rows, micro, rank, world)
        assert self._made is not None
        (_, made), self._made = self._made, None
        self.row += rows
        return made

    def prepare(self, rows: int, micro: int | None = None, rank: int = 0, world: int = 1) -> None:
        """Make what the next `take` will give, if it is asked for the same."""
        if rows % world:
            raise ValueError(f"{rows} rows cannot be shared evenly by {world} processes")
        mine = range(self.row + rank, self.row + rows, world)
        micro = micro or len(mine)
        key = (self.row, rows, micro, rank, world)
        if self._made is None or self._made[0] != key:
            parts = [mine[first : first + micro] for first in range(0, len(mine), micro)]
            self._made = key, [Packed.joined([self.rows.row(i) for i in part]) for part in parts]

    @property
    def epoch(self) -> float:
        """How often the corpus has been seen, 0.0 at the start."""
        return self.rows.epochs(self.row)

    def state_dict(self) -> dict[str, Any]:
        """The next row, and all that decides what it will be."""
        return {"row": self.row, **self.rows.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved row; DataError if its number would now mean another row."""
        for key, ours in self.rows.identity.items():
            if state.get(key) != ours:
                raise DataError(
                    f"the checkpoint was made with {key} {state.get(key)}, now it is {ours}: go "
                    f"on with the same {key}, or start in another folder"
                )
        self.row = int(state["row"])


class HeldOut:
    """Whole documents, the same ones every time, for the bits per byte that a model needs.

    Documents are taken in a fixed shuffled order until `most_tokens` are reached (at least one;
    all if None), and cut into pieces of at most `sequence_length`. Whole documents make the bytes
    exact for any tokenizer: bits per byte = nats of all labels (</s> too: a code for a text must
    say where it ends) / ln 2 / `bytes`.
    """

    def __init__(
        self, store: TokenStore, sequence_length: int, rows: int, most_tokens: int | None = None
    ) -> None:
        self._store, self._room = store, rows * sequence_length
        order = np.random.RandomState(0).permutation(len(store.pairs))
        totals = np.cumsum(store.pairs[order])
        many = len(order)
        if most_tokens is not None:
            many = max(1, int(np.searchsorted(totals, most_tokens, side="right")))
        self._chosen = np.sort(order[:many])
        self._length = sequence_length
        self.labels = int(store.pairs[self._chosen].sum())
        self.bytes = int(store.documents[self._chosen, 1].sum())

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches)

    def __getitem__(self, number: int) -> Packed:
        """Batch `number`, so that several processes can share them."""
        return Packed.of(self._store, self._batches[number])

    def __iter__(self) -> Iterator[Packed]:
        """Batches of whole pieces, at most rows * sequence_length tokens each."""
        return (self[number] for number in range(len(self)))

    @cached_property
    def _batches(self) -> list[list[Piece]]:
        batches: list[list[Piece]] = [[]]
        room = self._room
        for piece in self._pieces():
            if piece[1] > room:
                batches.append([])
                room = self._room
            batches[-1].append(piece)
            room -= piece[1]
        return batches

    def _pieces(self) -> Iterator[Piece]:
        for document in self._chosen:
            start, pairs = int(self._store.starts[document]), int(self._store.pairs[document])
            for begin in range(0, pairs, self._length):
                yield start + begin, min(self._length, pairs - begin)
