"""Lines of JSONL as examples: what was asked, and one answer to learn or two to compare. No torch.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": ..., "completion": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}

Where prompt and answers are strings they are plain text, which no chat template touches; where
they are lists of messages they are chats. "tools" beside them are handed to the template. Other
keys are ignored. A preference may leave the prompt to its two chats, which then begin alike.

Every line is looked at before anything is trained, and a line that cannot be used ends it all, with
its file and number: data that is silently left out is worse than data that must be mended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba.finetune.settings import FinetuneError, Objective

Message = dict[str, Any]
Part = str | list[Message]  # plain text, or messages

SHAPES = '{"messages"}, {"prompt", "completion"} or {"prompt", "chosen", "rejected"}'
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """One line. `answers` holds one part to learn, or the chosen one and the rejected one; all
    parts are text, or all are messages."""

    where: str  # "chats.jsonl line 3"
    prompt: Part
    answers: tuple[Part, ...]
    tools: list[dict[str, Any]] | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list)

    @property
    def is_preference(self) -> bool:
        return len(self.answers) == 2


def read(path: Path) -> list[Example]:
    """All examples of a file. FinetuneError names the file and the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FinetuneError(f"{path}: {error.strerror or 'cannot be read'}") from None
    examples = []
    for number, raw in enumerate(content.removeprefix(BOM).split(b"\n"), 1):
        if raw.strip():
            where = f"{path.name} line {number}"
            try:
                examples.append(_example(where, _object(raw)))
            except FinetuneError as error:
                raise FinetuneError(f"{path} line {number}: {error}") from None
    if not examples:
        raise FinetuneError(f"{path} is empty: a line is {SHAPES}")
    return examples


def objective_of(examples: Sequence[Example], asked: Objective | None) -> Objective:
    """What the lines are for. With preferences sft learns the chosen answers."""
    pairs = sum(example.is_preference for example in examples)
    if 0 < pairs < len(examples):
        odd = next(e for e in examples if e.is_preference != examples[0].is_preference)
        kinds = ("an answer", "a preference")
        raise FinetuneError(
            f"{odd.where} holds {kinds[odd.is_preference]} and {examples[0].where}"
            f" {kinds[examples[0].is_preference]}: give them in two runs"
        )
    if asked == "dpo" and not pairs:
        raise FinetuneError(
            f'{examples[0].where} has no preference: dpo needs "chosen" and "rejected" in each line'
        )
    return asked or ("dpo" if pairs else "sft")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FinetuneError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise FinetuneError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FinetuneError(f"a line is {SHAPES}, not {type(content).__name__}")
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FinetuneError("half a character (a lone \\ud800 to \\udfff)") from None
    return content


def _example(where: str, line: Mapping[str, Any]) -> Example:
    tools = _tools(line.get("tools"))
    if "chosen" in line or "rejected" in line:
        prompt, chosen, rejected = _preference(line)
        return Example(where, prompt, (chosen, rejected), tools)
    if "messages" in line:
        if isinstance(line["messages"], str):
            raise FinetuneError("messages must be a list; text goes in prompt and completion")
        return Example(where, [], (_answer(line["messages"], "messages"),), tools)
    if "prompt" not in line or "completion" not in line:
        raise FinetuneError(f"a line is {SHAPES}; this one has {_some(line)}")
    prompt = _part(line["prompt"], "prompt")
    completion = _answer(line["completion"], "completion")
    _same_kind(prompt=prompt, completion=completion)
    return Example(where, prompt, (completion,), tools)


def _preference(line: Mapping[str, Any]) -> tuple[Part, Part, Part]:
    missing = [name for name in ("chosen", "rejected") if name not in line]
    if missing:
        raise FinetuneError(f'a preference has "chosen" and "rejected"; there is no {missing[0]}')
    chosen, rejected = (_answer(line[name], name) for name in ("chosen", "rejected"))
    prompt: Part = _part(line["prompt"], "prompt") if "prompt" in line else []
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt = []  # many sets repeat the first question as text beside two whole chats
    if not prompt:
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise FinetuneError("there is no prompt, and chosen and rejected are no chats")
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not (prompt and chosen and rejected):
            raise FinetuneError("chosen and rejected must begin with the same question and differ")
    _same_kind(prompt=prompt, chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise FinetuneError("chosen and rejected are the same")
    return prompt, chosen, rejected


def _shared(a: list[Message], b: list[Message]) -> int:
    """How many messages two chats begin with alike."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _part(value: Any, name: str) -> Part:
    if isinstance(value, str):
        return value
    found = value if isinstance(value, list) else []
    if not found or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found):
        raise FinetuneError(
            f'{name} must be a string or messages: [{{"role": "user", "content": "..."}}, ...]'
        )
    for message in found:
        says = message.get("content")
        if not isinstance(says, str) and not (says is None and message.get("tool_calls")):
            raise FinetuneError(f"{name}: a message of {message['role']!r} has no text as content")
    # Templates meet a missing key more often than null, and transformers makes one of the other.
    return [{key: said for key, said in m.items() if said is not None} for m in found]


def _answer(value: Any, name: str) -> Part:
    """A part that holds something to learn: its last message is the assistant's, and not empty."""
    part = _part(value, name)
    if isinstance(part, str):
        if not part:
            raise FinetuneError(f"{name} is empty")
        return part
    ours = [i for i, message in enumerate(part) if message["role"] == "assistant"]
    if not ours:
        raise FinetuneError(f"{name}: nobody answers (no message has the role 'assistant')")
    for i in ours:
        if not (part[i].get("content") or "").strip() and not part[i].get("tool_calls"):
            raise FinetuneError(f"{name}: an answer of the assistant is empty")
    return part[: ours[-1] + 1]  # what is said after it teaches nothing


def _same_kind(**parts: Part) -> None:
    kinds = {name: "text" if isinstance(part, str) else "messages" for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise FinetuneError(f"{told}: give text or messages in all of them")


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):  # a column of a table has one type, so some sets keep JSON in it
        try:
            value = json.loads(value) if value else None
        except ValueError as error:
            raise FinetuneError(f"tools are not JSON: {error}") from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FinetuneError("tools must be a list of objects")
    return value or None


def _some(line: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, _first(line, 6))) or "no key"


def _first(names: Mapping[str, Any], most: int) -> Iterator[str]:
    return (name for name, _ in zip(names, range(most), strict=False))
