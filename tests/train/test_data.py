"""From names of sources to a tokenizer and rows: kept, mixed, held out; mistakes in one line."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hymba.hub import HubError
from hymba.tokenizer import Tokenizer, TokenizerError
from hymba.train import data as data_file
from hymba.train.data import Data, DataConfig, find, open_data, parse
from hymba.train.python_files import PythonFiles
from hymba.train.readers import DataError
from hymba.train.rows import HeldOut, Mixture, Packed, Packer
from hymba.train.sources import HubStream, key_of

LENGTH = 16


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with two sources that share no word."""
    (tmp_path / "a.jsonl").write_text(lines("alpha", 120))
    (tmp_path / "notes").mkdir()
    for i in range(60):
        (tmp_path / "notes" / f"{i}.md").write_text(f"beta {i} " * (1 + i % 7))
    return tmp_path


def lines(word: str, many: int) -> str:
    rows = ({"text": f"{word} {i} " * (1 + i % 9)} for i in range(many))
    return "".join(json.dumps(row) + "\n" for row in rows)


def config(corpus: Path, *sources: str, **changes: Any) -> DataConfig:
    names = tuple(str(corpus / source) for source in sources or ("a.jsonl",))
    given = {"folder": corpus / "kept", "vocab_size": 300, "held_out_percent": 10.0}
    return DataConfig(names, **(given | changes))


def words(data: Data, packed: Packed) -> Counter[str]:
    text = data.tokenizer.decode(packed.tokens.tolist())
    return Counter({word: text.count(word) for word in ("alpha", "beta")})


# ---- what comes out


def test_one_source_without_a_weight(corpus: Path) -> None:
    data = open_data(config(corpus))
    rows = data.rows(LENGTH, seed=3)
    assert isinstance(rows, Packer) and rows.sequence_length == LENGTH and rows.seed == 3
    assert data.tokenizer.vocab_size == 300 and data.held_out is not None
    texts = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    held = [text for text in texts if key_of(text) < 0.1 * 2**63]
    assert 0 < len(held) == data.held_out.manifest["documents"]
    assert data.corpora[0].store.manifest["documents"] == 120 - len(held)
    seen = [data.tokenizer.decode(p.tokens.tolist()) for p in HeldOut(data.held_out, 4096, 1)]
    assert "".join(seen) == "".join(held)


def test_sources_are_mixed_by_their_weights(corpus: Path) -> None:
    data = open_data(config(corpus, "a.jsonl=3", "notes=1"))
    rows = data.rows(LENGTH, 0)
    assert isinstance(rows, Mixture) and rows.counts == (768, 256)
    assert [corpus.weight for corpus in data.corpora] == [3, 1]
    found = [words(data, rows.row(i)) for i in range(400)]
    beta = sum(count["beta"] > 0 for count in found) / 400
    assert beta == pytest.approx(0.25, abs=0.05)
    assert not any(count["alpha"] and count["beta"] for count in found)  # a row is of one source


def test_without_weights_all_text_counts_alike(corpus: Path) -> None:
    data = open_data(config(corpus, "a.jsonl", "notes"))
    rows = data.rows(LENGTH, 0)
    assert isinstance(rows, Packer)
    total = sum(int(corpus.store.pairs.sum()) for corpus in data.corpora)
    assert rows.rows_per_epoch == total // LENGTH
    seen: Counter[str] = Counter()
    for i in range(rows.rows_per_epoch):
        seen += words(data, rows.row(i))
    whole = Counter(alpha=0, beta=0)
    for corpus_ in data.corpora:
        store = corpus_.store
        text = data.tokenizer.decode(store.read(0, store.ends[-1]).tolist())
        whole += Counter(alpha=text.count("alpha"), beta=text.count("beta"))
    for word in whole:
        assert 0.75 * whole[word] < seen[word] <= whole[word]  # held-out ones are among the whole


def test_one_source_with_a_weight_is_that_source(corpus: Path) -> None:
    assert isinstance(open_data(config(corpus, "a.jsonl=0.2")).rows(LENGTH, 0), Packer)


def test_a_second_run_starts_at_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int | None]] = []
    first = open_data(config(corpus, "a.jsonl=1", "notes=1"), lambda *done: told.append(done))
    assert {what.split(" ")[0] for what, _, _ in told} == {"learning", "tokenising"}
    assert [total for what, _, total in told if "a.jsonl" in what] == [
        (corpus / "a.jsonl").stat().st_size
    ] * 2
    told.clear()
    monkeypatch.setattr(Tokenizer, "train", None)
    again = open_data(config(corpus, "a.jsonl=1", "notes=1"), lambda *done: told.append(done))
    assert not told and again.facts == first.facts
    assert again.rows(LENGTH, 0).identity == first.rows(LENGTH, 0).identity
    kept = [path.name.rpartition("-")[0] for path in (corpus / "kept").iterdir()]
    for end in ("a.jsonl", "notes", "tokenizer-300"):
        assert sum(name.endswith(end) for name in kept) == 1
    assert len(kept) == 3


