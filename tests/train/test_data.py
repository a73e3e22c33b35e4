"""Documents to rows: nothing lost, nothing twice, the same again, resumable anywhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hymba.tokenizer import Tokenizer
from hymba.train.data import (
    DataError,
    Files,
    HeldOut,
    Loader,
    Packed,
    Packer,
    Texts,
    TokenStore,
    prepare,
    python_library,
    split,
)

LENGTH = 16


# ---- sources


def test_python_library_is_real_text_without_tests_and_copies() -> None:
    files = python_library()
    assert len(files) > 300
    assert {"token.py", "json/decoder.py"} <= set(files.names)
    assert not [name for name in files.names if "/test/" in f"/{name}" or "encodings/" in name]
    texts = list(files)
    assert len(set(texts)) == len(texts)
    assert sum(len(text) for text in texts) > 5e6


def test_python_library_skips_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes("# é\r\n".encode())
    (tmp_path / "copy.py").write_bytes("# é\r\n".encode())
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_bytes(b"\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_bytes(b"x = 1\n")
    (tmp_path / "test.py").write_bytes(b"y = 1\n")
    files = python_library(tmp_path)
    assert files.names == ("copy.py", "test.py")
    assert list(files) == ["# é\r\n", "y = 1\n"]  # line ends as they are: bits per byte counts them
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no Python sources"):
        python_library(tmp_path / "bare")


def test_split_depends_on_each_name_alone(tmp_path: Path) -> None:
    many = Files(tmp_path, tuple(f"package/file_{i}.py" for i in range(4000)))
    train, held = split(many, percent=5)
    assert sorted(train.names + held.names) == sorted(many.names)
    assert 150 < len(held) < 250
    _, fewer = split(Files(tmp_path, many.names[::2]), percent=5)
    assert set(fewer.names) == set(held.names) & set(many.names[::2])
    with pytest.raises(DataError, match="cannot be split"):
        split(Files(tmp_path, ("a.py",)))


def test_which_files_are_held_out_never_changes() -> None:
    """Results name bits per byte on these files; another hash would make them incomparable."""
    _, held = split(python_library())
    assert {"copyreg.py", "sched.py", "token.py"} <= set(held.names)


def test_files_tell_what_they_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        list(Files(tmp_path, ("a.txt",)))


# ---- store


def test_store_holds_the_documents(store: TokenStore, texts: Texts, tokenizer: Tokenizer) -> None:
    expected = [[1, *tokenizer.encode(text), 2] for text in texts]
    assert store.tokens.dtype == np.uint16
    assert store.tokens.tolist() == [i for ids in expected for i in ids]
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
    assert store.tokens.tolist() == [1, 69_999, 2]


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
    with open(tmp_path / "s" / "tokens.bin", "r+b") as file:
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


# ---- rows


def pairs_of(packed: Packed) -> list[tuple[int, int]]:
    return list(zip(packed.tokens.tolist(), packed.labels.tolist(), strict=True))


def test_every_pair_comes_once_an_epoch_but_for_a_last_part_row(store: TokenStore) -> None:
    packer = Packer(store, LENGTH, seed=0)
    total = int(store.pairs.sum())
    for epoch in (0, 1):
        seen: list[int] = []
        for row in range(packer.rows_per_epoch):
            pieces = packer.pieces(epoch * packer.rows_per_epoch + row)
            assert sum(length for _, length in pieces) == LENGTH
            seen += [first + i for first, length in pieces for i in range(length)]
        assert len(seen) == len(set(seen)) == total - total % LENGTH
        last_tokens = store.starts + store.documents[:, 0] - 1
        assert not set(seen) & set(last_tokens.tolist())  # </s> is never an input


def test_labels_are_the_next_tokens_of_the_same_document(store: TokenStore) -> None:
    """At the end of a row too: no label is lost where a document is cut."""
    loader = Loader(Packer(store, LENGTH, seed=3))
    after = {}  # position in the store -> next token
    for start, length in zip(store.starts, store.documents[:, 0], strict=True):
        after |= {int(start) + i: int(store.tokens[start + i + 1]) for i in range(length - 1)}
    for row in range(loader.packer.rows_per_epoch):
        packed = loader.take(1)
        places = [f + i for f, length in loader.packer.pieces(row) for i in range(length)]
        assert packed.tokens.tolist() == [int(store.tokens[p]) for p in places]
        assert packed.labels.tolist() == [after[p] for p in places]
        assert packed.tokens.dtype == packed.labels.dtype == torch.int64


def test_documents_begin_with_bos_and_pieces_break_at_documents(store: TokenStore) -> None:
    packed = Loader(Packer(store, LENGTH, seed=0)).take(50)
    starts = np.cumsum([0, *packed.lengths[:-1]])
    begins = (packed.tokens == 1).nonzero().squeeze(1).tolist()
    assert begins and set(begins) <= set(starts.tolist())
    ends = set((starts + np.array(packed.lengths) - 1).tolist())
    assert set((packed.labels == 2).nonzero().squeeze(1).tolist()) <= ends
    assert len(packed.lengths) > 50 and max(packed.lengths) == LENGTH


def test_rows_are_shuffled_differently_by_epoch_and_seed(store: TokenStore) -> None:
    packer = Packer(store, LENGTH, seed=0)
    count = packer.rows_per_epoch
    first = [packer.pieces(row) for row in range(count)]
    assert first != [packer.pieces(count + row) for row in range(count)]
    assert first != [Packer(store, LENGTH, seed=1).pieces(row) for row in range(count)]
    assert first == [Packer(store, LENGTH, seed=0).pieces(row) for row in range(count)]
    in_a_row = sum(b[0][0] == a[0][0] + LENGTH for a, b in zip(first, first[1:], strict=False))
    assert in_a_row < count / 5  # cuts of one document are spread out


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    """A checkpoint names a row by number; these numbers must outlive versions of numpy."""
    order = np.random.RandomState([7, 2]).permutation(8).tolist()
    assert order == [7, 6, 4, 1, 5, 2, 0, 3]


@pytest.mark.parametrize("at", [0, 1, 7, 100])
def test_loader_goes_on_at_the_exact_row(store: TokenStore, at: int) -> None:
    one = Loader(Packer(store, LENGTH, seed=0))
    for _ in range(at):
        one.take(3)
    other = Loader(Packer(store, LENGTH, seed=0))
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        a, b = one.take(3), other.take(3)
        assert pairs_of(a) == pairs_of(b) and a.lengths == b.lengths
    assert one.epoch == other.epoch == (at + 3) * 3 / one.packer.rows_per_epoch


def test_rows_do_not_depend_on_how_many_are_taken_at_once(store: TokenStore) -> None:
    """So a checkpoint may go on with another batch size or number of processes."""
    one, other = (Loader(Packer(store, LENGTH, seed=0)) for _ in range(2))
    count = one.packer.rows_per_epoch + 3  # over the end of an epoch
    many = one.take(count)
    few = [other.take(1) for _ in range(count)]
    assert pairs_of(many) == [pair for packed in few for pair in pairs_of(packed)]


@pytest.mark.parametrize(
    ("key", "packer"),
    [
        ("sequence_length", lambda store, _: Packer(store, LENGTH + 1, 0)),
        ("seed", lambda store, _: Packer(store, LENGTH, 1)),
        ("corpus", lambda _, other: Packer(other, LENGTH, 0)),
    ],
)
def test_loader_refuses_a_row_number_of_other_rows(
    store: TokenStore, tokenizer: Tokenizer, tmp_path: Path, key: str, packer
) -> None:
    other = prepare(tmp_path / "s", Texts(("some other text " * 9,)), tokenizer)
    state = Loader(Packer(store, LENGTH, 0)).state_dict()
    with pytest.raises(DataError, match=f"made with {key}"):
        Loader(packer(store, other)).load_state_dict(state)


def test_too_little_text_for_a_row_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="too few for one row"):
        Packer(store, 100_000, seed=0)


# ---- held out


@pytest.mark.parametrize("rows", [1, 4])
def test_held_out_covers_whole_documents_once(store: TokenStore, rows: int) -> None:
    held = HeldOut(store, LENGTH, rows)
    seen: list[tuple[int, int]] = []
    for packed in held:
        assert 0 < sum(packed.lengths) == packed.tokens.numel() <= rows * LENGTH
        assert max(packed.lengths) <= LENGTH
        seen += pairs_of(packed)
    flat = store.tokens.tolist()
    spans = zip(store.starts, store.documents[:, 0], strict=True)
    expected = [(flat[s + i], flat[s + i + 1]) for s, n in spans for i in range(n - 1)]
    assert seen == expected
    assert held.labels == len(expected) and held.bytes == store.manifest["bytes"]


def test_held_out_stops_at_whole_documents(store: TokenStore) -> None:
    held = HeldOut(store, LENGTH, 4, most_tokens=500)
    seen = [pair for packed in held for pair in pairs_of(packed)]
    assert len(seen) == held.labels <= 500
    assert sum(label == 2 for _, label in seen) == sum(token == 1 for token, _ in seen) > 1
    assert held.bytes < store.manifest["bytes"]
    again = [pair for p in HeldOut(store, LENGTH, 4, most_tokens=500) for pair in pairs_of(p)]
    assert seen == again
    assert HeldOut(store, LENGTH, 4, most_tokens=1).labels >= 1  # at least one document
