"""`hymba train`: recipes, settings from the command line, and runs that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")

import torch  # noqa: E402

from hymba import cli  # noqa: E402
from hymba.config import Config  # noqa: E402
from hymba.model.accounting import parameters  # noqa: E402
from hymba.recipes import RECIPES, recipe  # noqa: E402
from hymba.train import metrics  # noqa: E402
from hymba.weights import load  # noqa: E402

OWN = """
from dataclasses import replace
from pathlib import Path
from hymba.presets import hymba
from hymba.recipes.pretrain import tiny
from hymba.train import DataConfig

def small():
    sizes = dict(hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1, intermediate_size=32)
    model = hymba(**sizes, window=8, meta_tokens=2, ssm_state=4, vocab_size=300)
    data = DataConfig(sources=("text.jsonl",), vocab_size=300, folder=Path("data"))
    base = replace(tiny(), folder=Path("run"), model=model, data=data, steps=6, rows=2)
    return replace(base, sequence_length=32, held_out_tokens=200, save_every=2)

def nothing():
    return 7
"""
SMALL = "own.py:small"


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """train(arguments) in a folder with a recipe and a text -> exit code, what was said, errors."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    words = "the row of words that a model reads and the next word of it".split()
    texts = (" ".join(words[(i * j) % len(words)] for j in range(40)) for i in range(60))
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["train", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_run_ends_in_a_model_folder(train: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = train(SMALL, "--threads", "1", "--seed", "3")
    assert (code, err) == (0, "")
    assert out.startswith("text.jsonl: ")  # no bar, and nothing of one, where nobody looks
    assert "held out" in out and "step 6/6" in out
    bits = metrics.read("run/metrics.jsonl")[-1]["bits_per_byte"]
    assert f"{bits:.4f} bits per byte" in out
    model = load("run/model")
    assert 256 < model.config.vocab_size <= 300  # of the tokenizer, not of the recipe
    assert cli.main(["generate", "run/model", "the row", "--max-tokens", "3"]) == 0
    settings = json.loads(Path("run/run.json").read_text())
    assert settings["command"][:3] == ["hymba", "train", SMALL]
    assert settings["settings"]["seed"] == 3 and "torch" in settings["versions"]


def test_the_same_command_goes_on(train: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = train(SMALL, "--minutes", "0")
    assert code == 130 and "stopped after step 0 of 6" in out and not Path("run/model").exists()
    code, out, _ = train(SMALL)
    assert code == 0 and "going on after step 0" in out and "step 6/6" in out
    code, out, _ = train(SMALL)
    assert code == 0 and "going on after step 6" in out and "step 6/6" not in out
    code, _, err = train(SMALL, "--seed", "9")
    assert code == 2 and "seed" in err and err.count("\n") == 1
    assert json.loads(Path("run/run.json").read_text())["settings"]["seed"] == 0


def test_where_dt_starts(train: Callable[..., tuple[int, str, str]]) -> None:
    given = [SMALL, "--dt-start", "0.001", "0.1"]
    assert train(*given, "--schedule.peak", "1e-9", "--schedule.warmup", "0")[0] == 0
    steps = [
        torch.nn.functional.softplus(p)
        for n, p in load("run/model").named_parameters()
        if n.endswith("dt_bias")
    ]
    assert steps and all(0.9e-3 < step.min() and step.max() < 0.11 for step in steps)
    code, _, err = train(*given, "--start-from", "run/model", "--folder", "more")
    assert code == 2 and "dt_start is for new weights" in err
    assert train(SMALL, "--dt-start", "0.1", "0.01", "--folder", "more")[0] == 2


def test_weights_to_start_from(train: Callable[..., tuple[int, str, str]]) -> None:
    assert train(SMALL)[0] == 0
    more = ["--start-from", "run/model", "--data.tokenizer", "run/model", "--folder", "more"]
    assert train(SMALL, *more, "--schedule.peak", "1e-9", "--schedule.warmup", "0")[0] == 0
    before, after = load("run/model").state_dict(), load("more/model").state_dict()
    for name, p in before.items():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=0, msg=name)


def test_weights_of_another_tokenizer_are_refused(
    train: Callable[..., tuple[int, str, str]],
) -> None:
    """A smaller vocabulary fits the embeddings, but its ids mean other words there."""
    assert train(SMALL)[0] == 0
    given = ["--start-from", "run/model", "--data.vocab-size", "270", "--folder", "more"]
    code, _, err = train(SMALL, *given)
    assert code == 2 and err.endswith(
        "another tokenizer's tokens than the data's: --data.tokenizer run/model\n"
    )


def test_print_shows_all_settings_and_does_nothing(
    train: Callable[..., tuple[int, str, str]],
) -> None:
    keys = ["--steps", "7", "--optimizer.kind", "muon", "--model", "hymba-350m"]
    code, out, _ = train("tiny", *keys, "--data.sources", "a.txt=0.5", "b.txt=0.5", "--print")
    shown = json.loads(out)
    assert code == 0 and not Path("runs").exists()
    assert (shown["steps"], shown["optimizer"]["kind"]) == (7, "muon")
    assert shown["data"]["sources"] == ["a.txt=0.5", "b.txt=0.5"]
    assert Config.from_dict(shown["model"]) == Config.preset("hymba-350m")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sound(name: str) -> None:
    config = recipe(name)
    assert config.model is not None and config.steps > 0
    assert config.folder == Path("runs") / name
    rows = [config.rows, config.tokens // config.extension.sequence_length or 8]
    assert all(count % 8 == 0 or name == "tiny" for count in rows)  # for 8 processes
    replace(config, seed=1)  # its settings agree


def test_a_recipe_may_import_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to pip install its own neighbour."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_a_recipe.py").write_text("STEPS = 7\n")
    text = "from dataclasses import replace\nfrom hymba.recipes.pretrain import tiny\n"
    text += (
        "from beside_a_recipe import STEPS\ndef own():\n    return replace(tiny(), steps=STEPS)\n"
    )
    (tmp_path / "mine.py").write_text(text)
    assert recipe(f"{tmp_path / 'mine.py'}:own").steps == 7


def test_the_twin_is_as_large() -> None:
    sizes = []
    for name in ("hymba-125m", "llama-125m"):
        model = recipe(name).model
        assert model is not None
        sizes.append(parameters(model)["total"])
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tin"], "did you mean tiny"),
        (["own.py:none"], "own.py has no function 'none'"),
        (["own.py:nothing"], "returns int, not a TrainConfig"),
        (["absent.py:f"], "absent.py does not exist"),
        ([SMALL, "--steps", "0"], "steps is 0"),
        ([SMALL, "--data.sources", "absent.txt"], "absent.txt"),
        ([SMALL, "--sequence-length", "99999"], "too few for one row"),
        ([SMALL, "--start-from", "./nowhere"], "nowhere"),
        ([SMALL, "--track", "neptune"], "tensorboard"),
        ([SMALL, "--threads", "-1"], "threads is -1"),
        ([SMALL, "--data.sources", ""], "a source has no name"),
        ([SMALL, "--device", "tpu"], "no device called 'tpu'"),
        ([SMALL, "--device", "cuda"], "cuda"),
    ],
)
def test_mistakes_are_a_line(
    train: Callable[..., tuple[int, str, str]], argv: list[str], words: str
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("no mistake here")
    code, _, err = train(*argv)
    assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([SMALL, "--step", "3"], "--steps"),
        ([SMALL, "--model", "hymba-tin"], "did you mean hymba-tiny"),
        ([SMALL, "--optimizer.kind", "sgd"], "muon"),
    ],
)
def test_unknown_keys_and_values_are_refused(
    train: Callable[..., tuple[int, str, str]],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        train(*argv)
    assert end.value.code == 2
    assert words in " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_help(
    train: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in ([], ["--help"]):
        code, out, _ = train(*argv)
        assert code == 0 and all(name in out for name in RECIPES) and "torchrun" in out
    with pytest.raises(SystemExit):
        train("tiny", "--help")
    out = capsys.readouterr().out
    assert "--data.sources" in out and "hymba train tiny --steps 1000" in out


def test_two_processes(train: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """torchrun's: one speaks, the data is made once, and the model folder is whole."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "hymba"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    done = subprocess.run(
        [*launch, "train", SMALL, "--folder", "two"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 6/6") == 1
    code, out, _ = train(SMALL)
    assert code == 0
    losses = [
        metrics.series(metrics.read(f"{run}/metrics.jsonl"), "loss")[1] for run in ("two", "run")
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-5, atol=0)
    two, one = load("two/model").state_dict(), load("run/model").state_dict()
    for name, p in one.items():
        torch.testing.assert_close(two[name], p, rtol=1e-3, atol=3e-5, msg=name)
