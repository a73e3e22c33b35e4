"""bench/exported.py on a tiny folder: its figures, and the examples it tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="pip install 'hymba[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'hymba[onnx]'")
from bench import exported  # noqa: E402
from hymba.config import Config  # noqa: E402
from hymba.export import Choices, export  # noqa: E402
from hymba.model.decoder import LanguageModel  # noqa: E402


def test_depths_are_measured(
    tiny: Callable[[str], Config], lively: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    export(lively(tiny("hymba")), tmp_path / "onnx", Choices(chunk=8))
    out = tmp_path / "out.json"
    words = [str(tmp_path / "onnx"), "--depth", "0", "20", "--steps", "3", "--threads", "1"]
    assert exported.main([*words, "--json", str(out)]) == 0
    first, second = json.loads(out.read_text())["rows"]
    assert (first["depth"], second["depth"]) == (0, 20)
    assert first["prefill tokens/s, median chunk"] is None
    assert second["prefill tokens/s, median chunk"] > 0
    assert 0 < second["decode ms, quickest"] <= second["decode ms, median"]


def test_examples_are_accepted() -> None:
    for line in exported.EXAMPLES.splitlines()[1:]:
        words = line.split()
        assert words[:3] == ["python", "-m", "bench.exported"]
        exported.read(words[3:])
