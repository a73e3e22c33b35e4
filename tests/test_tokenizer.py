"""The tokenizer: round trips of any text, streams that never break a character, transformers."""

import importlib.util
import json
import random

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers

from hymba.tokenizer import Tokenizer, TokenizerError

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "naïve café 東京 🦊🦊 and <s>html</s>\r\n\ttabs",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 5, vocab_size=320)


@pytest.fixture(scope="module")
def llama_like() -> Tokenizer:
    """A vocabulary as the released checkpoints have: spaces as ▁, byte tokens as a fallback."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁hello", "hello", "▁world", "a", "é"]
    vocab = {word: i for i, word in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    inner = Inner(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer({"tokenizer.json": inner.to_str().encode()})


def test_ids_of_special_tokens_are_the_official_ones(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert 259 < tokenizer.vocab_size <= 320


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in [*TEXTS, "", " ", "\0", "unseen: Ωß𝄞 </s><pad>", "  two  spaces  \n\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_depends_on_the_texts_alone(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(TEXTS * 5), vocab_size=320)
    assert again.files == tokenizer.files
    assert again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS, vocab_size=300).fingerprint != tokenizer.fingerprint


def test_bos_is_put_in_front_only_when_asked(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("abc")
    assert tokenizer.encode("abc", bos=True) == [1, *plain]
    assert tokenizer.encode("", bos=True) == [1]
    assert tokenizer.encode_batch(["abc", ""]) == [plain, []]


def test_text_cannot_forge_a_special_token(tokenizer: Tokenizer) -> None:
    """HTML in a corpus holds <s> and </s>; as tokens they would end documents and lose text."""
    for ids in (tokenizer.encode("a</s>b"), tokenizer.encode_batch(["a</s>b"])[0]):
        assert 2 not in ids
        assert tokenizer.decode(ids) == "a</s>b"
    assert tokenizer.encode("a</s>b", special=True).count(2) == 1


def test_what_is_no_text_is_told(tokenizer: Tokenizer) -> None:
    """Half a surrogate pair: what Python makes of an argument that is no UTF-8."""
    for wrong in ("\ud800", "a\udcff"):
        with pytest.raises(TokenizerError, match="UTF-8"):
            tokenizer.encode(wrong)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="259 or more"):
        Tokenizer.train(TEXTS, vocab_size=258)


# ---- streams


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [decoder.push(i) for i in ids] + [decoder.finish()]


def test_stream_gives_the_text_in_whole_characters(tokenizer: Tokenizer) -> None:
    for text in [*TEXTS, "🦊" * 5 + "é東", "ends in half of one 🦊"]:
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_is_prompt(tokenizer: Tokenizer) -> None:
    """Nothing but an unfinished character is held back."""
    ids = tokenizer.encode("def f(x): return x")
    assert all(stream(tokenizer, ids)[:-1])


def test_stream_of_any_ids_joins_to_decode(tokenizer: Tokenizer) -> None:
    """Random ids make broken characters, runs of them, and special tokens in between."""
    draw = random.Random(0)
    for _ in range(500):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_with_fallback_bytes_joins_to_decode(llama_like: Tokenizer) -> None:
    """Any text, a special token anywhere, cut off anywhere but inside a character.

    (There `decode` turns all bytes before it into marks, which a stream has shown by then.)
    """
    draw, checked = random.Random(0), 0
    for _ in range(500):
        text = "".join(draw.choices(["hello", " ", " world", "é", "🦊", "東"], k=9))
        ids = llama_like.encode(text)
        ids.insert(draw.randrange(len(ids)), 2)
        ids = ids[: draw.randrange(1, len(ids) + 1)]
        if "\ufffd" not in llama_like.decode(ids):
            assert "".join(stream(llama_like, ids)) == llama_like.decode(ids)
            checked += 1
    assert checked > 200


def test_stream_of_byte_tokens_and_leading_spaces(llama_like: Tokenizer) -> None:
    ids = llama_like.encode("hello world 🦊é東 hello")
    pieces = stream(llama_like, ids)
    assert "".join(pieces) == llama_like.decode(ids) == "hello world 🦊é東 hello"
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_do_not_show_in_a_stream(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, [1, *tokenizer.encode("hi"), 2])) == "hi"


def test_broken_end_shows_when_the_stream_finishes(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("𝄞")[:-1]
    decoder = tokenizer.stream()
    assert [decoder.push(i) for i in half] == [""] * len(half)
    assert decoder.finish() == tokenizer.decode(half) == "\ufffd"
    assert decoder.push(tokenizer.encode("a")[0]) == "a"  # starts anew


# ---- folders


def test_folder_round_trip_keeps_every_byte(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}  ')
    loaded = Tokenizer.from_folder(tmp_path / "a" / "b")
    loaded.save(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(loaded.files)
    for name in loaded.files:
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / "b" / name).read_bytes()
    assert loaded.encode(TEXTS[2], bos=True) == tokenizer.encode(TEXTS[2], bos=True)


def test_ids_follow_the_folder_and_may_be_absent(tokenizer: Tokenizer, tmp_path) -> None:
    settings = {"eos_token": {"content": "<pad>"}, "pad_token": None}
    files = tokenizer.files | {"tokenizer_config.json": json.dumps(settings).encode()}
    other = Tokenizer(files)
    assert (other.pad_id, other.bos_id, other.eos_id) == (None, 1, 0)
    files["tokenizer_config.json"] = b'{"bos_token": "<nowhere>"}'
    with pytest.raises(TokenizerError, match="bos_token"):
        Tokenizer(files).encode("x", bos=True)


def test_bad_folders_give_one_line(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json") as absent:
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read") as broken:
        Tokenizer.from_folder(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON") as settings:
        Tokenizer.from_folder(tmp_path)
    assert all("\n" not in str(error.value) for error in (absent, broken, settings))


def test_transformers_reads_the_folder(tokenizer: Tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(TEXTS[0], bos=True)
    assert theirs(TEXTS[0])["input_ids"] == ids
    assert theirs(TEXTS[0], add_special_tokens=False)["input_ids"] == ids[1:]
    assert theirs.decode(ids, skip_special_tokens=True) == TEXTS[0]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_folder(tmp_path / "again").encode(TEXTS[0], bos=True) == ids


# ---- chat

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

needs_jinja = pytest.mark.skipif(
    importlib.util.find_spec("jinja2") is None, reason="chat templates are rendered by jinja2"
)


@needs_jinja
@pytest.mark.parametrize("home", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_uses_the_folders_template(tokenizer: Tokenizer, home: str) -> None:
    settings = json.loads(tokenizer.files["tokenizer_config.json"])
    content = (
        TEMPLATE if home.endswith("jinja") else json.dumps(settings | {"chat_template": TEMPLATE})
    )
    chat = Tokenizer(tokenizer.files | {home: content.encode()})
    assert chat.has_chat_template
    user = [1, *tokenizer.encode("user: hi"), 2]
    both = [*user, 1, *tokenizer.encode("assistant: yo"), 2]
    assert chat.chat(TALK, reply=False) == both
    assert chat.chat(TALK[:1]) == [*user, *tokenizer.encode("assistant:")]


@needs_jinja
def test_tools_reach_the_template(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the template is loaded once: transformers takes a while to read a folder."""
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + TEMPLATE
    chat = Tokenizer(tokenizer.files | {"chat_template.jinja": template.encode()})
    chat.prepare_chat()
    monkeypatch.setattr(chat, "save", None)  # nothing is read again
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    bare = chat.chat(TALK)
    assert chat.chat(TALK, tools=[tool]) == [*chat.encode("look "), *bare]


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    text = "héllo wörld € 😀 \x00\n"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.token_bytes(2) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""


def test_bytes_of_tokens_where_bytes_are_a_fallback(llama_like: Tokenizer) -> None:
    ids = llama_like.encode("hello world é €")
    assert b"".join(map(llama_like.token_bytes, ids)).decode() == " hello world é €"
    assert llama_like.token_bytes(9 + 0xE2) == b"\xe2"


@needs_jinja
def test_chat_refusals(tokenizer: Tokenizer) -> None:
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.chat(TALK)
    chat = Tokenizer(tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()})
    with pytest.raises(TokenizerError, match="no such role"):
        chat.chat([{"role": "nobody", "content": ""}])
