"""Lines of JSONL: what they mean, and what is refused with file and number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba.finetune.lines import Example, objective_of, read
from hymba.finetune.settings import FinetuneError

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
Write = Callable[..., Path]


def one(write: Write, line: Any) -> Example:
    [example] = read(write([line]))
    return example


def test_each_shape(write: Write) -> None:
    assert one(write, {"messages": [USER, ANSWER]}).answers == ([USER, ANSWER],)
    assert one(write, {"prompt": "a", "completion": "b"}).answers == ("b",)
    example = one(write, {"prompt": [USER], "completion": [ANSWER], "id": 7})
    assert (example.prompt, example.answers, example.is_chat) == ([USER], ([ANSWER],), True)
    example = one(write, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (example.answers, example.is_preference, example.is_chat) == (("b", "c"), True, False)


@pytest.mark.parametrize("prompt", [None, "a?"])
def test_two_whole_chats_share_their_beginning(write: Write, prompt: str | None) -> None:
    line = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    line |= {} if prompt is None else {"prompt": prompt}
    example = one(write, line)
    assert (example.prompt, example.answers) == ([USER], ([ANSWER], [OTHER]))


def test_what_is_said_after_the_last_answer_is_left_out(write: Write) -> None:
    assert one(write, {"messages": [USER, ANSWER, USER]}).answers == ([USER, ANSWER],)


def test_tools_may_be_json_in_a_string(write: Write) -> None:
    tools = [{"name": "f"}]
    line = {"messages": [USER, ANSWER], "tools": json.dumps(tools)}
    assert one(write, line).tools == one(write, line | {"tools": tools}).tools == tools
    assert one(write, line | {"tools": ""}).tools is None


def test_blank_lines_and_a_mark_of_utf8_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps({"prompt": "ä\u2028", "completion": "b"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n{line}".encode())
    assert [example.where for example in read(path)] == ["x.jsonl line 1", "x.jsonl line 3"]


BAD = {
    "{": "not JSON",
    "7": "a line is",
    '{"text": "x"}': "this one has 'text'",
    '{"prompt": "x"}': "this one has 'prompt'",
    '{"messages": "x"}': "messages must be a list",
    '{"messages": []}': "messages must be",
    '{"messages": [7]}': "messages must be",
    json.dumps({"messages": [USER]}): "nobody answers",
    json.dumps({"messages": [USER, ANSWER | {"content": " "}]}): "an answer .* is empty",
    json.dumps({"messages": [{"role": "user"}, ANSWER]}): "no text as content",
    json.dumps({"messages": [USER | {"content": ["x"]}, ANSWER]}): "no text as content",
    json.dumps({"prompt": "x", "completion": ""}): "completion is empty",
    json.dumps({"prompt": "x", "completion": [ANSWER]}): "prompt is text, completion is messages",
    json.dumps({"prompt": [USER], "chosen": "x", "rejected": "y"}): "give text or messages",
    json.dumps({"prompt": "x", "chosen": "y"}): "there is no rejected",
    json.dumps({"prompt": "x", "chosen": "y", "rejected": "y"}): "are the same",
    json.dumps({"chosen": "x", "rejected": "y"}): "there is no prompt",
    json.dumps({"chosen": [USER, ANSWER], "rejected": [ANSWER]}): "begin with the same question",
    json.dumps({"messages": [USER, ANSWER], "tools": 7}): "tools must be",
    '{"prompt": "\\ud800", "completion": "x"}': "half a character",
}


@pytest.mark.parametrize("line", BAD)
def test_what_cannot_be_used_is_refused_with_its_line(write: Write, line: str) -> None:
    path = write([{"messages": [USER, ANSWER]}, "", line])
    with pytest.raises(FinetuneError, match=rf"data.jsonl line 3: .*({BAD[line]})") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_files_that_hold_nothing(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="is empty"):
        read(write(["", " "]))
    with pytest.raises(FinetuneError, match="nowhere.jsonl"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "y.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "x"}')
    with pytest.raises(FinetuneError, match="line 1: not UTF-8"):
        read(tmp_path / "y.jsonl")


def test_the_lines_decide_what_is_trained(write: Write) -> None:
    answers = read(write([{"prompt": "a", "completion": "b"}]))
    pairs = read(write([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs.jsonl"))
    assert objective_of(answers, None) == "sft" and objective_of(pairs, None) == "dpo"
    assert objective_of(pairs, "sft") == "sft"  # the chosen answers are answers too
    with pytest.raises(FinetuneError, match="data.jsonl line 1 has no preference"):
        objective_of(answers, "dpo")
    with pytest.raises(FinetuneError, match="pairs.jsonl line 1 holds a preference and data.jsonl"):
        objective_of([*answers, *pairs], None)
