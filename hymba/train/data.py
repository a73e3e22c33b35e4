"""Text -> tokens on disk -> packed rows, every step deterministic and resumable.

    sources   which documents there are            python_library(), split(), Files
    store     their tokens, once, memory-mapped    prepare(), TokenStore
    rows      an endless shuffled stream of rows   Packer, Loader, Packed
    held out  whole documents for bits per byte    HeldOut

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

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hymba.errors import UserError
from hymba.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # documents done, documents in all

FORMAT = 1  # of a token store; a store of another format is made again
ENCODE_AT_ONCE = 64  # documents per call into the tokenizer, which spreads them over the cores


class DataError(UserError):
    """Data that cannot be found, read or packed; the message says what to do."""


# ------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Documents in a fixed order, and a fingerprint that changes when they do."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Texts:
    """Documents held in memory."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    @property
    def fingerprint(self) -> str:
        return _digest(hashlib.sha256(text.encode()).hexdigest() for text in self.texts)


@dataclass(frozen=True)
class Files:
    """One document per UTF-8 file; `names` are paths below `root` with forward slashes."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return (self._text(name) for name in self.names)

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and times of change: no file is read, so it costs no time."""
        found = ((name, (self.root / name).stat()) for name in self.names)
        return _digest(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)

    def _text(self, name: str) -> str:
        try:
            # Not read_text: it would turn \r\n into \n, and bits per byte counts real bytes.
            return (self.root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root / name} is not UTF-8 text: {error}") from error


# Left out of the library's sources: tests (absent on many systems, so that the corpus would depend
# on the machine), other people's packages, and two folders of generated tables (character maps,
# which are near copies of each other and would leak into the held-out files, and help topics).
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data".split()
)


def python_library(root: Path | None = None) -> Files:
    """The sources of Python's standard library: real text that every machine has (about 10 MB).

    Exact copies count once; files that are empty or not UTF-8 are left out. DataError where the
    library has no sources (some minimal or zipped installations).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if content.strip() and digest not in seen and _is_utf8(content):
            seen.add(digest)
            names.append(relative.as_posix())
    if not names:
        raise DataError(f"{root} holds no Python sources: give a folder of text files instead")
    return Files(root, tuple(names))


def split(files: Files, percent: float = 5.0) -> tuple[Files, Files]:
    """(train, held out): about `percent` of the files, by a hash of the name, are held out.

    A file stays on its side whatever other files exist, so machines and Python versions agree.
    """
    held = {name for name in files.names if _share(name) < percent / 100}
    train = tuple(name for name in files.names if name not in held)
    out = tuple(name for name in files.names if name in held)
    if not train or not out:
        raise DataError(
            f"{len(files)} files below {files.root} cannot be split into training and held-out "
            f"files at {percent} percent: give more files or another percentage"
        )
    return Files(files.root, train), Files(files.root, out)


def _share(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _digest(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()


# --------------------------------------------------------------------------------------- store


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a corpus in a folder: tokens.bin (flat ids), documents.npy and manifest.json.

    `manifest`: format, dtype, tokenizer and source (fingerprints), documents, tokens, bytes.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`; DataError where there is none or it is damaged."""
        try:
            store = cls(folder, json.loads((folder / "manifest.json").read_text()))
            whole = store.manifest["tokens"] * np.dtype(store.manifest["dtype"]).itemsize
            good = (folder / "tokens.bin").stat().st_size == whole
            good = good and store.documents.shape == (store.manifest["documents"], 2)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no token store: {error}") from error
        if not good:
            raise DataError(f"the token store {folder} is damaged: delete it to make it again")
        return store

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All documents end to end, (tokens,), read from disk as touched."""
        dtype = np.dtype(self.manifest["dtype"])
        return np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r")

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """(documents, 2): tokens with <s> and </s>, and UTF-8 bytes of the text."""
        loaded: NDArray[np.int64] = np.load(self.folder / "documents.npy")
        return loaded

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(documents,): where each document begins in `tokens`."""
        lengths = self.documents[:, 0]
        return np.cumsum(lengths) - lengths

    @property
    def pairs(self) -> NDArray[np.int64]:
        """(documents,): pairs of input and label that each document gives."""
        return self.documents[:, 0] - 1

    @property
    def bytes_per_label(self) -> float:
        """Mean UTF-8 bytes that one predicted token stands for."""
        return float(self.documents[:, 1].sum() / self.pairs.sum())

    @property
    def identity(self) -> str:
        """Equal exactly when tokens and order of the documents are (for resuming)."""
        return f"{self.manifest['tokenizer'][:16]}-{self.manifest['source'][:16]}"


