"""Whatever is sent, the answer is OpenAI's error form and a status below 500."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

USER = '"messages": [{"role": "user", "content": "x"}]'
COMPLETIONS = {
    "no body": b"",
    "no JSON": b"prompt=x",
    "half of it": b'{"prompt": "x"',
    "a list": b"[]",
    "null": b"null",
    "no prompt": b"{}",
    "empty list": b'{"prompt": []}',
    "empty ids": b'{"prompt": [[]]}',
    "mixed list": b'{"prompt": ["x", 1]}',
    "prompt of a wrong type": b'{"prompt": 1}',
    "token that is a word": b'{"prompt": [1, "x"]}',
    "negative token": b'{"prompt": [-1]}',
    "token out of the vocabulary": b'{"prompt": [300000]}',
    "token beyond 64 bits": b'{"prompt": [99999999999999999999999]}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "huge integer": b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}",
    "integer too long to read": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "huge max_tokens": b'{"prompt": "x", "max_tokens": 1e30}',
    "no tokens": b'{"prompt": "x", "max_tokens": 0}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a pair in a key": b'{"prompt": "x", "metadata": {"\\udfff": 1}}',
    "bytes that are no UTF-8": b'{"prompt": "\xff"}',
    "null byte": b'{"prompt": "x\x00"}',
    "null byte between": b'{"prompt":\x00 "x"}',
    "nested too deep": b"[" * 100_000,
    "deep object": b'{"metadata": ' + b'{"a":' * 50_000,
    "string for a number": b'{"prompt": "x", "temperature": "1"}',
    "true for a number": b'{"prompt": "x", "n": true}',
    "n of 0": b'{"prompt": "x", "n": 0}',
    "n of many": b'{"prompt": "x", "n": 1000}',
    "prompts x n of many": b'{"prompt": ["x", "y"], "n": 100}',
    "too many prompts": json.dumps({"prompt": ["x"] * 200}).encode(),
    "empty stop": b'{"prompt": "x", "stop": ""}',
    "many stops": json.dumps({"prompt": "x", "stop": ["s"] * 100}).encode(),
    "bias of a word": b'{"prompt": "x", "logit_bias": {"the": 1}}',
    "bias out of the vocabulary": b'{"prompt": "x", "logit_bias": {"99999": 1}}',
    "bias too large": b'{"prompt": "x", "logit_bias": {"5": 101}}',
    "stop id out of the vocabulary": b'{"prompt": "x", "stop_token_ids": [-5]}',
    "logprobs of many": b'{"prompt": "x", "logprobs": 21}',
    "suffix": b'{"prompt": "x", "suffix": "y"}',
    "best_of": b'{"prompt": "x", "best_of": 3}',
    "echo with logprobs": b'{"prompt": "x", "echo": true, "logprobs": 1}',
    "options without a stream": b'{"prompt": "x", "stream_options": {"include_usage": true}}',
    "bad regex": b'{"prompt": "x", "regex": "("}',
    "regex and schema": b'{"prompt":"x","regex":"a","response_format":{"type":"json_object"}}',
    "unknown field": b'{"prompt": "x", "functions": []}',
    "prompt too long": json.dumps({"prompt": "x" * 2000}).encode(),
}
CHATS = {
    "no messages": b'{"messages": []}',
    "unknown role": b'{"messages": [{"role": "king", "content": "x"}]}',
    "content of a wrong type": b'{"messages": [{"role": "user", "content": 1}]}',
    "an image": b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":"x"}]}]}',
    "forced tool": b"{%s, " % USER.encode() + b'"tool_choice": "required"}',
    "audio": b"{%s, " % USER.encode() + b'"modalities": ["audio"]}',
    "top without logprobs": b"{%s, " % USER.encode() + b'"top_logprobs": 2}',
    "schema of nothing": b"{%s, " % USER.encode() + b'"response_format": {"type":"json_schema"}}',
    "schema that is none": b"{%s, " % USER.encode()
    + b'"response_format":{"type":"json_schema","json_schema":{"schema":{"type":"goat"}}}}',
    "format of another kind": b"{%s, " % USER.encode() + b'"response_format": {"type": "xml"}}',
}
CASES = [("/v1/completions", *one) for one in COMPLETIONS.items()]
CASES += [("/v1/chat/completions", *one) for one in CHATS.items()]
CASES += [
    ("/tokenize", "nothing to count", b"{}"),
    ("/tokenize", "both", b'{"prompt": "x", ' + USER.encode() + b"}"),
    ("/detokenize", "words", b'{"tokens": ["x"]}'),
]


@pytest.mark.parametrize(("path", "name", "body"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_mistakes_are_told(served: Any, path: str, name: str, body: bytes) -> None:
    with served.client() as client:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"] and len(error["message"]) < 500 and "\n" not in error["message"]


def test_the_field_is_named(served: Any) -> None:
    with served.client() as client:
        for body, param in (
            ({"prompt": "x", "temperature": -1}, "temperature"),
            ({"prompt": 1}, "prompt"),
            ({"prompt": "x", "temprature": 1}, "temprature"),
            ({}, "prompt"),
        ):
            error = client.post("/v1/completions", json=body).json()["error"]
            assert error["param"] == param, error


def test_a_form_is_no_json(served: Any) -> None:
    """A page elsewhere may send a form or plain text here without asking: it gets nothing."""
    with served.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {"content-type": kind} if kind else {}
            answer = client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
            assert answer.status_code == 400
            assert "application/json" in answer.json()["error"]["message"]


def test_wrong_places(served: Any) -> None:
    with served.client() as client:
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
        wrong = client.get("/v1/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        assert wrong.json()["error"]["message"]
        assert client.get("/page/../../../app.py").status_code == 404
        assert client.get("/page/%2e%2e/app.py").status_code == 404


def test_what_is_odd_but_right(served: Any) -> None:
    with served.client() as client:
        for body in (
            {"prompt": "a\x00b\ufffe😀", "max_tokens": 2},
            {"prompt": "", "max_tokens": 2},  # the model's first token alone
            {"prompt": "</s><s>", "max_tokens": 2},  # text, not special tokens
            {"prompt": "x", "max_tokens": 2, "user": "me", "metadata": {"a": 1}},
        ):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
