"""What to train on, as a user says it: names of sources in, a tokenizer and rows out.

    data = open_data(DataConfig(sources=("corpus.jsonl=0.7", "python=0.3")))
    rows = data.rows(sequence_length=2048, seed=0)       # Rows: any row by its number
    data.tokenizer, data.held_out                        # what no row has

What it is made of, in this order, each step deterministic and resumable:

    readers     how the text of a file is read         text, JSON lines, parquet
    sources     which documents there are              Files, PythonFiles, HubStream
    store       their tokens, once, memory-mapped      prepare(), TokenStore
    rows        an endless shuffled stream of rows     Packer, Mixture, Loader, HeldOut

Tokens and a learnt tokenizer lie in `DataConfig.folder` under names that say what they were made
of, so a second run with the same data starts at once, and runs with other data do not disturb it.
No torch here until data is opened: a command's help reads these options too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hymba.train import python_files, sources
from hymba.train.readers import DataError
from hymba.train.sources import Source, digest, key_of

if TYPE_CHECKING:
    from hymba.tokenizer import Tokenizer
    from hymba.train.rows import Rows
    from hymba.train.store import TokenStore

Progress = Callable[[str, int, int | None], None]  # what, how much of it is done, of how much

TOKENIZER_BYTES = 256 << 20  # of text that a tokenizer is learnt from, all sources together


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    sources: tuple[str, ...] = ("python-library",)
    """What to train on, each SOURCE or SOURCE=WEIGHT (its share of the rows; without weights all
    text counts alike). A source is a text, .jsonl(.gz) or .parquet file, a folder of such files,
    `python` (sources of all installed packages), `python-library` (the standard library alone), or
    `hf:NAME[:CONFIG[:SPLIT]]` (a dataset)."""
    held_out: tuple[str, ...] = ()
    """Sources that are never trained on; without any, a part of each source is held out."""
    held_out_percent: float = 5.0
    """That part, chosen by a hash of each document's name or text (0: none)."""
    tokenizer: str = "train"
    """A folder with a tokenizer or a model, a hub id, or `train`: learn one from the sources."""
    vocab_size: int = 16384
    """Tokens of a tokenizer that is learnt here."""
    text_key: str = "text"
    """Where a JSON line, a parquet row or a dataset's row has its text."""
    folder: Path = Path("runs/data")
    """Where tokens and a learnt tokenizer are kept, shared by runs."""
    most_tokens: int | None = None
    """Tokens to take of each source at most (for streams, which may be longer than your disk)."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("there is nothing to train on: name a source")
        if not 0 <= self.held_out_percent < 100:
            raise DataError(f"held_out_percent is {self.held_out_percent}: use 0 to below 100")
        if self.most_tokens is not None and self.most_tokens < 1:
            raise DataError(f"most_tokens is {self.most_tokens}, but must be 1 or more")


@dataclass(frozen=True)
class Corpus:
    """One source's documents that are trained on."""

    name: str
    weight: float | None
    store: TokenStore

    def __str__(self) -> str:
        return _line(self.name, self.store) + (f", weight {self.weight:g}" if self.weight else "")


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on."""

    tokenizer: Tokenizer
    corpora: tuple[Corpus, ...]
    held_out: TokenStore | None

    def rows(self, sequence_length: int, seed: int) -> Rows:
        """All sources as one stream: mixed by their weights, or end to end if they have none."""
        from hymba.train.rows import Mixture, Packer
        from hymba.train.store import TokenStore

        weights = [corpus.weight for corpus in self.corpora if corpus.weight is not None]
        if len(self.corpora) == 1 or not weights:
            stores = [corpus.store for corpus in self.corpora]
            return Packer(TokenStore.joined(stores), sequence_length, seed)
        packers = []
        for corpus in self.corpora:
            try:
                packers.append(Packer(corpus.store, sequence_length, seed))
            except DataError as error:
                raise DataError(f"{corpus.name}: {error}") from error
        return Mixture(packers, weights, seed)

    @property
    def facts(self) -> tuple[str, ...]:
        """A line for each source, and one for what is held out."""
        held = (_line("held out", self.held_out),) if self.held_out else ()
        return (*map(str, self.corpora), *held)


def _line(name: str, store: TokenStore) -> str:
    facts = store.manifest
    return (
        f"{name}: {facts['documents']:,} documents, {facts['bytes'] / 1e6:,.2f} MB, "
        f"{facts['tokens']:,} tokens of {store.bytes_per_label:.2f} bytes"
    )


# ---- opening


def open_data(config: DataConfig, progress: Progress | None = None) -> Data:
    """Tokenizer, rows and held-out documents; makes what is not in `config.folder` yet.

    DataError (or the tokenizer's or hub's error) in one line for all that a user can do wrong.
    """
    named = [parse(text) for text in config.sources]
    weights = _weights(named)
    train = [find(name, config.text_key) for name, _ in named]
    held = [find(name, config.text_key) for name in config.held_out]
    twice = [name for i, (name, _) in enumerate(named) if name in [n for n, _ in named[:i]]]
    if twice:
        raise DataError(f"{twice[0]} is given twice: name it once, with a higher weight")
    tokenizer = _tokenizer(config, train, progress)

    def prepare(name: str, source: Source) -> TokenStore:
        return _prepare(config, name, source, tokenizer, progress)

    stores = [prepare(name, source) for (name, _), source in zip(named, train, strict=True)]
    others = [prepare(name, source) for name, source in zip(config.held_out, held, strict=True)]
    stores, held_out = _separate(config, stores, others)
    corpora = []
    for (name, _), weight, store in zip(named, weights, stores, strict=True):
        if not len(store.documents):
            raise DataError(f"{name} has no documents left that are not held out: give more")
        corpora.append(Corpus(name, weight, store))
    return Data(tokenizer, tuple(corpora), held_out)


def parse(text: str) -> tuple[str, float | None]:
    """(source, weight) of SOURCE=WEIGHT; a file's own name may have a `=` in it."""
    name, sign, weight = text.rpartition("=")
    if not sign or Path(text).expanduser().exists():
        return text, None
    try:
        number = float(weight)
    except ValueError:
        raise DataError(f"{text}: the weight {weight!r} is no number") from None
    if not 0 < number < float("inf"):
        raise DataError(f"{text}: a weight is above 0; leave out a source you do not want")
    return name, number


