"""The texts that are looked at: the user's files, or four small samples that come with it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hymba.errors import UserError
from hymba.eval.probe.samples import SAMPLES
from hymba.tokenizer import Tokenizer

BYTES_PER_TOKEN = 32  # read for each token wanted: more than any text needs
LEAST = 16  # tokens: in less there is nothing to see


class Text(NamedTuple):
    name: str
    ids: list[int]
    pieces: list[str]  # readable tokens
    whole: bool  # False: the text goes on


def read(files: Sequence[str], tokenizer: Tokenizer, tokens: int) -> list[Text]:
    """The first `tokens` tokens of each file, or of each sample. UserError, one line, for what is
    no text."""
    contents = {name: (text, True) for name, text in SAMPLES.items()}
    if files:
        contents = {name: _content(Path(name), BYTES_PER_TOKEN * tokens) for name in files}
    found: list[Text] = []
    for file, (content, whole) in contents.items():
        ids = tokenizer.encode(content, bos=tokenizer.bos_id is not None)
        if len(ids) < LEAST:
            raise UserError(f"{file} has {len(ids)} tokens: give a text of at least {LEAST}")
        whole, ids = whole and len(ids) <= tokens, ids[:tokens]
        name = _name(Path(file).stem, [text.name for text in found])
        found.append(Text(name, ids, [piece(tokenizer, token) for token in ids], whole))
    return found


def _content(path: Path, most: int) -> tuple[str, bool]:
    """The beginning of a file, and whether it is all of it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name its files")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    whole, content = len(content) <= most, content[:most]
    try:  # a letter cut in two at the end is no mistake
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path} is binary, not text")
    if not text.strip():
        raise UserError(f"{path} is empty: give a text of at least {LEAST} tokens")
    return text, whole


def _name(stem: str, taken: list[str]) -> str:
    """a, a-2, a-3 for files of one name."""
    if stem not in taken:
        return stem
    return next(name for n in range(2, 10**6) if (name := f"{stem}-{n}") not in taken)


def piece(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds, as people can read it: half a letter as its bytes."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)
