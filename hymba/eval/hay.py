"""Text around what is to be recalled: tokens of the sources that Python brings along, cut where
lines end, so that a row has exactly as many tokens as asked for and reads like a text.

    hay = Hay.of(subject, tokens=8192, seed=0)
    needle = hay.pen.ids("\\nThe magic number of grey heron is 4711.")
    ids, depths = hay.around([needle], [0.5], hay.cut(1000, random.Random(0)))

Pieces begin with a line's end or a space and are encoded behind a letter: tokenizers cut there
anyway, so the pieces' tokens, laid end to end, are those of the whole text.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hymba.errors import UserError
from hymba.eval.subject import Subject, TokenizerOf
from hymba.train.data import find
from hymba.train.sources import key_of

LIBRARY = "python-library"  # the standard library: every machine has it
HELD_OUT = 0.05  # of its files, by a hash of their names: what `hymba train` never trains on
BYTES_A_TOKEN = 8  # more than any tokenizer has of source text
DULL = "\n".join(["The road is long. The river is wide.", "Hills rise far away. Rain falls."] * 8)
LEAST = 200_000  # characters of hay, however short the rows


class TextError(UserError):
    """A text that cannot be read or is too short; the message says what to do."""


@dataclass
class Pen:
    """Text to tokens, as they stand inside a text."""

    tokenizer: TokenizerOf

    @cached_property
    def _letter(self) -> list[int]:
        return self.tokenizer.encode("a")

    def ids(self, text: str) -> list[int]:
        """Of a piece that begins with white space."""
        ids = self.tokenizer.encode("a" + text)
        before = len(self._letter)
        return ids[before:] if ids[:before] == self._letter else self.tokenizer.encode(text)

    def text(self, ids: Sequence[int]) -> str:
        """What ids say inside a text, where some decoders would strip a first space."""
        return self.tokenizer.decode([*self._letter, *ids])[1:]


@dataclass
class Hay:
    """A long text that rows are cut from."""

    pen: Pen
    text: str

    @staticmethod
    def of(subject: Subject, tokens: int, seed: int = 0, text: str | None = None) -> Hay:
        """Enough for rows of so many tokens; the library's files in the seed's order, or `text`."""
        text = library_text(max(LEAST, BYTES_A_TOKEN * tokens), seed) if text is None else text
        if not text.strip():
            raise TextError("the text around the needles is empty")
        return Hay(Pen(subject.tokenizer), text)

    @cached_property
    def ids(self) -> list[int]:
        return self.pen.ids("\n" + self.text)

    @cached_property
    def dull(self) -> Hay:
        """A haystack in which nothing is new."""
        return Hay(self.pen, DULL)

    @property
    def digest(self) -> str:
        """Other machines may have other sources."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def _ends(self) -> list[int]:
        """Where a token with a line's end stands: a piece may be put in front of it."""
        found = {token: "\n" in self.pen.text([token]) for token in set(self.ids)}
        return [place for place, token in enumerate(self.ids) if found[token]] or [0]

    def cut(self, count: int, draw: random.Random) -> list[int]:
        """So many tokens in a row, from the end of some line on; round where the text is over."""
        start = draw.choice(self._ends)
        turns = -(-(start + count) // len(self.ids))
        return (self.ids * turns)[start : start + count]

    def breaks(self, ids: Sequence[int]) -> list[int]:
        """Places in a cut that begin a line: its two ends, and in front of lines' ends."""
        ends = {token for token in set(ids) if "\n" in self.pen.text([token])}
        return [0, *(i for i, token in enumerate(ids) if i and token in ends), len(ids)]

    def around(
        self, pieces: Sequence[Sequence[int]], depths: Sequence[float], hay: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """`hay` with each piece put in at the line nearest to its depth (0: in front of all, 1:
        behind all), pieces of one place in their order. The ids, and the depths it came to."""
        breaks = self.breaks(hay)
        places = [_nearest(breaks, depth * len(hay)) for depth in depths]
        order = sorted(range(len(pieces)), key=lambda i: (places[i], i))
        ids: list[int] = []
        done = 0
        for number in order:
            ids += [*hay[done : places[number]], *pieces[number]]
            done = places[number]
        return ids + list(hay[done:]), [place / max(1, len(hay)) for place in places]


def _nearest(breaks: Sequence[int], place: float) -> int:
    right = bisect_left(breaks, place)
    near = breaks[max(0, right - 1) : right + 1]
    return min(near, key=lambda x: abs(x - place))


def library_text(characters: int, seed: int) -> str:
    """So much of the standard library, whole files in an order that the seed gives."""
    source = find(LIBRARY)
    texts = [document.text for document in source.documents()]
    random.Random(f"hay {seed}").shuffle(texts)
    chosen, size = [], 0
    for text in texts:
        if size >= characters:
            break
        chosen.append(text.strip())
        size += len(text)
    return "\n\n".join(chosen)


def documents(files: Sequence[str] = ()) -> list[str]:
    """Texts of the user's files (as `hymba train` reads them), or the part of the standard library
    that `hymba train` holds out unless told otherwise."""
    if not files:
        found = list(find(LIBRARY).documents())
        keys = [key_of(x.text) if x.key is None else x.key for x in found]
        return [x.text for x, key in zip(found, keys, strict=True) if key < HELD_OUT * 2.0**63]
    texts = [document.text for name in files for document in find(name).documents()]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextError(f"{', '.join(files)}: there is no text in it")
    return texts
