"""Files that appear whole or not at all: a kill, a full disk or a reader meets the old one or the
new one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}")


def write_bytes(path: Path, content: bytes) -> None:
    """Written beside its place, in the same folder (made if absent), then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(_unfinished(path.name))
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """In UTF-8. Bytes of a command line or a file's name that are not stay as they were."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def filled(folder: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """A place to write files to, which come to `folder` together at the end, instead of those of
    the same names and those `replaced`.

    The place is inside: a folder that is there may be a mount or a link, which cannot be renamed.
    A failure leaves what was there, and what a kill left goes."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in filter(is_leftover, folder.iterdir()):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = folder / _unfinished("new")
    try:
        unfinished.mkdir()
        yield unfinished
        names = [path.name for path in unfinished.iterdir()]
        for name in names:
            os.replace(unfinished / name, folder / name)
        for name in set(replaced).difference(names):
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if new:
            with suppress(OSError):  # where it is not empty, all is well
                folder.rmdir()


def check_place(folder: Path) -> None:
    """Raise what `filled` would where nothing can be written: before long work, not behind it."""
    with filled(folder):
        pass


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a kill left."""
    return all(map(is_leftover, folder.iterdir()))


def _unfinished(name: str) -> str:
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}"


def is_leftover(path: Path) -> bool:
    """Whether a kill has left this file: of no use, and in nobody's way."""
    return LEFTOVER.fullmatch(path.name) is not None
