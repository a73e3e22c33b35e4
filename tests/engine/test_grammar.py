"""What a constraint allows is what the schema or the expression allows, and nothing that is no
text. The measure is Python's own: `json`, `re`, and a walk through a text token by token."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers

from hymba.engine import Completion, Sampling, generate
from hymba.engine.grammar import Grammars, _spellings
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.presets import hymba
from hymba.tokenizer import Tokenizer

pytest.importorskip("xgrammar")

EXTRA = 13  # ids that the model has and the tokenizer does not
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = 'hello world {"name": "ab", "age": 12, "tags": ["a", "b\\n", "é"]} true null 3.5e9 abab'
    return Tokenizer.train([text] * 5, vocab_size=320)


@pytest.fixture(scope="module")
def llama_like() -> Tokenizer:
    """As the released checkpoint's: "▁" for a space, byte tokens as a fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*'abc▁{}[]":,0123é', "▁a", "▁:", '{"']
    inner = Inner(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    inner.add_special_tokens(words[:3])
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer({"tokenizer.json": inner.to_str().encode()})


@pytest.fixture(params=["byte-level", "llama-like"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer, llama_like: Tokenizer) -> Any:
    return tokenizer if request.param == "byte-level" else llama_like


def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + EXTRA, (2,))


def allowed(matcher: Any) -> list[int]:
    found: list[int] = matcher.allowed().nonzero().flatten().tolist()
    return found


def takes(tokenizer: Tokenizer, how: Sampling, text: str) -> bool:
    """Whether every token of the text was allowed in its turn, and the end after it."""
    matcher = grammars(tokenizer).matcher(how)
    assert matcher is not None
    for token in tokenizer.encode(text):
        ok = token in allowed(matcher)
        assert matcher.accept(token) == ok
        if not ok:
            return False
    return 2 in allowed(matcher)


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("[ab]{2,3}", ["a", "ab", "aba", "abab", "abc", ""]),
        ("a+|é b", ["aaaa", "é b", "é", "éb"]),
        ("(a, ?)*c", ["c", "a,c", "a, a,c", "a,", "a,  c"]),
        (r"\d{3}\.\w", ["123.x", "12.x", "123,x"]),
    ],
)
def test_an_expression_takes_what_re_takes(either: Any, pattern: str, texts: list[str]) -> None:
    for text in texts:
        want = re.fullmatch(pattern, text) is not None
        assert takes(either, Sampling(regex=pattern), text) == want, text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"name": "ab", "age": 12}', True),
        ('{\n  "name": "",\n  "age": 0,\n  "tags": ["é", "b\\n"]\n}', True),
        ('{"name":"abcd","age":99,"tags":[]}', True),
        ('{"name":"a\tb","age":99}', False),  # no JSON, though xgrammar 0.2.8 alone takes it
        ('{"name": "ab"}', False),
        ('{"name": "abcde", "age": 1}', False),
        ('{"name": "ab", "age": 100}', False),
        ('{"name": "ab", "age": 1, "more": 1}', False),
        ('{"name": "ab", "age": 1, "tags": ["c"]}', False),
        ('{"name": "ab",' + " " * 60 + '"age": 1}', False),  # spaces for ever
        ("[]", False),
    ],
)
def test_a_schema_takes_what_it_describes(either: Any, text: str, want: bool) -> None:
    assert takes(either, Sampling(json_schema=PERSON), text) == want


def test_any_object(either: Any) -> None:
    how = Sampling(json_object=True)
    assert takes(either, how, '{"a": [1, null, {"b": "é\\n"}], "c": -1.5e9}')
    assert not takes(either, how, "[1]") and not takes(either, how, "{a: 1}")


def test_only_text_and_the_end_where_it_may_be(either: Any) -> None:
    """Special tokens and ids without a spelling never, the stop id exactly at an end. Stop ids of
    the request count, even one that spells text: a text may not stop half way."""
    size = either.vocab_size
    matcher = grammars(either).matcher(Sampling(regex="(.|\n)*"))
    assert matcher is not None
    found = allowed(matcher)
    assert 2 in found and not {0, 1} & set(found) and max(found) < size
    assert len(found) > 150  # bytes that begin no character are not among them
    (a,) = either.encode("a")
    matcher = grammars(either).matcher(Sampling(regex="ba+", stop_ids=(a, 10**6)))
    assert matcher is not None
    begin = allowed(matcher)
    assert a not in begin and matcher.accept(either.encode("b")[0])
    assert not {a, 2} & set(allowed(matcher))
    assert matcher.finished == (_spellings(either, size).count(b"a") == 1)  # or a byte token may
    assert not matcher.accept(a) and not matcher.accept(size + 1) and not matcher.accept(-1)


