"""`hymba eval` as a person meets it: tables, mistakes in one line, Ctrl-C, no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the commands read their options with tyro")
pytest.importorskip("lm_eval", reason="hymba eval needs hymba[eval]")

from hymba import cli  # noqa: E402
from hymba.config import Config  # noqa: E402
from hymba.eval import network, recall_suite, run  # noqa: E402
from hymba.eval.subject import Ours  # noqa: E402
from hymba.eval.suites import SUITES, mean  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402
from hymba.weights import save  # noqa: E402
from tests.eval.local import WORDS, write_tasks  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)


@pytest.fixture(scope="module")
def model(
    tiny: Callable[[str], Config],
    lively: Callable[..., Any],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    config = tiny("hymba").replace(vocab_size=tokenizer.vocab_size, max_positions=160)
    folder = tmp_path_factory.mktemp("models") / "mine"
    save(lively(config), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def call(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*argv: object, model: Path = model) -> tuple[int, str, str]:
        code = cli.main(["eval", str(model), "--device", "cpu", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def error_of(ran: tuple[int, str, str]) -> str:
    """The one line a mistake is worth."""
    code, out, err = ran
    lines = [line for line in err.splitlines() if line.startswith("hymba: error:")]
    assert code == 2 and out == "" and len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0]


def test_help_is_light_and_names_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from hymba.cli import main\ntry: main(['eval', '--help'])\n"
    code += "finally: print('heavy' if {'torch', 'lm_eval'} & set(sys.modules) else 'light')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "light" in done.stdout and "paper-instruct" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "either --suite, or --tasks"),
        (("--suite", "paper-1b", "--tasks", "x"), "either --suite, or --tasks"),
        (("--tasks", "x", "--limit", "0"), "limit is 0, but must be 1 or more"),
        (("--tasks", "x", "--num-fewshot", "-1"), "num_fewshot is -1"),
        (("--tasks", "x", "--batch", "0"), "batch is '0': give auto, or a number"),
        (("--tasks", "x", "--batch", "many"), "batch is 'many'"),
        (("--tasks", "x", "--include-path", "nowhere"), "there is no folder nowhere"),
        (("--tasks", "x", "--log-samples"), "--log-samples needs --out"),
        (("--tasks", "x", "--out", "."), ". is a folder: --out names a JSON file"),
        (("--tasks", "x", "--out", "s", "--log-samples"), "makes a folder s: call --out s.json"),
        (("--tasks", ""), "either --suite, or --tasks"),
        (("--tasks", "x", "--lengths", "9"), "--lengths is for the suites recall and perplexity"),
        (("--tasks", "x", "--plot", "a.png"), "--plot is for the suites recall and perplexity"),
        (("--suite", "recall", "--limit", "2"), "--limit is for tasks of lm-eval alone"),
        (("--suite", "recall", "--text", "a"), "--text is for the suite perplexity alone"),
        (("--suite", "perplexity", "--tasks", "x"), "the suite perplexity has no tasks"),
        (("--suite", "perplexity", "--lengths", "8", "9"), "takes one of --lengths"),
        (("--suite", "perplexity", "--lengths", "0"), "lengths has 0: a row has 1 token"),
        (("--suite", "recall", "--plot", "a.xyz"), "matplotlib writes no .xyz files"),
        (("--suite", "perplexity", "--out", "."), ". is a folder: --out names a JSON file"),
        (("--suite", "perplexity", "--plot", "."), ". is a folder: --plot names a file"),
        (("--suite", "recall", "--plot", "/proc/x.png"), "/proc cannot be written to"),
        (("--suite", "recall", "--out", "/proc/x.json"), "/proc cannot be written to"),
        (("--tasks", "x", "--out", "/proc/x.json"), "/proc cannot be written to"),
    ],
)
def test_mistakes_in_options(call: Call, argv: tuple[str, ...], message: str) -> None:
    assert message in error_of(call(*argv))


@pytest.mark.slow  # lm-eval reads the descriptions of fourteen thousand tasks
def test_an_unknown_task_says_what_is_near(call: Call, tasks: Path) -> None:
    line = error_of(call("--tasks", "chioce", "--include-path", tasks))
    assert "there is no task 'chioce'; did you mean 'choice'?" in line


def test_models_that_cannot_be_asked(call: Call, tasks: Path, model: Path, tmp_path: Path) -> None:
    names = "--tasks", "choice", "--include-path", tasks
    assert "no config.json" in error_of(call(*names, model=tmp_path))
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert "no tokenizer: tasks are of text" in error_of(call(*names, model=tmp_path))
    for suite in ("recall", "perplexity"):
        assert "has no tokenizer" in error_of(call("--suite", suite, model=tmp_path))
    (tmp_path / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    assert "model.safetensors does not exist" in error_of(call(*names, model=tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "names no model_type" in error_of(call(*names, model=tmp_path))


def test_a_table_a_file_and_samples(call: Call, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    given = "--include-path", tasks, "--out", out, "--log-samples", "--limit", "5"
    code, table, _ = call("--tasks", "choice,rolling", "answer", *given)
    assert code == 0
    words = [line.split()[:2] for line in table.splitlines()]
    assert words == [
        ["task", "metric"],
        ["choice", "acc"],
        ["choice", "acc_norm"],
        ["rolling", "word_perplexity"],
        ["rolling", "bits_per_byte"],
        ["answer", "contains"],
    ]
    content = json.loads(out.read_text())
    assert content["versions"]["lm_eval"] and content["device"].startswith("cpu")
    assert content["config"]["limit"] == 5 and content["command"]
    assert content["tasks"]["choice"]["shots"] == 2 and content["tasks"]["choice"]["questions"] == 5
    samples = (tmp_path / "scores" / "choice.jsonl").read_text().splitlines()
    assert len(samples) == 5 and "resps" in json.loads(samples[0])


def test_a_second_run_takes_what_is_done(call: Call, tasks: Path, tmp_path: Path) -> None:
    given = "--include-path", tasks, "--out", tmp_path / "scores.json"
    _, first, _ = call("--tasks", "choice", *given)
    code, second, err = call("--tasks", "choice", *given, "--batch", "3")  # scores do not change
    assert code == 0 and second == first and "choice: done already" in err
    _, _, err = call("--tasks", "choice", *given, "--fresh")
    assert "done already" not in err
    _, other, err = call("--tasks", "choice", *given, "--limit", "3")
    assert "with other settings, it is done again" in err and other != first
    call("--tasks", "answer", *given)
    assert set(json.loads((tmp_path / "scores.json").read_text())["tasks"]) == {"choice", "answer"}


def test_other_weights_or_questions_are_another_result(
    call: Call, model: Path, tmp_path: Path
) -> None:
    tasks = write_tasks(tmp_path)
    given = "--tasks", "choice", "--include-path", tasks, "--out", tmp_path / "scores.json"
    call(*given)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert "mine with other weights or files: name another --out" in error_of(call(*given))
    assert call(*given, "--fresh")[0] == 0
    lines = (tasks / "choice.jsonl").read_text().splitlines(keepends=True)
    (tasks / "choice.jsonl").write_text("".join(lines[:8]))
    assert "other settings" in call(*given)[2]
    assert "done already" in call(*given)[2]


def test_a_file_is_of_one_model_and_its_tasks_say_of_what(
    call: Call, model: Path, tasks: Path, tmp_path: Path
) -> None:
    """A file with two models' results once had the head of the last alone."""
    out, other = model / "scores.json", tmp_path / "other"  # results may lie beside the model
    shutil.copytree(model, other)
    given = "--include-path", tasks, "--out", out
    call("--tasks", "choice", "answer", *given, "--limit", 3)
    code, _, err = call("--tasks", "choice", *given, "--limit", 4)
    assert code == 0 and "earlier results stay in it: answer (beside each" in err
    kept = json.loads(out.read_text())["tasks"]
    assert kept["choice"]["of"]["limit"] == 4 and kept["answer"]["of"]["limit"] == 3
    assert kept["answer"]["of"]["model"] == str(model) and kept["answer"]["of"]["command"]
    before = out.read_text()
    line = error_of(call("--tasks", "choice", *given, model=other))
    assert f"holds results of {model}: name another --out, or add --fresh" in line
    assert out.read_text() == before
    assert call("--tasks", "choice", *given, "--fresh", model=other)[0] == 0
    assert set(json.loads(out.read_text())["tasks"]) == {"choice"}
    out.unlink()


