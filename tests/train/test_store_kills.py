"""Stores that are interrupted, killed or wanted twice at once: nothing lost, nothing made again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba.tokenizer import Tokenizer
from hymba.train import store as store_file
from hymba.train.sources import BEGIN, Document, Files, Place, Texts
from hymba.train.store import TokenStore, prepare


def tokens_of(store: TokenStore) -> list[int]:
    return store.read(0, store.ends[-1]).tolist()


class Fails(Texts):
    """Stops before document `at`, as Ctrl-C does."""

    at: int | None = None

    def documents(self, start: Place = BEGIN) -> Iterator[Document]:
        for document in super().documents(start):
            if self.at is not None and document.after[1] > self.at:
                raise KeyboardInterrupt
            yield document


def failing(texts: Texts, at: int | None) -> Fails:
    source = Fails(texts.texts)
    object.__setattr__(source, "at", at)
    return source


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents go into the tokenizer alone, so that an interruption loses no others."""
    monkeypatch.setattr(store_file, "ENCODE_AT_ONCE", 1)


def test_an_interrupted_preparation_leaves_the_old_store(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer
) -> None:
    prepare(tmp_path / "s", texts, tokenizer)

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s", failing(Texts(texts.texts * 2), at=70), tokenizer)
    assert TokenStore.open(tmp_path / "s").manifest["documents"] == 41
    assert os.listdir(tmp_path) == ["s"]


