"""`hymba generate`: prompts on the command line."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")

from tests.commands.generating import Run, expected  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_one_prompt_streams(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("hymba.commands.generate._show", shown.append)
    ran = run("to be or")
    assert ran.code == 0
    [output] = expected(folder, ["to be or"])
    assert "".join(shown) == f"to be or{output.text}\n" and len(shown) > 4
    assert re.fullmatch(r"6 tokens, [\d.]+ tok/s, cpu\n", ran.err)


@pytest.mark.parametrize("prompts", [["to be"], ["to be", "or"]])
def test_ctrl_c_is_heard_between_steps(
    run: Run, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the middle of a step would leave the engine half done."""
    from hymba.engine import Engine

    step, inside = Engine.step, [0, 0]

    def interrupted(self: Any) -> Any:
        inside[0] += 1
        if inside[0] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        found = step(self)
        inside[1] += 1
        return found

    monkeypatch.setattr(Engine, "step", interrupted)
    ran = run(*prompts, "--max-tokens", "500")
    assert ran.code == 130 and ran.err == "hymba: interrupted\n"
    assert inside == [4, 4]


def test_several_prompts_run_together_in_their_order(run: Run, folder: Path) -> None:
    prompts = [f"to be {i}" for i in range(20)]
    ran = run(*prompts)
    each = zip(prompts, expected(folder, prompts), strict=True)
    assert ran.out == "".join(f"--- {prompt}{output.text}\n" for prompt, output in each)
    assert ran.err.startswith("120 tokens, ")


def test_several_answers_to_one_prompt(run: Run, folder: Path) -> None:
    warm = ["--n", "3", "--temperature", "2", "--seed", "5"]
    ran = run("to be", *warm)
    [output] = expected(folder, ["to be"], n=3, temperature=2.0, seed=5)
    assert ran.out == "".join(f"--- to be{x.text}\n" for x in output.completions)
    assert len(set(ran.out.splitlines())) == 3
    assert run("to be", *warm).out == ran.out


def test_a_prompt_from_standard_input(run: Run) -> None:
    assert run("-", given=b"to be").out == run("to be").out


WARM = ["--temperature", "1.5", "--seed", "3"]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--max-tokens", "3"], {"max_tokens": 3}),
        (WARM, {"temperature": 1.5, "seed": 3}),
        ([*WARM, "--top-k", "3"], {"temperature": 1.5, "seed": 3, "top_k": 3}),
        ([*WARM, "--top-p", "0.3"], {"temperature": 1.5, "seed": 3, "top_p": 0.3}),
        ([*WARM, "--min-p", "0.4"], {"temperature": 1.5, "seed": 3, "min_p": 0.4}),
        (["--repetition-penalty", "3"], {"repetition_penalty": 3.0}),
        (["--presence-penalty", "2"], {"presence_penalty": 2.0}),
        (["--frequency-penalty", "2"], {"frequency_penalty": 2.0}),
        (["--stop", "a", "--stop", "e"], {"stop": ("a", "e")}),
        (["--ignore-eos"], {"stop_ids": ()}),
        (["--regex", "[0-9]{4}"], {"regex": "[0-9]{4}"}),
        (["--json-object"], {"json_object": True}),
        (["--json-schema", '{"const": 7}'], {"json_schema": '{"const": 7}'}),
        (["--max-sequences", "1"], {}),
        (["--cache-mb", "9"], {}),
        (["--dtype", "float32"], {}),
    ],
    ids=lambda x: x[-2] if isinstance(x, list) and len(x) > 1 else "",
)
def test_options(run: Run, folder: Path, options: list[str], asked: dict[str, Any]) -> None:
    if {"regex", "json_object", "json_schema"} & asked.keys():
        pytest.importorskip("xgrammar")
    [output] = expected(folder, ["to be"], **asked)
    assert run("to be", *options).out == f"to be{output.text}\n"


def test_a_schema_in_a_file(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    schema = tmp_path / "schema.json"
    schema.write_text('{"const": 12}')
    assert run("to be", "--json-schema", schema).out == "to be12\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no prompt"),
        ([""], "empty"),
        (["x", "--file", "y.jsonl"], "not both"),
        (["x", "--out", "y.jsonl"], "--file"),
        (["x", "--logprobs", "2"], "--file"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--file", __file__, "--out", "nowhere/y"], "nowhere/y: no such file"),
        (["--file", __file__, "--out", __file__], "same file"),
        (["--file", "/"], "directory"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--max-sequences", "-1"], "--max-sequences"),
        (["x", "--json-schema", "nowhere.json"], "nowhere.json: no such file"),
        (["x", "--json-schema", "{"], "json_schema"),
        (["x", "--regex", "a", "--json-object"], "only one"),
        (["x", "--regex", "("], "regex"),
        (["\udcff"], "UTF-8"),
        (["to be " * 3000], "tokens"),
        (["x", "y", "to be " * 3000], "tokens"),
    ],
)
def test_mistakes_are_one_line(run: Run, argv: list[str], words: str) -> None:
    ran = run(*argv)
    assert ran.code == 2 and ran.err.count("\n") == 1 and words in ran.err, ran.err
    assert ran.out == ""


def test_help_has_examples(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "--file prompts.jsonl --out answers.jsonl" in text and "--repetition-penalty" in text


@pytest.mark.parametrize("name", ["Sampling", "Limits"])
def test_the_tables_of_settings_are_true(name: str) -> None:
    from dataclasses import fields

    import hymba

    text = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
    [table] = re.findall(rf"^\| `{name}` \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    told = re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE)
    assert told == [(x.name, str(x.default)) for x in fields(getattr(hymba, name))]
