"""A folder that one process at a time works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there people must see to it themselves
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"  # the file in the folder by which it is held


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether the folder is this process's, while the block lasts; a process that ends, however it
    ends, gives it back."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