def prepare(
    folder: str | Path, source: Source, tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenStore:
    """The token store of `source` in `folder`: the one that is there if it fits, else a new one.

    A new one appears whole or not at all: it is written beside its place and renamed.
    """
    folder = Path(folder)
    wanted = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "source": source.fingerprint,
    }
    try:
        store = TokenStore.open(folder)
        if wanted.items() <= store.manifest.items():
            return store
    except DataError:
        pass  # absent or damaged: made again below
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        counts = _write_tokens(unfinished, source, tokenizer, progress)
        (unfinished / "manifest.json").write_text(json.dumps(wanted | counts, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore.open(folder)


def _write_tokens(
    folder: Path, source: Source, tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, Any]:
    """Write tokens.bin and documents.npy; return the manifest's counts."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or eos is None:
        raise DataError("the tokenizer names no tokens that begin and end a document")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    sizes: list[tuple[int, int]] = []
    documents = iter(source)
    with open(folder / "tokens.bin", "wb") as file:
        while texts := list(islice(documents, ENCODE_AT_ONCE)):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                file.write(np.array([bos, *ids, eos], dtype).tobytes())
                sizes.append((len(ids) + 2, len(text.encode())))
            if progress:
                progress(len(sizes), len(source))
    if not sizes:
        raise DataError("there are no documents to tokenise")
    counts = np.array(sizes, np.int64)  # (documents, 2)
    np.save(folder / "documents.npy", counts)
    return {
        "dtype": dtype.str,
        "documents": len(sizes),
        "tokens": int(counts[:, 0].sum()),
        "bytes": int(counts[:, 1].sum()),
    }


# ---------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Packed:
    """Pieces of documents end to end: what one forward of a training step computes.

    tokens, labels: (N,) int64, `labels[i]` is what follows `tokens[i]` in its document.
    lengths: tokens of each piece; their sum is N. A piece is a whole document or a cut of one.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, store: TokenStore, pieces: Sequence[Piece]) -> Packed:
        inputs = [store.tokens[first : first + length] for first, length in pieces]
        labels = [store.tokens[first + 1 : first + 1 + length] for first, length in pieces]
        return cls(_int64(inputs), _int64(labels), tuple(length for _, length in pieces))


Piece = tuple[int, int]  # where its first input lies in TokenStore.tokens, how many pairs it has


def _int64(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


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


class Loader:
    """Takes rows from a packer in order; its state is the number of the next row."""

    def __init__(self, packer: Packer) -> None:
        self.packer, self.row = packer, 0

    def take(self, rows: int) -> Packed:
        """The next `rows` rows as one flat batch of rows * sequence_length tokens."""
        numbers = range(self.row, self.row + rows)
        self.row += rows
        pieces = [piece for number in numbers for piece in self.packer.pieces(number)]
        return Packed.of(self.packer.store, pieces)

    @property
    def epoch(self) -> float:
        """How often the corpus has been seen, 0.0 at the start."""
        return self.row / self.packer.rows_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The next row, and all that decides what it will be."""
        return {"row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved row; DataError if its number would now mean another row."""
        for key, ours in self._identity().items():
            if state[key] != ours:
                raise DataError(
                    f"the checkpoint was made with {key} {state[key]}, now it is {ours}: go on "
                    f"with the same {key}, or start in another folder"
                )
        self.row = int(state["row"])

    def _identity(self) -> dict[str, Any]:
        packer = self.packer
        return {
            "corpus": packer.store.identity,
            "sequence_length": packer.sequence_length,
            "seed": packer.seed,
        }


# ------------------------------------------------------------------------------------ held out


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

    def __iter__(self) -> Iterator[Packed]:
        """Batches of whole pieces, at most rows * sequence_length tokens each."""
        waiting: list[Piece] = []
        room = self._room
        for piece in self._pieces():
            if piece[1] > room:
                yield Packed.of(self._store, waiting)
                waiting, room = [], self._room
            waiting.append(piece)
            room -= piece[1]
        yield Packed.of(self._store, waiting)

    def _pieces(self) -> Iterator[Piece]:
        for document in self._chosen:
            start, pairs = int(self._store.starts[document]), int(self._store.pairs[document])
            for begin in range(0, pairs, self._length):
                yield start + begin, min(self._length, pairs - begin)
