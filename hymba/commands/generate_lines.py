"""The questions of a batch job, a line each: what `hymba generate --file` reads.

    {"prompt": "def f():"}
    {"id": "a-7", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5}
    {"ids": [1, 523, 88], "max_tokens": 8}

A file whose name ends in .txt has a prompt a line instead. A line that cannot be read becomes a
question with an error; it never ends the reading. No more than a line is held at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine import Sampling

LONGEST = 16 * 2**20  # bytes of a line
BOM = b"\xef\xbb\xbf"
KINDS = ("prompt", "messages", "ids")
CONSTRAINTS = ("json_schema", "regex", "json_object")
SHAPES = '{"prompt": "..."}, {"messages": [...]} or {"ids": [...]}'

Id = str | int


@dataclass(frozen=True)
class Question:
    number: int  # of its line, from 1
    id: Id  # the line's own, or its number
    asked: str  # hash of what is asked: the prompt and its sampling
    sampling: Sampling
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    error: str | None = None  # why it cannot be asked


class Questions:
    """The questions of a file, or of standard input (-), which can be read once only."""

    def __init__(self, name: str, sampling: Sampling) -> None:
        """`sampling`: where a line does not say otherwise. OSError for a file that cannot be
        opened."""
        self.name, self.sampling = name, sampling
        self.again = name != "-"  # whether they can be read twice
        self._file: BinaryIO = open(name, "rb") if self.again else sys.stdin.buffer
        self._text = Path(name).suffix.lower() == ".txt"
        self._settings = {field.name: field.default for field in fields(sampling)}

    def close(self) -> None:
        if self.again:
            self._file.close()

    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self._lines())

    def __iter__(self) -> Iterator[Question]:
        seen: set[int] = set()
        for number, raw in self._lines():
            question = self._question(number, raw)
            if question.error is None:
                name = number_of(question.id)
                if name in seen:
                    told = f"the id {json.dumps(question.id)} is an earlier line's"
                    question = self._mistake(number, raw, question.id, told)
                seen.add(name)
            yield question

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """(number, content) of the lines that are not blank; None for one too long to be held."""
        if self.again:
            self._file.seek(0)
        number = 0
        while raw := self._file.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST and not raw.endswith(b"\n"):
                while (rest := self._file.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
                continue
            if number == 1:
                raw = raw.removeprefix(BOM)
            if raw.strip():
                yield number, raw

    def _question(self, number: int, raw: bytes | None) -> Question:
        name: Id = number
        try:
            content = self._content(raw)
            name = _id(content.pop("id", number))
            [kind], asked = _kinds(content), {k: v for k, v in content.items() if k not in KINDS}
            value = _PARTS[kind](content[kind])
            sampling = self._sampling(asked)
            hashed = self._hash(kind, value, sampling)
            if kind == "messages":
                return Question(number, name, hashed, sampling, messages=value)
            return Question(number, name, hashed, sampling, prompt=value)
        except UserError as error:
            return self._mistake(number, raw, name, str(error))

    def _mistake(self, number: int, raw: bytes | None, name: Id, error: str) -> Question:
        asked = _digest(b"%d %s" % (number, raw or b""))
        return Question(number, name, asked, self.sampling, error=error)

    def _content(self, raw: bytes | None) -> dict[str, Any]:
        if raw is None:
            raise UserError(f"the line is longer than {LONGEST >> 20} MiB")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"the line is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        if self._text:
            return {"prompt": text.rstrip("\r\n")}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the line is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"a line is {SHAPES}")
        return content

    def _sampling(self, asked: dict[str, Any]) -> Sampling:
        for name in asked:
            if name not in self._settings:
                near = difflib.get_close_matches(name, ["id", *KINDS, *self._settings], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"there is no key {name!r}{hint}")
        if any(asked.get(name) for name in CONSTRAINTS):  # it takes the place of the options' own
            asked = dict(json_schema=None, regex=None, json_object=False) | asked
        if isinstance(asked.get("logit_bias"), dict):
            asked["logit_bias"] = _with_ids(asked["logit_bias"])
        return replace(self.sampling, **asked) if asked else self.sampling

    def _hash(self, kind: str, value: Any, sampling: Sampling) -> str:
        """The same however the options and the line share out the settings."""
        changed = {
            name: found
            for name, default in self._settings.items()
            if (found := getattr(sampling, name)) != default
        }
        asked = json.dumps({kind: value, "sampling": changed}, ensure_ascii=False, sort_keys=True)
        try:
            return _digest(asked.encode("utf-8"))
        except UnicodeEncodeError:
            raise UserError(f"{kind} holds half a character (a lone \\ud800 to \\udfff)") from None


def number_of(name: Id, *more: str) -> int:
    """64 bits that stand for an id: sets of a million of them are small."""
    digest = hashlib.blake2b(json.dumps([name, *more]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _id(name: object) -> Id:
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise UserError("id must be a string or a whole number")
    try:
        str(name).encode("utf-8")
    except ValueError:
        raise UserError("id holds half a character (a lone \\ud800 to \\udfff)") from None
    return name


def _kinds(content: dict[str, Any]) -> list[str]:
    kinds = [kind for kind in KINDS if kind in content]
    if len(kinds) != 1:
        given = f"{' and '.join(kinds)} were given" if kinds else "none was given"
        raise UserError(f"a line is one of {SHAPES}; {given}")
    return kinds


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise UserError("prompt must be a string")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    found = value if isinstance(value, list) else []
    if not found or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found):
        raise UserError('messages must be [{"role": "user", "content": "..."}, ...]')
    return found


def _ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(x) is int for x in value):
        raise UserError("ids must be a list of token ids")
    return value


_PARTS: dict[str, Callable[[Any], Any]] = {"prompt": _prompt, "messages": _messages, "ids": _ids}


def _with_ids(bias: dict[str, Any]) -> dict[int, Any]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise UserError('logit_bias must be token ids with numbers: {"50": -100}') from None