def test_a_row_of_a_batch_is_filled(tokenizer: Tokenizer) -> None:
    """Bit for bit what `allowed` says, and no bit for a token that the model has not."""
    size = tokenizer.vocab_size + EXTRA
    matcher = grammars(tokenizer).matcher(Sampling(regex="a.*"))
    assert matcher is not None
    masks = torch.full((2, -(-size // 32)), -1, dtype=torch.int32)
    matcher.fill(masks[1])
    bits = (masks.unsqueeze(-1) >> torch.arange(32) & 1).bool().flatten(1)
    assert bits[0].all() and torch.equal(bits[1, :size], matcher.allowed())
    assert not bits[1, size:].any()


@pytest.mark.parametrize("size", [288, 289, 319, 320])
def test_vocabularies_at_the_edge_of_a_word(tokenizer: Tokenizer, size: int) -> None:
    """Also smaller than the tokenizer's, which a model's may be."""
    matcher = Grammars(tokenizer, size, (2,)).matcher(Sampling(regex="a|b"))
    assert matcher is not None and matcher.allowed().shape == (size,)
    row = torch.zeros(-(-size // 32), dtype=torch.int32)
    matcher.fill(row)
    (token,) = tokenizer.encode("a")
    assert matcher.accept(token) and matcher.finished and allowed(matcher) == [2]


def test_spellings_are_the_decoders(either: Any) -> None:
    """Each token's bytes between two letters, as the tokenizer itself decodes it."""
    (letter,) = either.encode("a")
    spelled = _spellings(either, either.vocab_size)
    for token, spelling in enumerate(spelled):
        text = either.decode([letter, token, letter])
        if token in either.special_ids:
            assert spelling == b""
        elif "\ufffd" not in text:
            assert text == "a" + spelling.decode() + "a"
    assert sum(len(x) == 1 for x in spelled) >= 256


# With a model


Lively = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def model(lively: Lively, tokenizer: Tokenizer) -> LanguageModel:
    sizes = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}
    config = hymba(num_layers=2, window=9, meta_tokens=2, ssm_state=2, global_layers=(0,),
                   vocab_size=tokenizer.vocab_size + EXTRA, max_positions=512, **sizes)  # fmt: skip
    return lively(config)


def answers(model: LanguageModel, tokenizer: Tokenizer, **how: Any) -> list[Completion]:
    """Greedy, and drawn with five seeds, beside each other."""
    each = [Sampling(max_tokens=400, **how)]
    each += [Sampling(max_tokens=400, temperature=1.0, seed=seed, **how) for seed in range(5)]
    return generate(model, [[1, 5]] * len(each), each, tokenizer=tokenizer)


def test_answers_follow_the_schema(model: LanguageModel, tokenizer: Tokenizer) -> None:
    finished = 0
    for answer in answers(model, tokenizer, json_schema=PERSON):
        if answer.finish != "stop":
            continue  # a random model may take its time
        finished += 1
        said = json.loads(answer.text)
        assert list(said)[:2] == ["name", "age"] and set(said) <= set(PERSON["properties"])
        assert len(said["name"]) <= 4 and 0 <= said["age"] <= 99
        assert set(said.get("tags", [])) <= {"a", "b\n", "é"}
    assert finished >= 3


@pytest.mark.parametrize("stop_ids", [None, ()])
def test_answers_match_the_expression(
    model: LanguageModel, tokenizer: Tokenizer, stop_ids: tuple[int, ...] | None
) -> None:
    """An answer that can go no further is finished, also where no token stops it."""
    pattern = "(yes|no), [a-f]{3,6}!"
    found = answers(model, tokenizer, regex=pattern, stop_ids=stop_ids)
    assert all(answer.finish == "stop" for answer in found)
    assert all(re.fullmatch(pattern, answer.text) for answer in found)
    assert len({answer.text for answer in found}) > 2
    empty = generate(model, [[1]], Sampling(regex="()", stop_ids=stop_ids), tokenizer=tokenizer)
    assert (empty[0].text, empty[0].finish) == ("", "stop")


# What is refused


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"regex": "(a"}, "regex cannot be followed: Regex parsing error"),
        ({"json_schema": {"type": "thing"}}, 'json_schema cannot be followed: Unsupported type "t'),
        ({"json_schema": {"$ref": "#/no"}}, "json_schema cannot be followed: Cannot find field"),
        ({"json_schema": {"$ref": "#"}}, "json_schema cannot be followed: it refers to itself"),
        (
            {"json_schema": {"multipleOf": 7}},
            "json_schema cannot be followed: leave out multipleOf",
        ),
        (
            {"json_schema": {"properties": {"a": {"items": {"not": {}, "uniqueItems": True}}}}},
            "json_schema cannot be followed: leave out not, uniqueItems",
        ),
        (
            {"json_schema": {"anyOf": [{"allOf": [{"type": "integer"}, {"minimum": 3}]}]}},
            "json_schema cannot be followed: allOf of several",
        ),
    ],
)
def test_what_cannot_be_followed(tokenizer: Tokenizer, how: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        grammars(tokenizer).matcher(Sampling(**how))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_names_are_no_keywords(tokenizer: Tokenizer) -> None:
    schema = {"properties": {"not": {"const": 1}, "if": {"type": "null"}}, "uniqueItems": False}
    assert grammars(tokenizer).matcher(Sampling(json_schema=schema)) is not None


def test_a_tokenizer_without_bytes() -> None:
    inner = Inner(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(UserError, match="constraints need a BPE tokenizer of bytes"):
        grammars(Tokenizer({"tokenizer.json": inner.to_str().encode()})).matcher(
            Sampling(regex="a")
        )


def test_nothing_asked_nothing_needed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xgrammar is an extra: without it only those who ask for a constraint hear of it."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "xgrammar":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert grammars(tokenizer).matcher(Sampling()) is None
    with pytest.raises(UserError, match=r'need xgrammar: pip install "hymba\[serve\]"'):
        grammars(tokenizer).matcher(Sampling(json_object=True))
