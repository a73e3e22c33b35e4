"""`hymba export`: a folder that runs, and one clear line for what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the command line needs tyro")
pytest.importorskip("onnx", reason="pip install 'hymba[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'hymba[onnx]'")
from hymba import cli  # noqa: E402
from tests.commands.generating import Ran, expected  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run(*arguments) of `hymba export MODEL --onnx tmp_path/out`."""

    def call(*argv: object, model: object = folder, out: object = tmp_path / "out") -> Ran:
        words = ["--threads", "1", *map(str, argv)]
        where = [] if out is None else ["--onnx", str(out)]
        return Ran(cli.main(["export", str(model), *where, *words]), *capsys.readouterr())

    return call


def fails(ran: Ran, *said: str) -> None:
    code, out, err = ran
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    for word in said:
        assert word in err


def test_a_folder_that_the_example_runs(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    """The loop without this package says what the engine says, greedily."""
    code, out, err = run("--check")
    assert (code, err) == (0, "")
    assert "float32" in out and "64 of 64 greedy tokens are the same" in out
    command = [sys.executable, "examples/onnx_loop.py", str(tmp_path / "out"), "to be"]
    done = subprocess.run(
        [*command, "--tokens", "24"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (answer,) = expected(folder, ["to be"], max_tokens=24, temperature=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"to be{answer.text}\n"), answer.text


def test_few_bits_are_told(run: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, _ = run("--quantize", "int8", "--chunk", 16)
    assert code == 0 and "int8" in out
    told = json.loads((tmp_path / "out" / "hymba.json").read_text())
    assert (told["weights"], told["chunk"]) == (["int8"], 16)


def test_a_quantised_folder_keeps_its_codes(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    """The same folder, whether the model was rounded before or on the way."""
    assert cli.main(["quantize", str(folder), str(tmp_path / "int4"), "--threads", "1"]) == 0
    assert run(model=tmp_path / "int4").code == 0
    assert run("--quantize", "int4", out=tmp_path / "other").code == 0
    for name in ("weights.bin", "model.onnx", "start.onnx", "hymba.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_codes_that_are_floats_are_refused(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    """Before a model is loaded; and where the folder has them."""
    fails(run("--quantize", "fp8"), "those of fp8 are floats", "--quantize int8")
    assert cli.main(["quantize", str(folder), str(tmp_path / "fp8"), "--scheme", "fp8"]) == 0
    assert "those of fp8 are floats" in run(model=tmp_path / "fp8").err
    assert not (tmp_path / "out").exists()


def test_activations_are_chosen(run: Callable[..., Ran], tmp_path: Path) -> None:
    import onnx

    for chosen, level in (("int8", 4), ("float32", 1)):
        assert run("--quantize", "int4", "--activations", chosen, "--force").code == 0
        graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        levels = {item.i for n in nodes for item in n.attribute if item.name == "accuracy_level"}
        assert levels == {level}


def test_few_bits_are_checked_against_the_weights_they_mean(
    run: Callable[..., Ran],
) -> None:
    """Not against kernels that round activations, as they are on most CPUs."""
    code, out, _ = run("--quantize", "int4", "--activations", "float32", "--check")
    assert code == 0 and "64 of 64 greedy tokens are the same" in out
    assert float(out.split("logits differ by ")[1].split()[0]) < 1e-4


def test_where_one_stands_can_be_filled(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(out=".").code == 0
    assert Path("hymba.json").is_file()


def test_a_folder_is_replaced_only_when_asked(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert run().code == 0
    fails(run(), "--force writes it anew")
    assert run("--force", "--chunk", 3).code == 0
    assert json.loads((tmp_path / "out" / "hymba.json").read_text())["chunk"] == 3


def test_mistakes_are_one_line(run: Callable[..., Ran], tmp_path: Path) -> None:
    fails(run(out=None), "--onnx FOLDER")
    fails(run("--chunk", 0), "--chunk is 0")
    fails(run("--quantize", "int5"), "no quantisation called 'int5'", "int8, int4")
    fails(run(model=tmp_path / "nowhere"), "there is no model folder")
    (tmp_path / "out").write_text("")
    fails(run(), "is a file")
    fails(run(out=tmp_path / "out" / "below"), "out/below: not a directory")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told(package: str, folder: Path, tmp_path: Path) -> None:
    """Before a model is loaded. In a process of its own, where nothing is imported yet."""
    words = ["export", str(folder), "--onnx", str(tmp_path / "out"), "--check"]
    code = f"import sys; sys.modules[{package!r}] = None\n"
    code += f"from hymba.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    fails(Ran(done.returncode, done.stdout, done.stderr), "pip install 'hymba[onnx]'")
