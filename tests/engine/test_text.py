"""Text as it grows: whole characters, nothing of a stop string, and together what it is at once."""

from __future__ import annotations

import random

import pytest

from hymba.engine.text import Speech
from hymba.tokenizer import Tokenizer

TEXTS = ["naïve café 東京 🦊🦊 abab", "aab aab\n\nUser: x\nUser: y END", "ééé🦊é"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Little more than bytes: most characters beyond ASCII are several tokens."""
    return Tokenizer.train(TEXTS * 3, vocab_size=264)


def speak(speech: Speech, ids: list[int]) -> tuple[list[str], bool]:
    """The pieces as the engine asks for them, and whether a stop string came before the end."""
    pieces = []
    for token in ids:
        text, stopped = speech.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, speech.finish()], False


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Where the first stop string that is complete begins; of those complete at once, the first."""
    for end in range(len(text) + 1):
        starts = [text.index(one) for one in stop if one in text[:end]]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize(
    "stop", [(), ("\n\nUser:",), ("ab", "aab"), ("aab", "END"), ("🦊é",), ("é🦊", "é東")]
)
def test_pieces_are_the_text_up_to_a_stop(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    draw = random.Random(0)
    ended = 0
    for _ in range(300):
        text = "".join(
            draw.choices(["a", "b", "aab", "é", "🦊", "\n\nUse", "r:", "EN", "東"], k=12)
        )
        pieces, stopped = speak(Speech(tokenizer, stop), tokenizer.encode(text))
        assert "".join(pieces) == cut(text, stop)
        assert stopped == any(one in text for one in stop)
        assert not any("\ufffd" in piece for piece in pieces)
        ended += stopped
    assert ended > 10 or not stop


def test_what_could_begin_a_stop_is_held_and_no_more(tokenizer: Tokenizer) -> None:
    speech, ids = Speech(tokenizer, ("xyz", "yy")), [tokenizer.encode(c)[0] for c in "axyyb"]
    assert [speech.push(token) for token in ids[:3]] == [("a", False), ("", False), ("", False)]
    assert speech.push(ids[3]) == ("x", True)
    speech = Speech(tokenizer, ("xyz",))
    assert [speech.push(token)[0] for token in ids] == ["a", "", "", "xyy", "b"]
    speech = Speech(tokenizer, ("xyz",))
    assert [speech.push(token)[0] for token in ids[:3]] == ["a", "", ""]
    assert speech.finish() == "xy"


def test_an_answer_that_ends_in_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🐻")
    pieces, _ = speak(Speech(tokenizer), ids[:-1])
    assert "".join(pieces) == tokenizer.decode(ids[:-1])
    assert pieces[0] == "a" and set(pieces[-1]) == {"\ufffd"} and not any(pieces[1:-1])


def test_a_stop_behind_half_a_character(tokenizer: Tokenizer) -> None:
    """The half becomes a mark once it cannot be completed, and the stop is found behind it."""
    ids = [*tokenizer.encode("🐻")[:-1], *tokenizer.encode("END tail")]
    pieces, stopped = speak(Speech(tokenizer, ("END",)), ids)
    assert stopped and set("".join(pieces)) == {"\ufffd"}


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("EN"), 0, *tokenizer.encode("D"), 2]
    assert "".join(speak(Speech(tokenizer), ids)[0]) == "END"
    assert speak(Speech(tokenizer, ("END",)), ids)[1]


def test_without_a_tokenizer() -> None:
    speech = Speech(None)
    assert speech.push(5) == ("", False) and speech.finish() == ""
