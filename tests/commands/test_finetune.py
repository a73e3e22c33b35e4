"""`hymba finetune` as a person meets it: help, mistakes in one line, Ctrl-C, a second run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")
for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package, reason="fine-tuning needs hymba[finetune]")

from hymba import cli  # noqa: E402
from hymba.presets import hymba  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., tuple[int, str, str]]


def says(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


CHATS = [says(f"how many {i}?", str(i)) for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, lively: Callable[..., Any]) -> Path:
    from hymba.weights import save

    tokenizer = Tokenizer.train(["how many? <extra_id_0>System\n<extra_id_1>Assistant"] * 9, 300)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "ssm_state": 4}
    heads = {"num_heads": 4, "num_kv_heads": 2, "window": 16, "meta_tokens": 3, "ssm_dt_rank": 3}
    config = hymba(
        num_layers=2, max_positions=128, vocab_size=tokenizer.vocab_size, **sizes, **heads
    )
    folder = tmp_path_factory.mktemp("base")
    save(lively(config), folder, tokenizer)
    return folder


def written(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def words(base: Path, data: Path, out: Path, *options: object) -> list[str]:
    settings = ("--device", "cpu", "--threads", "1", "--rows", "2", "--lr", "1e-3")
    names = ("finetune", base, "--data", data, "--out", out, *settings, *options)
    return [str(name) for name in names]


@pytest.fixture
def call(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """call(lines, *options) -> exit code, what was printed, what was said aside."""

    def run(lines: Sequence[Any], *options: object, model: Path | None = None) -> Any:
        data = written(tmp_path / "chats.jsonl", lines)
        code = cli.main(words(model or base, data, tmp_path / "out", *options))
        return code, *capsys.readouterr()

    return run


def test_help_answers_without_anything_heavy() -> None:
    code = (
        "import sys; from hymba.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--method {full,lora,dora}" in done.stdout and "hymba finetune runs/" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "numpy", "transformers", "trl", "peft", "datasets"}


def test_from_chats_to_a_model_and_a_second_run(call: Call, tmp_path: Path) -> None:
    code, told, aside = call([*CHATS, says("x" * 400, "y")], "--max-length", "96")
    assert code == 0 and aside == ""
    assert "1 are longer than 96 tokens (the longest" in told
    assert "step 6/6  loss" in told and f"hymba chat {tmp_path / 'out'}" in told
    (tmp_path / "question").write_text("how many 3?\n")
    said = subprocess.run(
        [sys.executable, "-m", "hymba", "chat", str(tmp_path / "out"), "--max-tokens", "4"],
        stdin=open(tmp_path / "question"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 0 and "no chat template" not in said.stderr, said.stderr
    code, told, _ = call([*CHATS, says("x" * 400, "y")], "--max-length", "96")
    assert code == 0 and "is done already" in told and "step " not in told
    code, _, aside = call(CHATS, "--max-length", "96")
    assert code == 2 and "another data" in aside and "--fresh" in aside


def test_mistakes_are_one_line_each(call: Call, base: Path, tmp_path: Path) -> None:
    good = written(tmp_path / "good.jsonl", CHATS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    mistakes: list[tuple[list[Any], list[object], str]] = [
        ([*CHATS, {"messages": 7}], [], "chats.jsonl line 13: messages must be"),
        (CHATS, ["--objective", "dpo"], "chats.jsonl line 1 has no preference"),
        ([pair, *CHATS], [], "chats.jsonl line 2 holds an answer"),
        ([pair], ["--packing"], "--packing is for sft"),
        ([], [], "chats.jsonl is empty"),
        (CHATS, ["--out", tmp_path / "full"], "no fine-tuning: name another --out"),
        (CHATS, ["--out", good], "good.jsonl is a file"),
        (CHATS, ["--out", base], "the model's own folder"),
        (CHATS, ["--out", base.parent, "--fresh"], "the model's own folder, or around"),
        (CHATS, ["--rows", "0"], "--rows must be 1 or more"),
        (CHATS, ["--lr", "2"], "--lr must be between 0 and 1"),
        (CHATS, ["--held-out", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (CHATS, ["--held-out", "x%"], "--held-out x% must be"),
        (CHATS, ["--held-out", "99%"], "leaves nothing to train on"),
        (CHATS, ["--max-length", "9"], "every line is longer than 9 tokens"),
        (CHATS, ["--device", "cuda"], "there is no CUDA device"),
    ]
    for lines, options, told in mistakes:
        code, _, aside = call(lines, *options)
        assert code == 2 and aside.count("\n") == 1 and told in aside, (told, aside)
        assert not (tmp_path / "out").exists(), "nothing is begun before all is known to be right"
    for model, told in ((tmp_path, "no tokenizer.json"), ("./nowhere", "no model folder")):
        code, _, aside = call(CHATS, model=model)
        assert code == 2 and aside.count("\n") == 1 and told in aside


def test_data_and_out_must_be_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", str(base)]) == 2
    assert "--data chats.jsonl" in capsys.readouterr().err
    assert cli.main(["finetune", str(base), "--data", "x.jsonl"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_model_that_cannot_be_fetched_is_one_line(call: Call) -> None:
    code, _, aside = call(CHATS, model=Path("nvidia/Hymba-1.5B-Nowhere"))
    assert code == 2 and aside.splitlines()[-1].startswith("hymba: error: nvidia/Hymba")


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(base: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "chats.jsonl", CHATS)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def begin(out: Path) -> subprocess.Popen[str]:
        argv = words(base, data, out, "--epochs", "2", "--log-every", "1", "--save-every", "1000")
        return subprocess.Popen(
            [sys.executable, "-m", "hymba", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=env,
        )

    process = begin(tmp_path / "cut")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step  3/12"):
            process.send_signal(signal.SIGINT)
            break
    began = time.monotonic()
    seen.append(process.communicate(timeout=60)[0])
    assert process.returncode == 130 and time.monotonic() - began < 30, "".join(seen)
    assert "saved\nthe same command goes on from there" in seen[-1]
    assert "Traceback" not in seen[-1] and not (tmp_path / "cut" / "config.json").exists()
    told, _ = begin(tmp_path / "cut").communicate(timeout=120)
    assert "going on after step" in told and "step 12/12" in told, told
    assert (tmp_path / "cut" / "config.json").exists()