def test_other_data_does_not_disturb_what_is_kept(corpus: Path) -> None:
    open_data(config(corpus))
    before = {path: path.stat().st_mtime_ns for path in (corpus / "kept").rglob("*")}
    (corpus / "b.jsonl").write_text(lines("gamma", 100))
    open_data(config(corpus, "b.jsonl"))
    open_data(config(corpus, vocab_size=280))
    open_data(config(corpus, most_tokens=1000))
    (corpus / "a.jsonl").write_text(lines("delta", 100))
    changed = open_data(config(corpus))
    assert changed.corpora[0].store.manifest["documents"] < 100
    after = {path: path.stat().st_mtime_ns for path in (corpus / "kept").rglob("*")}
    assert before.items() < after.items() | {(corpus / "kept", before.get(corpus / "kept", 0))}


def test_a_tokenizer_can_be_given(corpus: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(corpus / "model")
    data = open_data(config(corpus, tokenizer=str(corpus / "model")))
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    assert not list((corpus / "kept").glob("tokenizer*"))


def test_a_tokenizer_is_not_learnt_from_held_out_text(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []
    train = Tokenizer.train

    def spy(texts: Any, vocab_size: int) -> Tokenizer:
        learnt.extend(texts)
        return train(learnt, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    open_data(config(corpus, "a.jsonl", "notes"))
    names = [f"{i}.md" for i in range(60) if key_of(f"{i}.md") >= 0.1 * 2**63]
    rows = [text for text in learnt if text.startswith("alpha")]
    assert 90 < len(rows) < 120 and all(key_of(text) >= 0.1 * 2**63 for text in rows)
    assert len(learnt) == len(rows) + len(names)
    learnt.clear()
    monkeypatch.setattr(data_file, "TOKENIZER_BYTES", 400)
    open_data(config(corpus, "a.jsonl", "notes"))
    assert sum(map(len, learnt)) < 600 and {text[0] for text in learnt} == {"a", "b"}


def test_held_out_sources(corpus: Path) -> None:
    """All of them, and none of their texts is trained on, whatever file it is in."""
    text = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
    (corpus / "unseen.jsonl").write_text("".join(text[:30]) + lines("epsilon", 10))
    data = open_data(config(corpus, "a.jsonl", held_out=(str(corpus / "unseen.jsonl"),)))
    assert data.held_out is not None and data.held_out.manifest["documents"] == 40
    assert data.corpora[0].store.manifest["documents"] == 90
    whole = open_data(config(corpus, held_out_percent=0.0))
    assert whole.held_out is None and whole.corpora[0].store.manifest["documents"] == 120
    assert len(data.facts) == 2 and len(whole.facts) == 1


def test_the_facts_are_lines_for_people(corpus: Path) -> None:
    first, second, held = open_data(config(corpus, "a.jsonl=3", "notes=1")).facts
    assert first.startswith(f"{corpus / 'a.jsonl'}: 1") and first.endswith("bytes, weight 3")
    assert "MB" in second and held.startswith("held out: ")


def test_most_tokens_are_of_each_source(corpus: Path) -> None:
    data = open_data(config(corpus, "a.jsonl", "notes", most_tokens=500))
    assert data.held_out is not None
    total = data.held_out.manifest["tokens"] + sum(
        corpus.store.manifest["tokens"] for corpus in data.corpora
    )
    assert 1000 <= total < 1200


def test_the_library_is_split_as_ever(tmp_path: Path) -> None:
    """Its held-out files are the demo's, so that numbers can be compared."""
    source = find("python-library")
    held = [d for d in source.documents() if d.key is not None and d.key < 0.05 * 2**63]
    assert 10 < len(held) < 60
    assert DataConfig().held_out_percent == 5.0 and DataConfig().sources == ("python-library",)


# ---- odd sizes


def test_one_document(corpus: Path) -> None:
    (corpus / "one.txt").write_text("all there is " * 20)
    with pytest.raises(DataError, match=r"10 percent of the sources is no document.* 0 for none"):
        open_data(config(corpus, "one.txt"))
    data = open_data(config(corpus, "one.txt", held_out_percent=0.0, vocab_size=260))
    packed = data.rows(LENGTH, 0).row(10**6)
    assert len(packed.tokens) == LENGTH
    held = config(corpus, "one.txt", held_out=(str(corpus / "one.txt"),))
    with pytest.raises(DataError, match="one.txt has no documents left that are not held out"):
        open_data(held)


def test_a_source_that_would_be_held_out_as_a_whole_is_trained_on(corpus: Path) -> None:
    text = next(str(i) for i in range(99) if key_of(str(i)) < 0.1 * 2**63)
    (corpus / "one.txt").write_text(text)
    small = open_data(config(corpus, "a.jsonl", "one.txt"))
    assert [len(each.store.documents) for each in small.corpora][1] == 1
    with pytest.raises(DataError, match="10 percent of the sources is no document"):
        open_data(config(corpus, "one.txt"))


def test_a_source_smaller_than_a_row_is_named(corpus: Path) -> None:
    (corpus / "short.txt").write_text("short")
    data = open_data(config(corpus, "a.jsonl=1", "short.txt=1"))
    with pytest.raises(DataError, match=r"short.txt: the corpus has \d+ tokens, too few"):
        data.rows(LENGTH, 0)
    together = open_data(config(corpus, "a.jsonl", "short.txt")).rows(LENGTH, 0)
    assert len(together.row(0).tokens) == LENGTH  # end to end it does no harm


def test_no_text_at_all(corpus: Path) -> None:
    (corpus / "none.jsonl").write_text('\n{"text": ""}\n{"text": null}\n')
    (corpus / "empty.txt").write_text("")
    for name in ("none.jsonl", "empty.txt"):
        with pytest.raises(DataError, match="no documents"):
            open_data(config(corpus, name))


# ---- names and weights


def test_a_source_is_found_by_its_name(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find("python"), PythonFiles)
    assert find("hf:a/b:en", "body") == HubStream("a/b", "en", "train", "body")
    monkeypatch.setenv("HOME", str(corpus))
    assert len(find("~/notes").names) == 60  # type: ignore[attr-defined]
    assert find(str(corpus / "a.jsonl"), "body").key == "body"  # type: ignore[attr-defined]
    monkeypatch.chdir(corpus / "notes")
    assert len(find("0.md").names) == 1  # type: ignore[attr-defined]
    for wrong in ("nothing.txt", "Python", "~nobody/here"):
        with pytest.raises(DataError, match=f"there is no file or folder {wrong}"):
            find(wrong)


def test_weights_are_read_from_behind_the_last_sign(corpus: Path) -> None:
    assert parse("a.txt=0.5") == ("a.txt", 0.5)
    assert parse("a.txt") == ("a.txt", None)
    assert parse("hf:a/b:en:train=1e-3") == ("hf:a/b:en:train", 1e-3)
    assert parse("a=b.txt=2") == ("a=b.txt", 2.0)
    strange = corpus / "size=3"
    strange.write_text("a file's own name")
    assert parse(str(strange)) == (str(strange), None)
    assert parse(f"{strange}=4") == (str(strange), 4.0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.jsonl=0", "a weight is above 0"),
        ("a.jsonl=-1", "a weight is above 0"),
        ("a.jsonl=nan", "a weight is above 0"),
        ("a.jsonl=inf", "a weight is above 0"),
        ("a.jsonl=half", "the weight 'half' is no number"),
        ("a.jsonl=", "the weight '' is no number"),
    ],
)
def test_weights_that_are_none_are_refused(corpus: Path, source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_data(config(corpus, source))
    assert not (corpus / "kept").exists()


def test_what_else_is_refused(corpus: Path) -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...], type[Exception], str]] = [
        ({}, ("a.jsonl=1", "notes"), DataError, "notes has no weight: give one to each"),
        ({}, ("a.jsonl=1", "a.jsonl=2"), DataError, "a.jsonl is given twice"),
        ({}, ("b.jsonl",), DataError, "there is no file or folder"),
        ({"held_out": ("gone.txt",)}, (), DataError, "there is no file or folder gone.txt"),
        ({"tokenizer": "gone"}, (), HubError, "there is no model folder gone"),
        ({"tokenizer": str(corpus)}, (), TokenizerError, "has no tokenizer.json"),
        ({"vocab_size": 100}, (), TokenizerError, "vocab_size 100 is too small"),
        ({"held_out_percent": 100.0}, (), DataError, "held_out_percent is 100"),
        ({"held_out_percent": math.nan}, (), DataError, "held_out_percent is nan"),
        ({"most_tokens": 0}, (), DataError, "most_tokens is 0"),
        ({"text_key": "body"}, (), DataError, 'line 1 has no "body"'),
    ]
    for changes, sources, kind, said in cases:
        with pytest.raises(kind, match=said):
            open_data(config(corpus, *sources, **changes))
    with pytest.raises(DataError, match="nothing to train on"):
        DataConfig(())


# ---- several commands at once


def test_two_commands_at_once(corpus: Path, root: Path) -> None:
    """Both make the tokenizer, one the tokens, and both read the same rows."""
    code = (
        "import sys; from pathlib import Path; from hymba.train.data import *\n"
        "corpus = Path(sys.argv[1])\n"
        "names = (str(corpus / 'a.jsonl'), str(corpus / 'notes'))\n"
        "data = open_data(DataConfig(names, vocab_size=300, folder=corpus / 'kept'))\n"
        "print(data.rows(16, 0).identity, data.rows(16, 0).row(5).tokens.tolist())"
    )
    command = [sys.executable, "-c", code, str(corpus)]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1] and said[0]
    assert len(list((corpus / "kept").iterdir())) == 3


def test_options_are_read_without_torch(root: Path) -> None:
    code = "import sys, hymba.train.data; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "tokenizers", "datasets"} & set(loaded.stdout.split())
