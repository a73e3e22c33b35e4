"""Tokens on disk: all of them, once, whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hymba.tokenizer import Tokenizer
from hymba.train.sources import DataError, Files, Texts
from hymba.train.store import TokenStore, prepare


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


def test_an_interrupted_preparation_leaves_the_old_store(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    prepare(tmp_path / "s", texts, tokenizer)

    class Broken(Texts):
        def __iter__(self) -> Iterator[str]:
            yield from self.texts[:70]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s", Broken(texts.texts * 2), tokenizer)
    assert TokenStore.open(tmp_path / "s").manifest["documents"] == 41
    assert os.listdir(tmp_path) == ["s"]


def test_no_documents_and_no_special_tokens_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match="no documents"):
        prepare(tmp_path / "s", Texts(()), tokenizer)
    nameless = Tokenizer(tokenizer.files | {"tokenizer_config.json": b'{"eos_token": null}'})
    with pytest.raises(DataError, match="begin and end"):
        prepare(tmp_path / "s", Texts(("x",)), nameless)