def _weights(named: Sequence[tuple[str, float | None]]) -> list[float | None]:
    bare = [name for name, weight in named if weight is None]
    if bare and len(bare) < len(named):
        raise DataError(f"{bare[0]} has no weight: give one to each source (NAME=0.5), or to none")
    return [weight for _, weight in named]


def find(name: str, key: str = "text") -> Source:
    """The source of this name; `key` is where its rows have their text."""
    if name == "python":
        return python_files.PythonFiles.here()
    if name == "python-library":
        return sources.python_library()
    if name.startswith("hf:"):
        return sources.HubStream.parse(name.removeprefix("hf:"), key)
    path = Path(name).expanduser()
    if not name:  # Path("") is the folder we are in
        raise DataError("a source has no name: say . for the folder you are in")
    if path.is_dir():
        return sources.folder(path, key)
    if path.is_file():
        return sources.file(path, key)
    raise DataError(
        f"there is no file or folder {name} (other sources: python, python-library, hf:NAME)"
    )


def _separate(
    config: DataConfig, stores: list[TokenStore], others: list[TokenStore]
) -> tuple[list[TokenStore], TokenStore | None]:
    """(what to train on of each store, what is held out of all). No text is in both.

    A store so small that all of it would be held out is trained on as a whole.
    """
    from hymba.train.store import TokenStore

    if not others:
        if not config.held_out_percent:
            return stores, None
        parts = [store.split(config.held_out_percent) for store in stores]
        good = [bool(len(train.documents) and len(held.documents)) for train, held in parts]
        others = [held for (_, held), use in zip(parts, good, strict=True) if use]
        stores = [
            train if use else store
            for store, (train, _), use in zip(stores, parts, good, strict=True)
        ]
    if not others:
        raise DataError(
            f"{config.held_out_percent:g} percent of the sources is no document, or all: give more "
            "text, another held_out_percent, 0 for none, or other sources as held_out"
        )
    held_out = TokenStore.joined(others)
    return [store.without(held_out) for store in stores], held_out


# ---- what is kept in the folder


def _prepare(
    config: DataConfig, name: str, source: Source, tokenizer: Tokenizer, progress: Progress | None
) -> TokenStore:
    from hymba.train import store

    def tell(done: int, total: int | None) -> None:
        if progress:
            progress(f"tokenising {name}", done, total)

    made_of = [tokenizer.fingerprint, source.fingerprint, str(config.most_tokens)]
    place = config.folder / f"{_slug(name)}-{digest(made_of)[:16]}"
    return store.prepare(place, source, tokenizer, tell, config.most_tokens)


def _slug(name: str) -> str:
    """A name that a folder may have, for people: the digest behind it tells sources apart."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-40:] or "source"


def _tokenizer(config: DataConfig, train: Sequence[Source], progress: Progress | None) -> Tokenizer:
    from hymba import hub
    from hymba.tokenizer import TOKENIZER_FILES, Tokenizer

    if config.tokenizer != "train":
        return Tokenizer.from_folder(hub.find(config.tokenizer, TOKENIZER_FILES))
    percent = 0 if config.held_out else config.held_out_percent
    settings = [str(config.vocab_size), f"{percent:g}", str(TOKENIZER_BYTES)]
    made_of = digest([*(source.fingerprint for source in train), *settings])
    place = config.folder / f"tokenizer-{config.vocab_size}-{made_of[:16]}"
    if not (place / "tokenizer.json").is_file():
        texts = _texts(train, percent, progress)
        _keep(Tokenizer.train(texts, config.vocab_size), place)
    return Tokenizer.from_folder(place)


def _texts(train: Sequence[Source], percent: float, progress: Progress | None) -> Iterator[str]:
    """The first documents of each source that are not held out, as many bytes of each."""
    done = 0
    for number, source in enumerate(train, 1):
        room = TOKENIZER_BYTES * number // len(train)
        for document in source.documents():
            key = key_of(document.text) if document.key is None else document.key
            if key < percent / 100 * 2.0**63:
                continue
            yield document.text
            done += len(document.text)
            if progress:
                progress("learning a tokenizer", done, None)
            if done >= room:
                break


def _keep(tokenizer: Tokenizer, place: Path) -> None:
    """Save whole or not at all; where another process was quicker, its twin stays."""
    unfinished = place.with_name(f"{place.name}.unfinished-{os.getpid()}")
    tokenizer.save(unfinished)
    try:
        os.rename(unfinished, place)
    except OSError:
        shutil.rmtree(unfinished)
        if not place.is_dir():
            raise
