"""Which replica gets a call: nothing of Ray here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hymba.server.affinity import BUSIER, PIECE, Places, beginnings

IDLE = {"a": 0, "b": 0, "c": 0}


def chat(*said: str, **more: Any) -> list[bytes]:
    roles = "user", "assistant"
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return beginnings(json.dumps({**more, "messages": messages}).encode())


def completion(prompt: Any) -> list[bytes]:
    return beginnings(json.dumps({"prompt": prompt}).encode())


def test_a_conversation_begins_as_it_did_before() -> None:
    first, second = chat("hello"), chat("hello", "hi", "and now?", temperature=0.5)
    assert second[:1] == first and len(second) == 3
    assert not set(chat("hellp", "hi")) & set(second)
    assert not set(chat("", "hello")) & set(second)


def test_a_text_that_grows_keeps_its_beginnings() -> None:
    text = "x" * 3 * PIECE
    long = completion(text + "y" * PIECE)
    assert long[:3] == completion(text) and len(long) == 4
    ids = list(range(1000))
    assert completion(ids)[:5] == completion([ids])[:5] == completion(ids[:900])[:5]
    assert completion([text, "other"]) == completion(text)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"3", b"{}", b'{"prompt": 3}', b'{"messages": 1}', b"\xff", b"[" * 10**5],
)
def test_a_wrong_call_has_no_beginning(body: bytes) -> None:
    assert beginnings(body) == []


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "x"}], "\ud800", {"a": 1}])
def test_odd_messages(content: Any) -> None:
    body = json.dumps({"messages": [{"content": content}, 3, None]}).encode()
    assert len(beginnings(body)) == 3


def test_least_loaded_first() -> None:
    assert Places().order({"a": 3, "b": 1, "c": 2}, chat("x")) == ["b", "c", "a"]
    assert {Places().order(IDLE, [])[0] for _ in range(200)} == set(IDLE)  # equals in turn
    assert Places().order({}, chat("x")) == []


def test_a_beginning_goes_where_it_was_unless_that_is_much_busier() -> None:
    places = Places()
    places.put(chat("hello"), "a")
    again = chat("hello", "hi")
    assert places.order(IDLE | {"a": BUSIER}, again)[0] == "a"
    assert places.order(IDLE | {"a": BUSIER + 1}, again)[0] != "a"
    assert places.order(IDLE, again, avoid={"a"})[-1] == "a"
    places.put(again, "b")  # where it went instead
    assert places.order(IDLE | {"b": 1}, chat("hello", "hi", "so?"))[0] == "b"  # the longest counts
    assert places.order(IDLE | {"a": 1}, chat("hello"))[0] == "b"  # both have it: the less loaded
    del (gone := dict(IDLE))["b"]
    assert places.order(gone, again)[0] == "a"


def test_the_longest_unused_is_forgotten() -> None:
    places = Places(kept=3)
    old, new = chat("1"), chat("2", "3", "4")
    places.put(old, "a")
    places.put(new, "b")
    assert {places.order(IDLE, old)[0] for _ in range(200)} == set(IDLE)
    assert places.order(IDLE, new)[0] == "b"
