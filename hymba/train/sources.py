"""Where text comes from: documents in a fixed order, and a fingerprint that changes when they do.

Texts     documents in memory
Files     one document a file        python_library(), split()
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hymba.errors import UserError


class DataError(UserError):
    """Data that cannot be found, read or packed; the message says what to do."""


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
