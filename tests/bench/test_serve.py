"""bench/serve.py: options, what is asked, and one small run over real HTTP."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import serve
from hymba.config import Config
from hymba.presets import hymba
from hymba.tokenizer import Tokenizer


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serve.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said and "python -m bench.serve" in said


def test_examples_are_accepted() -> None:
    for line in serve.EXAMPLES.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if words[:2] == ["python", "-m"]:
            assert words[2] == serve.__name__
            serve.read(words[3:])


@pytest.mark.parametrize(
    "wrong",
    [["--only", "llama"], ["--replicas", "0"], ["--loop-threads", "1,x"], ["--rounds", "0"]],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serve.read(wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_requests_are_mixed_and_never_the_same_twice() -> None:
    words = " ".join(f"word{i}" for i in range(4000))
    texts = serve.Texts([words], Tokenizer.train([words], 300))
    asks = texts.asks(200)
    assert len({ask.prompt for ask in asks}) > 190
    shortest, longest = serve.ANSWERS
    answers = [ask.answer for ask in asks]
    assert shortest <= min(answers) < 2 * shortest and longest / 2 < max(answers) <= longest
    lengths = [len(texts.tokenizer.encode(ask.prompt)) for ask in asks]
    assert min(lengths) < 2 * serve.PROMPTS[0] and max(lengths) > serve.PROMPTS[1] / 2


def test_a_summary_has_medians_of_rounds_and_quantiles_of_requests() -> None:
    side = serve.Side("server", 4, lambda asks: {})
    passes = [
        {"requests_per_s": x, "tokens_per_s": 2 * x, "cores": 3.0, "load": None, "first_ms": [x, 9]}
        for x in (1.0, 2.0, 4.0)
    ]
    row = serve.summary(side, passes)
    assert (row["requests_per_s"], row["tokens_per_s"], row["busy"]) == (2, 4, 0.75)
    assert row["spread"] == 1.5 and row["first_ms"] == {"median": 6.5, "p95": 9}
    assert "load" not in row and "token_ms" not in row


def test_answers_agree_until_they_differ() -> None:
    sides = [
        serve.Side(str(texts), 1, lambda asks, texts=texts: {"texts": texts})
        for texts in (["abcd", "ef"], ["abcd", "ef"], ["abxd", "ef"])
    ]
    asks = [serve.Ask("?", 4)] * 2
    assert serve.agreement(sides[:2], asks) == 1
    assert serve.agreement(sides, asks) == 0.75


@pytest.mark.slow
def test_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(name: str) -> Config:
        sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1}
        sizes |= {"intermediate_size": 64, "window": 32, "meta_tokens": 4, "vocab_size": 300}
        return hymba(**sizes)

    monkeypatch.setattr(serve, "config_of", tiny)
    monkeypatch.setattr(serve, "python_library", lambda: ["x = 1\ny = [2, 3]\n" * 1000])
    monkeypatch.setattr(serve, "ANSWERS", (2, 8))
    out = tmp_path / "serve.json"
    options = ["--only", "demo", "--threads", "1", "--requests", "6", "--rounds", "1"]
    assert serve.main([*options, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    server, loop, batches = report["results"]
    assert all(row["model"] == "demo" and row["requests_per_s"] > 0 for row in report["results"])
    assert server["first_ms"]["median"] > 0 and "first_ms" not in loop
    assert batches["side"] == "batches of 8, 1 thread"
    assert "text is the same on all sides" in capsys.readouterr().out
