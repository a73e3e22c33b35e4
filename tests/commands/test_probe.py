"""`hymba probe`: a report from a folder, and one clear line for what goes wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the command line needs tyro")
from hymba import cli  # noqa: E402
from hymba.eval.probe import run as running  # noqa: E402
from hymba.eval.probe import texts  # noqa: E402
from hymba.eval.probe.samples import SAMPLES  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402
from tests.commands.generating import Ran  # noqa: E402


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run(*arguments) of `hymba probe MODEL --out tmp_path/out`."""

    def call(*argv: object, model: Path = folder) -> Ran:
        words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
        code = cli.main(["probe", str(model), *words, "--channels", "4", *map(str, argv)])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a cat.\n" * 40, encoding="utf-8")
    return path


def fails(ran: Ran, *said: str) -> None:
    """Exit 2, one line on standard error, nothing written."""
    code, out, err = ran
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    for word in said:
        assert word in err


def test_a_report_of_two_texts(run: Callable[..., Ran], story: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "story.txt"
    other.parent.mkdir()
    other.write_text("def cat(n):\n    return n + 1\n" * 9, encoding="utf-8")
    code, out, err = run("--text", story, other, "--tokens", 40)
    assert (code, err) == (0, "")
    assert "agrees:" in out and "index.html" in out
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert [text["name"] for text in found["texts"]] == ["story", "story-2"]
    assert found["texts"][0] == {
        "name": "story", "tokens": 40, "whole": False, "note": ", its beginning",
    }  # fmt: skip
    assert found["channels"].startswith("4 of ")
    assert found["command"].startswith("hymba probe ")
    assert set(found["importance"]["loss_by_text"]) == {"story", "story-2"}
    maps = json.loads((tmp_path / "out/maps.json").read_text())
    assert "".join(maps["texts"]["story"]["tokens"]).removeprefix("<s>").startswith("Once upon")
    assert run("--text", story, "--tokens", 20)[0] == 0  # again, into the same folder


def test_the_samples_are_looked_at_without_texts(run: Callable[..., Ran], tmp_path: Path) -> None:
    code, _, _ = run("--tokens", 24, "--heads", "none")
    assert code == 0
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert [text["name"] for text in found["texts"]] == list(SAMPLES)
    assert all(part["head"] is None for part in found["importance"]["parts"])
    assert "Single heads" in " ".join(found["left_out"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\n\t ", "empty"),
        (b"a b", "at least 16"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe" * 40, "no text in UTF-8"),
        (b"abc\0def" * 40, "binary"),
    ],
)
def test_what_is_no_text(
    run: Callable[..., Ran], tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "it").write_bytes(content)
    fails(run("--text", tmp_path / "it"), str(tmp_path / "it"), said)
    assert not (tmp_path / "out").exists()


def test_missing_things(
    run: Callable[..., Ran], folder: Path, story: Path, tmp_path: Path, capsys: Any
) -> None:
    fails(run("--text", tmp_path / "none.txt"), "there is no file", "none.txt")
    fails(run("--text", tmp_path), "is a folder")
    fails(run(model=tmp_path / "no-model"), "no model folder")
    fails(run("--tokens", 3), "--tokens must be 16 or more")
    fails(run("--channels", 0), "--channels must be 1 or more")
    assert cli.main(["probe", str(folder)]) == 2
    assert "--out" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    fails(run(model=bare), "no tokenizer.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    fails(run("--out", tmp_path / "mine"), "no report", "name another --out")


def test_interrupted_before_the_end(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "importance", stopped)
    code, out, err = run("--tokens", 16)
    assert (code, out) == (130, "") and "interrupted" in err
    assert not list(tmp_path.iterdir())


def test_a_long_file_is_read_from_its_beginning(folder: Path, tmp_path: Path) -> None:
    """And a letter cut in two where reading stops is no mistake, nor is a mark of byte order."""
    path, tokenizer = tmp_path / "long.txt", Tokenizer.from_folder(folder)
    path.write_bytes(b"\xef\xbb\xbf" + "€é ".encode() * 100_000)
    for tokens in (16, 17, 18, 19):
        (found,) = texts.read([str(path)], tokenizer, tokens)
        assert len(found.ids) == tokens and not found.whole
        assert "\ufeff" not in "".join(found.pieces)


def test_samples_are_texts_of_four_kinds(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    found = texts.read([], tokenizer, 10**6)
    assert [text.name for text in found] == ["prose", "code", "mathematics", "dialogue"]
    assert all(text.whole and len(text.ids) > 256 for text in found)
    compile(SAMPLES["code"], "code", "exec")
