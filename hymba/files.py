"""Files that appear whole or not at all: a kill, a full disk or a reader meets the old one or the
new one."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}")


def write_bytes(path: Path, content: bytes) -> None:
    """Written beside its place, in the same folder (made if absent), then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
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


def is_leftover(path: Path) -> bool:
    """Whether a kill has left this file: of no use, and in nobody's way."""
    return LEFTOVER.fullmatch(path.name) is not None
