"""Where text comes from: documents in a fixed order, and a fingerprint that changes when they do.

    Texts           documents in memory
    Files           files below a folder: plain text, JSON lines, parquet    folder(), file()
    python_library  Python's standard library without its tests              split()
    HubStream       a dataset of the hub or of a folder, as `datasets` streams it

Every installed package's sources are in python_files.py. A source is read as a stream, from any
place on, as often as wanted: nothing here holds a corpus in memory.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hymba.train.readers import PAGE, PIECE, READABLE, DataError, is_structured, read, text_of

Place = tuple[int, int]  # files and, of the next one, documents that lie before
BEGIN: Place = (0, 0)


class Document(NamedTuple):
    """A text and where it stands."""

    text: str
    key: int | None  # decides whether it is held out (see `key_of`); None: its text does
    after: Place  # where a reader goes on who has had this one
    done: int  # how much of the source's `size` is read with it


class Source(Protocol):
    """Documents in a fixed order, and a fingerprint that changes when they do."""

    def documents(self, start: Place = BEGIN) -> Iterator[Document]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def size(self) -> int | None:
        """What `Document.done` ends at: documents, files or bytes; None if nobody knows."""
        ...


def key_of(text: str) -> int:
    """63 bits of a hash of `text`. Keys below `percent` of 2**63 are held out, on any machine and
    whatever other documents there are."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Texts:
    """Documents held in memory."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def documents(self, start: Place = BEGIN) -> Iterator[Document]:
        for number, text in enumerate(self, 1):
            if number > start[1]:
                yield Document(text, None, (0, number), number)

    @property
    def fingerprint(self) -> str:
        return digest(hashlib.sha256(text.encode()).hexdigest() for text in self.texts)

    @property
    def size(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Files:
    """Files below `root`; `names` are paths with forward slashes, `key` where rows have a text.

    A plain text is one document (a very long one several) and is held out by its name; a row of
    JSON lines or parquet is held out by its text, and so are the pages of a text `alone`, of which
    all or nothing would be held out by the name.
    """

    root: Path
    names: tuple[str, ...]
    key: str = "text"
    alone: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.documents())

    def documents(self, start: Place = BEGIN) -> Iterator[Document]:
        sizes = [(self.root / name).stat().st_size for name in self.names]
        done = sum(sizes[: start[0]])
        for number in range(start[0], len(self.names)):
            name = self.names[number]
            first = start[1] if number == start[0] else 0
            key = None if self.alone or is_structured(name) else key_of(name)
            texts = read(self.root / name, self.key, first, PAGE if self.alone else PIECE)
            for at, (text, end) in enumerate(texts, first + 1):
                yield Document(text, key, (number, at), done + end)
            done += sizes[number]

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and times of change: no file is read, so it costs no time."""
        found = ((name, (self.root / name).stat()) for name in self.names)
        parts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found]
        if any(map(is_structured, self.names)):
            parts.append(f"text is in {self.key}")
        if self.alone:
            parts.append(f"pages of {PAGE}")
        return digest(parts)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum((self.root / name).stat().st_size for name in self.names)


def digest(parts: Iterable[str]) -> str:
    """One fingerprint of many."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode("utf-8", "surrogateescape") + b"\n")  # a file's name may be bytes
    return total.hexdigest()


# ---- files and folders


def file(path: Path, key: str = "text") -> Files:
    """One file, whatever its name ends with."""
    if path.name.lower().endswith((".json", ".arrow", ".zip", ".zst", ".tar", ".bz2", ".xz")):
        raise DataError(
            f"{path} is of no kind that is read: give plain text, JSON lines (.jsonl, .jsonl.gz) or"
            " .parquet"
        )
    return Files(path.parent, (path.name,), key, alone=not is_structured(path.name))


def folder(root: Path, key: str = "text") -> Files:
    """All text, JSON lines and parquet below a folder, but for hidden files and folders."""
    names = []
    for place, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = Path(place).relative_to(root)
        wanted = (n for n in files if n.lower().endswith(READABLE) and not n.startswith("."))
        names += [(below / name).as_posix() for name in wanted]
    if not names:
        raise DataError(
            f"{root} holds no text files: their names end with {', '.join(READABLE[:6])}, .md, .py"
            " and the like; a file of another name can be given itself"
        )
    return Files(root, tuple(sorted(names)), key)


# ---- the standard library

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
        summary = hashlib.sha256(content).digest()
        if content.strip() and summary not in seen and _is_utf8(content):
            seen.add(summary)
            names.append(relative.as_posix())
    if not names:
        raise DataError(f"{root} holds no Python sources: give a folder of text files instead")
    return Files(root, tuple(names))


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def split(files: Files, percent: float = 5.0) -> tuple[Files, Files]:
    """(train, held out): about `percent` of the files, by a hash of the name, are held out.

    A file stays on its side whatever other files exist, so machines and Python versions agree.
    """
    held = {name for name in files.names if key_of(name) / 2**63 < percent / 100}
    train = tuple(name for name in files.names if name not in held)
    out = tuple(name for name in files.names if name in held)
    if not train or not out:
        raise DataError(
            f"{len(files)} files below {files.root} cannot be split into training and held-out "
            f"files at {percent} percent: give more files or another percentage"
        )
    return Files(files.root, train, files.key), Files(files.root, out, files.key)


# ---- datasets


@dataclass(frozen=True)
class HubStream:
    """A dataset of the hub, or of a folder, row by row over the network and never kept whole.

    The fingerprint of a hub's dataset is its name: tokens that are on disk stay usable without a
    network, and when the dataset changes (delete them to read it again).
    """

    name: str
    config: str | None = None
    part: str = "train"  # which split of the dataset
    key: str = "text"

    @classmethod
    def parse(cls, text: str, key: str = "text") -> HubStream:
        """NAME[:CONFIG[:SPLIT]]."""
        name, _, rest = text.partition(":")
        config, _, part = rest.partition(":")
        if not name or ":" in part:
            raise DataError(f"hf:{text} is no dataset: write hf:NAME, hf:NAME:CONFIG:SPLIT")
        return cls(name, config or None, part or "train", key)

    def documents(self, start: Place = BEGIN) -> Iterator[Document]:
        number = start[1]
        try:
            stream = self._open()
            for row in stream.skip(number) if number else stream:
                number += 1
                text = text_of(row, self.key, f"{self}, row {number}")
                yield Document(text, None, (0, number), number)
        except DataError:
            raise
        except Exception as error:  # of many kinds: network, permissions, broken files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = f"ended after {number} rows" if number > start[1] else "cannot be opened"
            raise DataError(
                f"{self} {what} ({reason}): see to the name and the network, then go on with the"
                " same command"
            ) from error

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self} needs datasets: pip install 'hymba[data]'") from None
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # its retries are many lines
        return datasets.load_dataset(self.name, self.config, split=self.part, streaming=True)

    @property
    def fingerprint(self) -> str:
        parts = ["datasets", str(self), self.key]
        if Path(self.name).is_dir():
            found = sorted(path for path in Path(self.name).rglob("*") if path.is_file())
            parts += [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in found]
        return digest(parts)

    @property
    def size(self) -> None:
        return None

    def __str__(self) -> str:
        return f"hf:{self.name}:{self.config or ''}:{self.part}"