def test_ctrl_c_keeps_finished_tasks(
    call: Call, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "--include-path", tasks, "--out", tmp_path / "scores.json"
    evaluate = run.evaluate

    def interrupted(lm: Any, shelf: Any, name: str, *rest: Any) -> Any:
        if name == "rolling":
            raise KeyboardInterrupt
        return evaluate(lm, shelf, name, *rest)

    monkeypatch.setattr(run, "evaluate", interrupted)
    code, out, err = call("--tasks", "choice", "rolling", "answer", *given)
    assert code == 130 and out == "" and "1 of 3 tasks are in" in err
    monkeypatch.setattr(run, "evaluate", evaluate)
    code, out, err = call("--tasks", "choice", "rolling", "answer", *given)
    assert code == 0 and "choice: done already" in err and "rolling ..." in err


def test_a_file_of_something_else_is_not_lost(call: Call, tasks: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("[1]")
    line = error_of(call("--tasks", "choice", "--include-path", tasks, "--out", mine))
    assert "is no file of an evaluation" in line and mine.read_text() == "[1]"
    mine.write_text('{"kind": "lm-eval", "tasks": [1]}')
    line = error_of(call("--tasks", "choice", "--include-path", tasks, "--out", mine))
    assert "is no file of an evaluation" in line
    scores = '{"kind": "lm-eval", "tasks": {}}'
    mine.write_text(scores)
    line = error_of(call("--suite", "perplexity", "--out", mine))
    assert "is no file of an evaluation of this kind" in line and mine.read_text() == scores


def test_more_examples_than_there_are(call: Call, tasks: Path) -> None:
    code, out, err = call("--tasks", "choice", "--include-path", tasks, "--num-fewshot", 99)
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].endswith("has too few examples: give a lower --num-fewshot")


def test_no_network_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked here (HF_HUB_OFFLINE is set for tests)."""
    line = error_of(call("--suite", "paper-base"))
    assert "task 'mmlu' needs its data from the Hugging Face hub, which cannot be reached" in line


def test_the_hub_is_asked_once_and_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    asked: list[str] = []

    def nobody(url: str, timeout: float) -> None:
        asked.append(url)
        raise httpx.ConnectError("Name or service not known")

    import datasets.config
    import huggingface_hub.constants as constants

    for name in network.OFFLINE:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", nobody)
    network._reached.cache_clear()
    network.offline_without_network()
    network.offline_without_network()
    network._reached.cache_clear()
    assert len(asked) == 1 and network.offline()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


KINDS = {"contains": "answer", "word_perplexity": "rolling"}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Local tasks with the names of the paper's base suite, which go before lm-eval's."""
    names = [(x.task, KINDS.get(x.metric, "choice")) for x in SUITES["paper-base"].tasks]
    return write_tasks(tmp_path, names, count=8)


def test_a_suite_beside_the_paper(call: Call, stand_ins: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    code, table, _ = call("--suite", "paper-base", "--include-path", stand_ins, "--out", out)
    lines = table.splitlines()
    assert code == 0 and "table 2" in lines[0]
    labels = "MMLU ARC-E ARC-C PIQA Wino Hella SQuAD-C Avg".split()
    assert lines[2].split() == labels
    ours = lines[3].split()[1:]
    assert all(0 <= float(figure) <= 100 for figure in ours) and len(ours) == 8
    assert float(ours[-1]) == pytest.approx(sum(map(float, ours[:-1])) / 7, abs=0.01)
    (theirs,) = [line for line in lines if line.startswith("paper: Llama-3.2-3B")]
    assert theirs.split()[2:] == "56.03 74.54 42.32 76.66 69.85 55.29 43.46 59.74".split()
    assert lines[-1].startswith("  tasks of --include-path go before lm-eval's")
    assert any("ARC-E, ARC-C, PIQA, Wino, Hella: acc" in line for line in lines)
    content = json.loads(out.read_text())
    assert content["suite"]["ours"]["MMLU"] == pytest.approx(float(ours[0]), abs=0.01)
    assert content["tasks"]["mmlu@5"]["shots"] == 5 and content["tasks"]["piqa@0"]["shots"] == 0
    same = "--tasks", "piqa", "--num-fewshot", "0", "--include-path", stand_ins, "--out", out
    assert "piqa@0: done already" in call(*same)[2]


def test_averages_are_the_papers() -> None:
    """Those that are printed in tables 2, 3 and (without BFCL: computed) 4."""
    base, small = SUITES["paper-base"], SUITES["paper-1b"]
    printed = {"Hymba": 61.06, "Llama-3.2-3B": 59.74, "SmolLM2-1.7B": 60.04, "Qwen2.5-1.5B": 59.51}
    printed |= {"Phi-1.5": 55.85, "Hymba (public data)": 60.81, "Llama-3.2-1B": 50.29}
    for name, average in printed.items():
        assert mean(base.paper[name], base.averaged) == pytest.approx(average, abs=0.011), name
    for name, average in {"Hymba": 54.57, "Llama3": 52.82, "Samba": 52.83, "Mamba2": 52.52}.items():
        assert mean(small.paper[name], small.averaged) == pytest.approx(average, abs=0.011), name
    for suite in SUITES.values():
        assert all(len(row) == len(suite.tasks) for row in suite.paper.values())


def test_suites_name_tasks_and_metrics_that_lm_eval_has() -> None:
    """Read from lm-eval's own descriptions: no data is loaded."""
    from hymba.eval.harness import Shelf

    entries = [entry for suite in SUITES.values() for entry in suite.tasks]
    shelf = Shelf.of([entry.task for entry in entries])
    for entry in entries:
        cfg = shelf.manager.task_index[entry.task].cfg or {}
        listed = cfg.get("metric_list") or cfg.get("aggregate_metric_list")
        if listed:
            names = {metric["metric"] for metric in listed}
            assert entry.metric.partition(",")[0] in names, entry


@pytest.fixture(scope="module")
def peer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of nobody."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160}
    folder = tmp_path_factory.mktemp("peer")
    GPT2LMHeadModel(GPT2Config(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_any_causal_model(call: Call, peer: Path, tasks: Path) -> None:
    names = "--tasks", "choice", "rolling", "answer", "--include-path", tasks
    code, table, _ = call(*names, "--limit", "4", "--batch", "2", model=peer)
    assert code == 0 and len(table.splitlines()) == 6


def test_ours_through_transformers_is_the_same(call: Call, tasks: Path) -> None:
    names = "--tasks", "choice", "rolling", "answer", "--include-path", tasks
    ours, theirs = call(*names)[1], call(*names, "--through-transformers", "--batch", "4")[1]
    assert ours == theirs and len(ours.splitlines()) == 6


@pytest.mark.slow
def test_two_processes_say_what_one_says(model: Path, tasks: Path, tmp_path: Path) -> None:
    """torchrun's processes share the questions; accelerate sets the same variables. Examples were
    once drawn by each process for itself, and were others than one process draws."""
    words = ["eval", str(model), "--tasks", "choice", "rolling", "answer", "--device", "cpu"]
    words += ["--include-path", str(tasks), "--limit", "5", "--threads", "1"]
    one = [sys.executable, "-m", "hymba", *words]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += ["-m", "hymba", *words, "--out", str(tmp_path / "scores.json")]
    tables = []
    for command in (one, two, two):  # the second time all is done, for both
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
    assert tables[0] == tables[1] == tables[2]
    assert "done already" in done.stderr


def test_suites_that_need_no_download(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "recall.json"
    few = ["--suite", "recall", "--tasks", "passkey,", "--lengths", 120, 120, "--samples", 1]
    code, said, err = call(*few, "--out", out, "--batch", 3)
    assert code == 0 and "passkey" in said and "chance" in said, err
    kept = json.loads(out.read_text())
    assert kept["result"]["suite"] == kept["kind"] == "recall" and kept["versions"]["torch"]
    assert kept["result"]["lengths"] == [120]
    assert call(*few, "--out", out)[0] == 0  # its own file may be written anew
    text = tmp_path / "a.txt"
    text.write_text(" ".join(WORDS) * 40)
    rows = ["--suite", "perplexity", "--lengths", 64, "--samples", 1, "--text", text]
    code, said, err = call(*rows)
    assert code == 0 and "bits/byte" in said and "all" in said, err
    assert "did you mean passkey" in error_of(call("--suite", "recall", "--tasks", "paskey"))
    assert "nowhere" in error_of(call("--suite", "perplexity", "--text", tmp_path / "nowhere"))


def test_recall_goes_on_where_ctrl_c_was(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure = tmp_path / "recall.json", recall_suite._measure
    asked: list[int] = []

    def counting(subject: Any, cells: Any, *rest: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(cells[0].length)
        return measure(subject, cells, *rest)

    names = "--suite", "recall", "--tasks", "passkey", "mqar", "--samples", 1, "--out", out
    few = *names, "--lengths", 500, 540
    monkeypatch.setattr(recall_suite, "_measure", counting)
    code, said, err = call(*few)
    assert code == 130 and said == "" and "passkey@500, passkey@540 are in" in err
    monkeypatch.setattr(recall_suite, "_measure", measure)
    code, gone_on, err = call(*few)
    assert code == 0 and "2 of 4 parts were done already" in err and f"written to {out}" in err
    kept = json.loads(out.read_text())
    assert call(*few, "--fresh")[:2] == (0, gone_on)  # and what is taken is what is measured
    again = json.loads(out.read_text())
    assert kept["result"] == again["result"] and len(again["tasks"]) == 4
    assert kept["tasks"]["mqar@500"]["of"]["weights"]
    _, _, err = call(*names, "--lengths", 500)
    assert "2 of 2 parts" in err and "earlier results stay in it: passkey@540, mqar@540" in err
    _, _, err = call("--suite", "recall", "--tasks", "mqar", "--lengths", 500, "--out", out)
    assert "mqar@500: " in err and "with other settings, they were done again" in err


@pytest.mark.parametrize("suite", ["recall", "perplexity"])
def test_our_suites_do_not_overwrite_another_models_file(
    call: Call, suite: str, model: Path, tmp_path: Path
) -> None:
    out, other, text = tmp_path / "kept.json", tmp_path / "other", tmp_path / "a.txt"
    text.write_text(" ".join(WORDS) * 40)
    shutil.copytree(model, other)
    few = ["--suite", suite, "--lengths", 120, "--samples", 1, "--out", out]
    few += ["--tasks", "passkey"] if suite == "recall" else ["--text", text]
    code, _, err = call(*few)
    assert code == 0 and err.endswith(f"hymba: written to {out}\n")
    before = out.read_text()
    assert f"{out} holds results of {model}: name" in error_of(call(*few, model=other))
    if suite == "perplexity":  # one measurement
        line = error_of(call(*few, "--samples", 2))
        assert "with other settings (samples): name another --out" in line
    assert out.read_text() == before and call(*few)[0] == 0
    assert call(*few, "--fresh", model=other)[0] == 0
    out.write_text(json.dumps({"kind": suite, "result": {}}))
    assert "a model that it does not name" in error_of(call(*few))


def test_positions_that_end_cap_the_default(call: Call, peer: Path, tmp_path: Path) -> None:
    """Four times the positions that it was made for were asked for, and then refused."""
    text = tmp_path / "a.txt"
    text.write_text(" ".join(WORDS) * 40)
    rows = "--suite", "perplexity", "--samples", 1, "--text", text
    code, said, err = call(*rows, model=peer)
    assert code == 0 and "128 to 158" in said, err
    text.write_text("one")
    assert "and a row needs 64:" in error_of(call(*rows, "--lengths", 64, model=peer))


def test_a_peer_without_tokenizer_is_one_line(call: Call, peer: Path, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer, and every text has no tokens."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(peer / name, tmp_path)
    for suite in ("recall", "perplexity"):
        assert "has no tokenizer: tasks are" in error_of(call("--suite", suite, model=tmp_path))


@pytest.mark.parametrize("suite", ["recall", "perplexity"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_too_little_memory_is_one_line(
    call: Call, suite: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(Ours, "_score", full)
    text = tmp_path / "a.txt"
    text.write_text(" ".join(WORDS) * 40)
    few = ["--tasks", "passkey"] if suite == "recall" else ["--text", text]
    line = error_of(call("--suite", suite, "--lengths", 120, *few))
    assert "rows of 120 tokens do not fit into memory: give shorter --lengths" in line
    monkeypatch.setattr(Ours, "_score", lambda *args: [][1])
    with pytest.raises(IndexError):  # our mistakes keep their traceback
        call("--suite", suite, "--lengths", 120, *few)


@pytest.mark.parametrize("names", [("passkey",), ("passkey", "mqar")])
def test_the_length_that_is_named_has_room(call: Call, names: tuple[str, ...]) -> None:
    few = "--suite", "recall", "--samples", 1, "--tasks", *names, "--lengths"
    line = error_of(call(*few, 20))
    assert "20 tokens are too few for passkey: give lengths of" in line
    least = int(line.split()[-3])
    assert call(*few, least, least + 1)[0] == 0


@pytest.mark.parametrize("suite", ["recall", "perplexity"])
def test_our_suites_are_for_one_process(
    call: Call, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several would do all the work."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in error_of(call("--suite", suite))
