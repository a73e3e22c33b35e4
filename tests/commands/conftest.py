"""Models and runs of `hymba generate`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba import cli
from tests.commands.generating import Ran, Run, as_jsonl, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lively: Callable[..., Any]) -> Path:
    """A model that never ends by itself and says letters, digits and spaces."""
    return save_model(tmp_path_factory.mktemp("model"), lively, 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, lively: Callable[..., Any]) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), lively, 1)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) of `hymba generate MODEL`; `given` is standard input."""

    def call(*argv: object, given: bytes = b"", model: Path = folder) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        words = ["--max-tokens", "6", "--threads", "1", "--device", "cpu", *map(str, argv)]
        code = cli.main(["generate", str(model), *words])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def job(run: Run, tmp_path: Path) -> Callable[..., Ran]:
    """job(lines, *options): a batch job; its answers come as `out` too."""

    def call(lines: list[Any] | bytes, *argv: object, **kwargs: Any) -> Ran:
        (tmp_path / "in.jsonl").write_bytes(as_jsonl(lines))
        files = "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"
        ran = run(*files, *argv, **kwargs)
        assert ran.out == ""
        path = tmp_path / "out.jsonl"
        return ran._replace(out=path.read_text(encoding="utf-8") if path.exists() else "")

    return call
