"""How the text of one file is read: plain text, JSON lines (gzipped too), parquet.

Every reader yields (text, bytes of the file read so far), never holds more than one piece of the
file, and can begin at any text. A mistake is a DataError with the file's name and the line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hymba.errors import UserError

Reading = Iterator[tuple[str, int]]

PIECE = 1 << 20  # bytes of a plain text that are one document; a longer file becomes several
PAGE = 32 << 10  # the same for a file that is a source by itself, of which a part is held out
JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET = (".parquet",)
# What a folder's plain texts are called. A file that is named itself may end as it likes.
TEXT = tuple(
    ".txt .text .md .rst .tex .org .html .xml .log .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .kt"
    " .js .ts .tsx .go .rs .rb .php .swift .scala .hs .ml .jl .lua .r .sql .sh .toml .yaml .yml"
    .split()
)  # fmt: skip
READABLE = (*JSON_LINES, *PARQUET, *TEXT)


class DataError(UserError):
    """Data that cannot be found, read or packed; the message says what to do."""


def is_structured(name: str) -> bool:
    """Whether a file has many documents, which have no names, rather than being one."""
    return name.lower().endswith((*JSON_LINES, *PARQUET))


def read(path: Path, key: str, first: int = 0, piece: int = PIECE) -> Reading:
    """The texts of a file from number `first` on: pieces of a plain text, or what is under `key`
    in JSON lines and parquet."""
    name = path.name.lower()
    try:
        if name.endswith(JSON_LINES):
            yield from _json_lines(path, key, first)
        elif name.endswith(PARQUET):
            yield from _parquet(path, key, first)
        else:
            yield from islice(_pieces(path, piece), first, None)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}): make it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# ---- plain text


def _pieces(path: Path, most: int) -> Reading:
    """A text as one document or, beyond `most` bytes, several that end at ends of lines.

    So that memory does not depend on a file's size. Joined they are the file, byte for byte.
    """
    with open(path, "rb") as file:
        kept = b""
        # Not as a text file: that would turn \r\n into \n, and bits per byte counts real bytes.
        while block := kept + file.read(most - len(kept)):
            end = len(block) if len(block) < most else _last_break(block)
            kept = block[end:]
            yield _decoded(block[:end], path), file.tell() - len(kept)


def _last_break(block: bytes) -> int:
    """Where to cut: after the last line, else after the last space, else between characters."""
    for mark in (b"\n", b" "):
        if mark in block:
            return block.rindex(mark) + 1
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end if block[end] >= 0xC0 and end else len(block)


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


# ---- JSON lines


def _json_lines(path: Path, key: str, first: int) -> Reading:
    with open(path, "rb") as file:
        lines: IO[bytes] = gzip.open(file) if path.suffix.lower() == ".gz" else file  # type: ignore[assignment]
        number = 0  # of texts, which blank lines are not
        for line, content in enumerate(lines, 1):
            if content.isspace():
                continue
            number += 1
            if number > first:
                yield _text_of_line(content, key, f"{path}, line {line}"), file.tell()


def _text_of_line(content: bytes, key: str, where: str) -> str:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f'{where} is no JSON object: {{"{key}": "..."}} is needed')
    return text_of(row, key, where)


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """The text in a row; a null is an empty one."""
    if key not in row:
        there = ", ".join(map(str, row)) or "nothing"
        raise DataError(f'{where} has no "{key}" (it has {there}): say which one is the text')
    text = row[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f'{where}: "{key}" is {type(text).__name__}, not text')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'{where}: "{key}" has half a surrogate pair, which is no text') from None
    return text


# ---- parquet


def _parquet(path: Path, key: str, first: int) -> Reading:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'hymba[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise DataError(
                    f'{path} has no column "{key}" (it has {there}): say which one is the text'
                )
            yield from _parquet_texts(file, key, first, path)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is no whole parquet file ({reason})") from error


def _parquet_texts(file: Any, key: str, first: int, path: Path) -> Reading:
    size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
    number = 0
    for group in range(file.num_row_groups):
        if number + file.metadata.row_group(group).num_rows <= first:
            number += file.metadata.row_group(group).num_rows  # none of it is wanted
            continue
        for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[key]):
            for text in batch.column(0).to_pylist():
                number += 1
                if number > first:
                    where = f"{path}, row {number}"
                    yield text_of({key: text}, key, where), size * number // rows
