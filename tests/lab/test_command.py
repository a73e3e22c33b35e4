"""The command: light, the same with and without tyro, and what its exit codes say."""

import subprocess
import sys
from pathlib import Path

import pytest

from hymba import cli
from hymba.lab.jobs import Lab
from hymba.lab.options import main

ROOT = Path(__file__).resolve().parents[2]
ABSENT = "tyro", "rich", "datasets", "trl", "peft", "fastapi", "matplotlib"
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test", name=name)
sys.meta_path.insert(0, Block())
sys.argv = {argv!r}
import runpy
runpy.run_module("hymba.lab", run_name="__main__")
"""


def run(argv: list[str], *blocked: str) -> subprocess.CompletedProcess[str]:
    """python -m hymba.lab where some packages are not installed."""
    code = BLOCK.format(blocked=blocked, argv=["hymba.lab", *argv])
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_lists_without_torch() -> None:
    done = run(["--list", "--only", "mamba"], "torch", "numpy", "transformers", *ABSENT)
    assert done.returncode == 0, done.stderr
    assert "hymba lab --size toy --only mamba" in done.stdout


def test_it_runs_on_a_host_that_has_only_torch(tmp_path: Path) -> None:
    argv = ["--part", "recall", "--tasks", "copy", "--only", "mamba", "--device", "cpu"]
    done = run([*argv, "--folder", str(tmp_path), "--threads", "1"], *ABSENT)
    assert done.returncode == 0, done.stderr
    assert "recall copy mamba, seed 0" in done.stdout and "all done" in done.stdout
    reported = run(
        ["--report", "--folder", str(tmp_path), "--results", str(tmp_path / "results"),
         "--page", str(tmp_path / "none.md")], "torch", *ABSENT,
    )  # fmt: skip
    assert reported.returncode == 0, reported.stderr
    assert "no figure" in reported.stdout and list((tmp_path / "results").glob("lab-toy-*.json"))


def test_mistakes_are_one_line() -> None:
    done = run(["--size", "huge"])
    assert done.returncode == 2 and done.stderr == (
        "hymba: error: there is no size 'huge'; there are toy, small, 2m, 20m, 35m\n"
    )


def test_mistakes_through_hymba(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "--only", "hybma"]) == 2
    assert "did you mean hymba?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("done", "stopped", "code"), [(True, False, 0), (False, False, 0), (False, True, 130)]
)
def test_exit_codes(done: bool, stopped: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done, out of time, interrupted."""

    def fake(self: Lab) -> bool:
        self.stopped = stopped
        return done

    monkeypatch.setattr(Lab, "run", fake)
    assert main(["--threads", "1"]) == code
