"""The command line: what it answers, and what the user is told when something is wrong.

Mistakes are one line on stderr and exit code 2; a bug of ours keeps its traceback.
"""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import hymba
from hymba import cli
from hymba.errors import UserError

needs_tyro = pytest.mark.skipif(find_spec("tyro") is None, reason="commands need tyro")


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that must fail as the user's mistake; its one line."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hymba: error: ") and err.count("\n") == 1, err
    return err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hymba {hymba.__version__}\n"
    for argv in (["--help"], []):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.COMMANDS)


@needs_tyro
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name: str) -> None:
    """A command stands in the table when it works."""
    assert callable(import_module(cli.COMMANDS[name][0]).main)


def test_unknown_words_get_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'info'?" in mistake(capsys, "inof")
    assert "did you mean '--version'?" in mistake(capsys, "--versoin")
    assert "commands: chat" in mistake(capsys, "xyzzy")


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let the command `broken` raise what the test says."""

    def install(error: BaseException) -> None:
        monkeypatch.setitem(cli.COMMANDS, "broken", ("hymba_broken", "raises"))
        monkeypatch.setitem(sys.modules, "hymba_broken", SimpleNamespace(main=raising(error)))

    return install


Install = Callable[[BaseException], None]


def test_mistakes_are_one_line(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(UserError("this is\n  wrong"))
    assert mistake(capsys, "broken").endswith("this is wrong\n")
    command(FileNotFoundError(2, "No such file or directory", "runs/x/config.json"))
    for words in (["runs/x"], ["./runs/x/config.json"], ["--json", "--model=runs"]):
        line = mistake(capsys, "broken", *words)
        assert line.endswith(" runs/x/config.json: no such file or directory\n")
    command(ModuleNotFoundError("No module named 'tyro'", name="tyro.conf"))
    assert "pip install tyro" in mistake(capsys, "broken")
    command(ModuleNotFoundError("No module named 'fastapi'", name="fastapi"))
    assert "pip install 'hymba[serve]'" in mistake(capsys, "broken")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        FileNotFoundError(2, "a file that the user never named", "/nowhere"),
        ModuleNotFoundError("ours", name="hymba.nothing"),
        ImportError("cannot import name", name="torch"),
    ],
    ids=repr,
)
def test_our_own_errors_keep_their_traceback(command: Install, error: Exception) -> None:
    command(error)
    with pytest.raises(type(error)):
        cli.main(["broken", "runs/x"])


def test_traceback_on_request(command: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    command(UserError("wrong"))
    monkeypatch.setenv("HYMBA_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.main(["broken"])


def test_interrupt_is_one_line(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(KeyboardInterrupt())
    assert cli.main(["broken"]) == 130
    assert capsys.readouterr().err == "hymba: interrupted\n"


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["inof"]) == 2
    assert sys.stderr.getvalue().startswith("\033[31mhymba:\033[0m error: ")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.main(["inof"]) == 2
    assert "\033" not in sys.stderr.getvalue()


@needs_tyro
def test_closed_pipe_is_quiet() -> None:
    """`hymba info ... | head` once ended in "Exception ignored ... BrokenPipeError"."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hymba", "info", "hymba-1.5b"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@needs_tyro
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "hymba", "info", "hymba-1.5b"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "hymba: error: no space left on device\n")