@settings(deadline=None, max_examples=15)
@given(
    words=st.lists(st.text("ab é🦊\n", max_size=9), min_size=3, max_size=12).filter(any),
    most=st.none() | st.integers(1, 80),
    stops=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    room=st.integers(1, 20),
    at_once=st.integers(1, 3),
)
def test_any_interruptions_leave_the_same_store(
    words: list[str],
    most: int | None,
    stops: list[int],
    room: int,
    at_once: int,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, texts = tmp_path_factory.mktemp("stores"), Texts(tuple(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_file, "ENCODE_AT_ONCE", at_once)
        for stop in stops:
            try:
                prepare(folder / "s", failing(texts, stop), tokenizer, None, most, room)
            except KeyboardInterrupt:
                assert not (folder / "s").exists()
        store = prepare(folder / "s", failing(texts, None), tokenizer, None, most, room)
        plain = prepare(folder / "plain", texts, tokenizer, None, most)
    assert tokens_of(store) == tokens_of(plain)
    assert (store.documents == plain.documents).all()
    expected = [i for text in texts if text for i in (1, *tokenizer.encode(text), 2)]
    assert tokens_of(store) == expected[: store.ends[-1]]
    assert most is not None or len(expected) == store.ends[-1]
    assert sorted(os.listdir(folder)) == ["plain", "s"]


def test_whole_shards_are_not_made_again(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, one_at_a_time: None
) -> None:
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s", failing(texts, 30), tokenizer, shard_tokens=200)
    done = len(list((tmp_path / "s.unfinished").glob("*.npy")))
    assert done > 3
    before = (tmp_path / "s.unfinished" / "00000.bin").stat().st_mtime_ns
    store = prepare(
        tmp_path / "s", failing(texts, None), tokenizer, lambda d, _: told.append(d), None, 200
    )
    first = sum(shard["documents"] for shard in store.manifest["shards"][:done])
    assert told[0] == first + 1 and told[-1] == 41
    assert store.files[0].stat().st_mtime_ns == before


def test_most_tokens_count_what_was_made_before(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, one_at_a_time: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s", failing(texts, 15), tokenizer, None, 2000, 200)
    store = prepare(tmp_path / "s", failing(texts, None), tokenizer, None, 2000, 200)
    assert tokens_of(store) == tokens_of(prepare(tmp_path / "t", texts, tokenizer, None, 2000))
    assert store.manifest["documents"] < 41


def test_shards_of_other_text_or_damaged_ones_are_made_again(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, one_at_a_time: None
) -> None:
    def interrupted() -> Path:
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "s", failing(texts, 30), tokenizer, shard_tokens=200)
        return tmp_path / "s.unfinished"

    interrupted()
    other = Texts(tuple(text + "!" for text in texts))
    assert tokens_of(prepare(tmp_path / "s", other, tokenizer)) == [
        i for text in other for i in (1, *tokenizer.encode(text), 2)
    ]
    with open(interrupted() / "00001.bin", "r+b") as file:
        file.truncate(10)
    (tmp_path / "s.unfinished" / "unfinished.json.unfinished").write_text("half")
    store = prepare(tmp_path / "s", failing(texts, None), tokenizer, shard_tokens=200)
    plain = prepare(tmp_path / "plain", texts, tokenizer)
    assert tokens_of(store) == tokens_of(plain)
    (interrupted_again := tmp_path / "t.unfinished").mkdir()
    (interrupted_again / "unfinished.json").write_text("{")
    assert tokens_of(prepare(tmp_path / "t", texts, tokenizer)) == tokens_of(plain)


KILLED = """
import os, signal, sys
from pathlib import Path
from hymba.tokenizer import Tokenizer
from hymba.train import store
from hymba.train.sources import file

def kill(done, total):
    if (folder.parent / "s.unfinished" / "00003.npy").exists():
        os.kill(os.getpid(), signal.SIGKILL)

store.ENCODE_AT_ONCE = 1
folder = Path(sys.argv[1]) / "s"
source = file(folder.parent / "corpus.jsonl")
store.prepare(folder, source, Tokenizer.from_folder(folder.parent), kill, None, 200)
"""


def test_a_killed_preparation_goes_on(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, root: Path
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "corpus.jsonl").write_text(lines)
    tokenizer.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, timeout=120)
    assert done.returncode == -signal.SIGKILL
    unfinished = tmp_path / "s.unfinished"
    before = (unfinished / "00003.bin").stat().st_mtime_ns
    source = Files(tmp_path, ("corpus.jsonl",))
    store = prepare(tmp_path / "s", source, tokenizer, shard_tokens=200)
    assert tokens_of(store) == [i for text in texts for i in (1, *tokenizer.encode(text), 2)]
    assert store.files[3].stat().st_mtime_ns == before and not unfinished.exists()


def test_a_kill_between_the_two_renames_costs_nothing(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "s", Texts(("old",)), tokenizer)
    rename = os.rename

    def killed(old: Path, new: Path) -> None:
        if old.name.endswith(".unfinished"):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s", texts, tokenizer)
    monkeypatch.undo()
    told: list[Any] = []
    store = prepare(tmp_path / "s", texts, tokenizer, lambda *done: told.append(done))
    assert store.manifest["documents"] == 41 and not told


@pytest.mark.skipif(store_file.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("breaks", [False, True])
def test_who_wants_what_another_is_making_waits_for_it(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, breaks: bool
) -> None:
    """A lock belongs to an opened file, so threads stand for processes here. Where the first one
    is interrupted, the next goes on."""
    made: list[int] = []
    interruptions = [30] if breaks else []

    class Slow(Texts):
        def documents(self, start: Place = BEGIN) -> Iterator[Document]:
            made.append(start[1])
            stop = interruptions.pop() if interruptions else None
            for document in super().documents(start):
                time.sleep(0.002)
                if document.after[1] == stop:
                    raise KeyboardInterrupt
                yield document

    def want(_: int) -> TokenStore | None:
        try:
            return prepare(tmp_path / "s", Slow(texts.texts), tokenizer, shard_tokens=200)
        except KeyboardInterrupt:
            return None

    with ThreadPoolExecutor(5) as pool:
        stores = list(pool.map(want, range(5)))
    assert len(made) == 1 + breaks and made[0] == 0
    assert sum(store is None for store in stores) == breaks
    expected = [i for text in texts for i in (1, *tokenizer.encode(text), 2)]
    assert all(tokens_of(store) == expected for store in stores if store)
    assert os.listdir(tmp_path) == ["s"]


def test_who_comes_just_as_another_is_done_finds_it_made(
    tmp_path: Path, texts: Texts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look for the store and the claim of its place, another process made it."""
    prepare(tmp_path / "s", texts, tokenizer)
    looks: list[int] = []
    look = store_file._fitting

    def late(folder: Path, wanted: dict[str, Any]) -> TokenStore | None:
        looks.append(1)
        return look(folder, wanted) if len(looks) > 1 else None

    monkeypatch.setattr(store_file, "_fitting", late)
    store = prepare(tmp_path / "s", texts, tokenizer, lambda *_: pytest.fail("made again"))
    assert store.manifest["documents"] == 41 and os.listdir(tmp_path) == ["s"]
