"""`hymba demo` and `hymba generate` as a user runs them, on the real corpus and few steps."""

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")
pytest.importorskip("rich", reason="the demo's table is drawn by rich")

from hymba import cli  # noqa: E402
from hymba.model.accounting import cache_bytes  # noqa: E402
from hymba.recipes import demo as recipe  # noqa: E402
from hymba.weights import load  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo of two steps."""
    place = tmp_path_factory.mktemp("demo") / "run"
    assert cli.main(["demo", "--folder", str(place), "--steps", "2"]) == 0
    return place


def test_models_have_one_budget() -> None:
    hybrid, attention = recipe.hybrid(), recipe.attention_only()
    assert {layer.window for layer in hybrid.layers} == {None, 64} and hybrid.meta_tokens == 16
    assert any(layer.kv_from is not None for layer in hybrid.layers)
    assert not any(layer.ssm for layer in attention.layers)


def test_it_leaves_models_a_table_and_a_figure(folder: Path) -> None:
    table = json.loads((folder / "result.json").read_text())["table"]
    for name, title in (("hymba", "hybrid heads"), ("llama", "attention only")):
        config = load(folder / name).config
        for length in (512, 2048, 4096):
            want = f"{cache_bytes(config, length, kv_bytes=4)['total']:,}"
            for kind in ("predicted", "allocated"):
                assert table[f"cache bytes at {length:,} tokens, {kind}"][title] == want
    assert (folder / "demo.png").stat().st_size > 10_000


def test_a_second_run_reuses_what_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert cli.main(["demo", "--folder", str(folder), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "going on with it" in out and "going on after step 2" in out
    assert (folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == before


def test_what_it_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for place, steps, said in (
        (folder, "3", "made with"),
        (tmp_path, "2", "no demo"),
        (tmp_path / "mine.txt", "2", "is a file"),
    ):
        for fresh in ([], ["--fresh"])[: 1 if place == folder else 2]:
            assert cli.main(["demo", "--folder", str(place), "--steps", steps, *fresh]) == 2
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream, and a batch in which each prompt gives what it gives alone."""
    model, length = str(folder / "hymba"), ["--max-tokens", "8"]
    alone = []
    for prompt in ("import os", "class Node:\n    def f"):
        assert cli.main(["generate", model, prompt, *length]) == 0
        alone.append(capsys.readouterr().out.rstrip("\n"))
        assert alone[-1].startswith(prompt)
    assert cli.main(["generate", model, "import os", "class Node:\n    def f", *length]) == 0
    assert capsys.readouterr().out.rstrip("\n") == "\n".join(f"--- {text}" for text in alone)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompt"),
        (["x", ""], "prompt 1 is empty"),
        (["x", "--max-tokens", "0"], "max_tokens"),
        (["x", "--top-p", "2"], "top_p"),
        (["x", "--dtype", "float3"], "dtype"),
        (["x", "--device", "toaster"], "device"),
        (["x " * 20000], "tokens"),
    ],
)
def test_generate_refuses(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(folder / "hymba"), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
