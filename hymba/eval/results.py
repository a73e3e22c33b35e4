"""What an evaluation leaves: one JSON file that says what was measured, with what and how.

    write_result(path, {"needle": {...}}, config={...}, device=model.device)

Every file has the same head: kind, command, date, device, versions, config. `Finished` keeps the
tasks that are done, so that the same command does not do them again; each says what it is `of`. A
file holds results of one model: `check_same` refuses another's.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hymba import __version__
from hymba.errors import UserError
from hymba.files import write_text

PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets", "triton")
# Files that a model is read from. Not any *.json: results may lie in the model's folder too.
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja"),
)


def write_result(
    path: str | Path,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    device: str | torch.device = "cpu",
    kind: str = "evaluation",
    command: str | None = None,
) -> dict[str, Any]:
    """Write the head and `results` beside it (their names must not be the head's); returns all."""
    content = head(config, device, kind, command) | dict(results)
    write_json(Path(path), content)
    return content


def head(
    config: Mapping[str, Any], device: str | torch.device, kind: str, command: str | None = None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "command": command or _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
        "config": dict(config),
    }


def write_json(path: Path, content: Any) -> None:
    """The whole file or the one that was there. Numbers that JSON has no word for become null."""
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def check_place(path: Path, kind: str) -> None:
    """Before the work: UserError where a result of this kind cannot go, or something else would
    be lost."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: --out names a JSON file")
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["kind"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != kind:
            raise UserError(f"{path} is no file of an evaluation of this kind: name another --out")
    check_folder_of(path)


def made_of(
    model: str,
    folder: Path,
    through_transformers: bool,
    quantize: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What stands beside a result, so that it is known whose it is whatever is done later."""
    rounded = [] if quantize is None else [quantize]  # other weights
    return {
        "model": " in ".join([model, *rounded]),
        "weights": fingerprint(weights_of(folder), *rounded),
        "through_transformers": through_transformers,
        "command": _command(),
        **_plain(settings),
    }


def check_same(path: Path, of: Mapping[str, Any], names: Sequence[str] = ("weights",)) -> None:
    """Before the work: UserError where the file holds results that differ from ours in what has
    these names. They would be lost, or be taken for ours."""
    if not path.exists():
        return
    for found in _results_in(json.loads(path.read_text(encoding="utf-8"))):
        theirs = found.get("of", {})
        if any(theirs.get(name) != of.get(name) for name in names):
            raise UserError(
                f"{path} holds results of {_whose(theirs, of, names)}: name another --out, or add"
                " --fresh, which starts the file anew"
            )


def _results_in(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of perplexity the whole file; what is no file of ours has none, and is refused elsewhere."""
    tasks = content.get("tasks", {})
    if isinstance(tasks, Mapping) and tasks:
        return [found if isinstance(found, Mapping) else {} for found in tasks.values()]
    return [content] if "result" in content else []


def _whose(theirs: Mapping[str, Any], of: Mapping[str, Any], names: Sequence[str]) -> str:
    if "weights" not in theirs:
        return "a model that it does not name (an earlier hymba wrote it)"
    if theirs["weights"] == of["weights"]:
        other = [name for name in names if theirs.get(name) != of.get(name)]
        return f"{theirs['model']} with other settings ({', '.join(other)})"
    same = theirs["model"] == of["model"]
    return f"{theirs['model']} with other weights or files" if same else str(theirs["model"])


def check_folder_of(path: Path) -> None:
    """UserError where no file can be made beside `path`, which need not be there yet."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"{above} cannot be written to: {error.strerror}") from None


def versions() -> dict[str, str]:
    found = {"hymba": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str | torch.device) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def fingerprint(*what: Any) -> str:
    """Equal exactly for equal settings."""
    text = json.dumps(_plain(what), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_of(folder: Path) -> list[Any]:
    """What tells one checkpoint from another without reading gigabytes."""
    files = sorted({file for name in MODEL_FILES for file in folder.glob(name)})
    stats = [(file.name, file.stat()) for file in files]
    return [str(folder.resolve()), [(n, s.st_size, s.st_mtime_ns) for n, s in stats]]


class Finished:
    """Tasks that are done, in a file that is written anew after each; None: kept nowhere. Beside
    each stands what it is `of`."""

    def __init__(
        self,
        path: Path | None,
        head: Mapping[str, Any],
        fresh: bool = False,
        of: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.head, self.of = path, head, dict(of or {})
        self.tasks: dict[str, dict[str, Any]] = {}
        self.taken: list[str] = []  # of them those that were there already
        self.replaced: list[str] = []  # those that were there with other settings
        self._earlier = {} if fresh or path is None else _tasks_in(path)

    def look(self, name: str, print_: str) -> dict[str, Any] | None:
        """An earlier result of a task with these settings."""
        found = self._earlier.get(name)
        return found if found is not None and found.get("fingerprint") == print_ else None

    def other(self, name: str, print_: str) -> bool:
        """Whether there is a result of that task, but with other settings."""
        return name in self._earlier and self.look(name, print_) is None

    def take(self, name: str, found: Mapping[str, Any]) -> None:
        self.taken.append(name)
        self.add(name, found)

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """One that is taken from the file keeps what it was of."""
        if name in self._earlier and name not in self.taken:
            self.replaced.append(name)
        self.tasks[name] = {"of": self.of} | dict(result)
        self.write({})

    def rest(self) -> dict[str, dict[str, Any]]:
        """Earlier tasks that were not asked for: they stay in the file."""
        return {name: x for name, x in self._earlier.items() if name not in self.tasks}

    def write(self, more: Mapping[str, Any]) -> None:
        """Earlier tasks stay in the file, this run's come first."""
        if self.path is not None:
            write_json(self.path, {**self.head, **more, "tasks": self.tasks | self.rest()})


def _tasks_in(path: Path) -> dict[str, dict[str, Any]]:
    """UserError where a file is there that is no evaluation: it would be lost."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["tasks"])
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: --out names a JSON file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of an evaluation: name another --out") from None


def say(line: str) -> None:
    print(f"hymba: {line}", file=sys.stderr, flush=True)


def say_written(finished: Finished) -> None:
    """Where it is, and that not all of it is of this command."""
    if finished.path is None:
        return
    say(f"written to {finished.path}")
    if rest := finished.rest():
        say(f"earlier results stay in it: {', '.join(rest)} (beside each: what it is of)")


def _command() -> str:
    name = Path(sys.argv[0]).name
    words = ["hymba" if name in ("__main__.py", "hymba") else name, *sys.argv[1:]]
    return " ".join(word if word and " " not in word else repr(word) for word in words)


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's and torch's numbers as Python's, anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(x) for x in value]
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return getattr(value, "__qualname__", None) or str(value)
