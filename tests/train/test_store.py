"""Tokens on disk: all of them, once, whole or not at all."""

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hymba.tokenizer import Tokenizer
from hymba.train import store as store_file
from hymba.train.readers import DataError
from hymba.train.sources import BEGIN, Document, Files, Place, Texts, key_of
from hymba.train.store import TokenStore, prepare


def tokens_of(store: TokenStore) -> list[int]:
    return store.read(0, store.ends[-1]).tolist()


def test_store_holds_the_documents(store: TokenStore, texts: Texts, tokenizer: Tokenizer) -> None:
    expected = [[1, *tokenizer.encode(text), 2] for text in texts]
    tokens = store.read(0, 10**9)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [i for ids in expected for i in ids]
    assert store.documents[:, 0].tolist() == [len(ids) for ids in expected]
    assert store.documents[:, 1].tolist() == [len(text.encode()) for text in texts]
    assert store.manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert store.documents[-1, 1] == 6  # é🦊


def test_big_vocabularies_get_wider_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Big(Tokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts) -> list[list[int]]:
            return [[69_999] for _ in texts]

    store = prepare(tmp_path / "s", Texts(("x",)), Big(tokenizer.files))
    assert store.read(0, 3).tolist() == [1, 69_999, 2]


def test_prepare_reuses_what_fits_and_replaces_what_does_not(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    calls: list[tuple[int, int]] = []

    def make(source: Texts, by: Tokenizer) -> tuple[TokenStore, int]:
        calls.clear()
        store = prepare(tmp_path / "s", source, by, lambda done, total: calls.append((done, total)))
        return store, len(calls)

    first, passes = make(texts, tokenizer)
    assert passes > 0 and calls[-1] == (41, 41)
    assert make(texts, tokenizer)[1] == 0
    second, passes = make(Texts(texts.texts[:9]), tokenizer)
    assert passes > 0 and second.manifest["documents"] == 9
    other = Tokenizer.train(texts, vocab_size=270)
    third, passes = make(Texts(texts.texts[:9]), other)
    assert passes > 0 and third.identity != second.identity != first.identity
    with open(tmp_path / "s" / "00000.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="damaged"):
        TokenStore.open(tmp_path / "s")
    assert make(Texts(texts.texts[:9]), other)[1] > 0
    assert os.listdir(tmp_path) == ["s"]


def test_a_changed_file_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one")
    files = Files(tmp_path, ("a.txt",))
    before = prepare(tmp_path / "s", files, tokenizer).identity
    (tmp_path / "a.txt").write_text("another")
    assert prepare(tmp_path / "s", files, tokenizer).identity != before


def test_no_documents_and_no_special_tokens_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match="no documents"):
        prepare(tmp_path / "s", Texts(()), tokenizer)
    nameless = Tokenizer(tokenizer.files | {"tokenizer_config.json": b'{"eos_token": null}'})
    with pytest.raises(DataError, match="begin and end"):
        prepare(tmp_path / "s", Texts(("x",)), nameless)


# ---- shards


def test_documents_lie_in_shards_and_none_in_two(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    whole = prepare(tmp_path / "one", texts, tokenizer)
    store = prepare(tmp_path / "s", texts, tokenizer, shard_tokens=300)
    assert len(whole.files) == 1 and len(store.files) == len(store.manifest["shards"]) > 5
    assert (store.documents == whole.documents).all() and (store.starts == whole.starts).all()
    assert tokens_of(store) == tokens_of(whole)
    assert store.identity == whole.identity
    assert set(store.ends[:-1]) <= set(store.starts.tolist())
    sizes = np.diff([0, *store.ends])
    assert all(300 <= size < 300 + store.documents[:, 0].max() for size in sizes[:-1])
    for first, count in ((0, 1), (290, 50), (store.ends[0], 5), (5, 10**6), (10**6, 3)):
        assert store.read(first, count).tolist() == tokens_of(whole)[first : first + count]
    shards = {f"{i:05}.{ending}" for i in range(len(sizes)) for ending in ("bin", "npy")}
    assert set(os.listdir(tmp_path / "s")) == shards | {"manifest.json"}


def test_a_document_longer_than_a_shard_has_a_long_shard(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    long = "reads a row of words " * 50
    store = prepare(tmp_path / "s", Texts(("a", long, "b")), tokenizer, shard_tokens=20)
    assert [shard["documents"] for shard in store.manifest["shards"]] == [2, 1]
    assert store.read(int(store.starts[1]), 10**6)[0] == 1
    one = prepare(tmp_path / "t", Texts((long,)), tokenizer, shard_tokens=1)
    assert one.manifest["documents"] == 1 and len(one.files) == 1


def test_many_small_documents_fill_a_shard_too(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_file, "SHARD_DOCUMENTS", 3)
    store = prepare(tmp_path / "s", Texts(tuple("abcdefgh")), tokenizer)
    assert [shard["documents"] for shard in store.manifest["shards"]] == [3, 3, 2]


def test_empty_documents_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = prepare(tmp_path / "s", Texts(("", "a", "", "", "b", "")), tokenizer)
    assert store.manifest["documents"] == 2 and store.manifest["bytes"] == 2
    with pytest.raises(DataError, match="no documents"):
        prepare(tmp_path / "t", Texts(("", "")), tokenizer)
    assert os.listdir(tmp_path) == ["s"]


def test_the_manifest_says_what_the_store_is(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    prepare(tmp_path / "s", texts, tokenizer, shard_tokens=500)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["tokenizer"] == tokenizer.fingerprint
    assert manifest["source"] == texts.fingerprint
    for key in ("documents", "tokens", "bytes"):
        assert manifest[key] == sum(shard[key] for shard in manifest["shards"])
    assert manifest["documents"] == 41


def test_damage_is_noticed(tmp_path: Path, texts: Texts, tokenizer: Tokenizer) -> None:
    def break_(name: str, how: str) -> None:
        path = tmp_path / "s" / name
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-8] if how == "short" else b"x" + content[1:])

    for name, how in (
        *((f"00001.{e}", how) for e in ("bin", "npy") for how in ("gone", "short")),
        ("00001.npy", "changed"),
        ("manifest.json", "changed"),
        ("manifest.json", "short"),
    ):
        expected = prepare(tmp_path / "s", texts, tokenizer, shard_tokens=500)
        break_(name, how)
        with pytest.raises(DataError, match=r"damaged: delete it|is no token store"):
            TokenStore.open(tmp_path / "s")
        if name != "manifest.json" or how == "short":
            again = prepare(tmp_path / "s", texts, tokenizer, shard_tokens=500)
            assert tokens_of(again) == tokens_of(expected)


def test_a_folder_that_is_no_store_is_never_replaced(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(DataError, match="name another folder"):
            prepare(tmp_path / name, texts, tokenizer)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", texts, tokenizer).manifest["documents"] == 41


# ---- most_tokens


def test_most_tokens_end_with_the_document_that_reaches_them(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    whole = prepare(tmp_path / "whole", texts, tokenizer)
    ends = np.cumsum(whole.documents[:, 0])
    for most in (1, int(ends[4]), int(ends[4]) + 1, 10**9):
        told: list[tuple[int, int | None]] = []
        store = prepare(
            tmp_path / f"s{most}",
            texts,
            tokenizer,
            lambda *done: told.append(done),  # noqa: B023
            most_tokens=most,
            shard_tokens=100,
        )
        want = min(41, int(np.searchsorted(ends, most)) + 1)
        assert store.manifest["documents"] == want and store.identity != whole.identity
        assert tokens_of(store) == tokens_of(whole)[: store.ends[-1]]
        assert told


def test_a_stream_of_unknown_length_is_told_in_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Endless(Texts):
        def documents(self, start: Place = BEGIN) -> Iterator[Document]:
            for i in range(start[1], 10**9):
                yield Document(f"text {i}", None, (0, i + 1), i + 1)

        size: Any = None

    told: list[tuple[int, int | None]] = []
    store = prepare(
        tmp_path / "s",
        Endless(()),
        tokenizer,
        lambda *done: told.append(done),
        most_tokens=2000,
        shard_tokens=500,
    )
    assert 2000 <= store.manifest["tokens"] < 2100
    assert told[0][1] == 2000 and told[-1][0] <= 2000 and told == sorted(told)


def test_memory_is_that_of_a_batch_not_of_the_corpus(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_file, "ENCODE_BYTES", 20_000)
    peaks = []
    for many in (100, 1000):
        path = tmp_path / f"{many}.jsonl"
        path.write_text((json.dumps({"text": "a row of words " * 100}) + "\n") * many)
        tracemalloc.start()
        prepare(tmp_path / f"s{many}", Files(tmp_path, (path.name,)), tokenizer, None, None, 40_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# ---- parts


def test_a_store_is_split_by_the_documents_keys(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    store = prepare(tmp_path / "s", texts, tokenizer, shard_tokens=300)
    train, held = store.split(30)
    wanted = [key_of(text) < 0.3 * 2**63 for text in texts]
    assert 0 < sum(wanted) == held.manifest["documents"] < 41
    for part, side in ((train, False), (held, True)):
        chosen = [text for text, out in zip(texts, wanted, strict=True) if out == side]
        assert part.manifest["bytes"] == sum(len(text.encode()) for text in chosen)
        read = [
            part.read(int(s), int(n)).tolist()
            for s, n in zip(part.starts, part.documents[:, 0], strict=True)
        ]
        assert read == [[1, *tokenizer.encode(text), 2] for text in chosen]
        assert part.manifest["tokens"] == int(part.pairs.sum()) + len(chosen)
    assert len({store.identity, train.identity, held.identity, store.split(29)[0].identity}) == 4


def test_copies_of_held_out_texts_are_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files are held out by their names; a copy under another name would leak."""
    names = [f"{i}.txt" for i in range(60)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"text {i % 20}")
    store = prepare(tmp_path / "s", Files(tmp_path, tuple(names)), tokenizer)
    train, held = store.split(10)
    out = {i % 20 for i, name in enumerate(names) if key_of(name) < 0.1 * 2**63}
    assert out and train.manifest["documents"] == sum(i % 20 not in out for i in range(60))
    assert not set(train.documents[:, 3]) & set(held.documents[:, 3])
    assert train.without(held) is train


def test_stores_end_to_end(tmp_path: Path, texts: Texts, tokenizer: Tokenizer) -> None:
    a = prepare(tmp_path / "a", Texts(texts.texts[:15]), tokenizer, shard_tokens=200)
    b = prepare(tmp_path / "b", Texts(texts.texts[15:]), tokenizer, shard_tokens=300)
    both, whole = TokenStore.joined([a, b]), prepare(tmp_path / "c", texts, tokenizer)
    assert tokens_of(both) == tokens_of(whole) and len(both.files) == len(a.files) + len(b.files)
    assert (both.starts == whole.starts).all() and (both.documents == whole.documents).all()
    assert both.identity != TokenStore.joined([b, a]).identity
    assert TokenStore.joined([a]) is a
    assert both.manifest["bytes"] == whole.manifest["bytes"]
