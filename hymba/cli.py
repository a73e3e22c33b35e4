"""The command line: `hymba COMMAND ...`. It finds the command, runs it, and reports mistakes.

`hymba --help` and `hymba --version` import nothing but this file. A command stands in COMMANDS
when it works; its module has `main(argv) -> exit code` and reads its own options.

Exit codes: 0 done, 2 the user's mistake (one line on stderr), 3 done but for lines of a batch job
that could not be answered, 130 interrupted. Anything else that goes wrong is our mistake and keeps
its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hymba import __version__
from hymba.errors import UserError

COMMANDS = {
    "chat": ("hymba.commands.chat", "talk to a model in the terminal"),
    "demo": ("hymba.commands.demo", "train a small model on this machine and look at it"),
    "eval": ("hymba.commands.eval", "score a model on lm-eval's tasks, beside the paper's tables"),
    "export": ("hymba.commands.export", "a model as ONNX, for devices without Python"),
    "finetune": ("hymba.commands.finetune", "teach a model from chats or preferences"),
    "generate": ("hymba.commands.generate", "continue prompts, or a file of them"),
    "info": ("hymba.commands.info", "what a model costs: parameters, FLOPs, cache bytes, layers"),
    "lab": ("hymba.commands.lab", "compare architectures of one size: language, recall, cost"),
    "probe": ("hymba.commands.probe", "what a model's heads do, as a page of figures"),
    "quantize": ("hymba.commands.quantize", "keep a model's matrices in 8 or 4 bits"),
    "serve": ("hymba.commands.serve", "an OpenAI-style server with a chat page"),
    "train": ("hymba.commands.train", "train a model as a recipe says"),
}
EXTRAS = {
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "serve"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("trl", "peft", "accelerate"), "finetune"),
    "lm_eval": "eval",
    **dict.fromkeys(("onnx", "onnxruntime"), "onnx"),
}
MISTAKE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two as a shell counts signals
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # wherever it is written to, never our mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. argv leaves out the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # here, so that a closed pipe is noticed while we can still be quiet
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _print_to_nowhere()  # `hymba info ... | head`: the reader has gone
        return BROKEN_PIPE
    except (UserError, OSError, ImportError) as error:
        message = _users_mistake(error, argv)
        if message is None or os.environ.get("HYMBA_TRACEBACK"):
            raise
        if getattr(error, "errno", None) in FULL:
            _print_to_nowhere()
        return _complain(f"error: {message}", MISTAKE)


def _print_to_nowhere() -> None:
    """Python flushes what could not be printed again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"hymba {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(_unknown(name))
    return int(import_module(COMMANDS[name][0]).main(rest))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hymba COMMAND [options]",
            "",
            "Attention and state-space heads side by side: train, run and measure Hymba models.",
            "",
            *lines,
            "",
            "hymba COMMAND --help tells a command's options; hymba --version the version.",
        ]
    )


def _unknown(name: str) -> str:
    kind = "option" if name.startswith("-") else "command"
    near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
    return f"there is no {kind} {name!r}; {hint}"


def _users_mistake(error: Exception, argv: Sequence[str]) -> str | None:
    """What to tell the user, or None when the error is ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, ImportError):
        return _missing_package(error)
    path = getattr(error, "filename", None)
    if isinstance(error, OSError) and isinstance(path, str) and _was_named(path, argv):
        return f"{path}: {(error.strerror or 'cannot be used').lower()}"
    if isinstance(error, OSError) and error.errno in FULL:
        return (error.strerror or "no space left").lower()
    return None


def _was_named(path: str, argv: Sequence[str]) -> bool:
    """Did the user name this file, or a folder it is in? Any other missing file is our mistake."""
    words = [word.partition("=")[2] or word for word in argv if word]  # `--out=runs/x` too
    return any(Path(path).absolute().is_relative_to(Path(word).absolute()) for word in words)


def _missing_package(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "hymba"):
        return None
    wanted = f"'hymba[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"this command needs the package {package}: pip install {wanted}"


def _complain(message: str, code: int) -> int:
    name = "hymba:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        name = f"\033[31m{name}\033[0m"
    print(f"{name} {message}", file=sys.stderr)
    return code
