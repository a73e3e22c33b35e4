"""The folder of a fine-tuning: what it was asked for, its checkpoints, and at the end the model.

    runs/mine/training/started.json     while it runs: what decides the result
    runs/mine/training/checkpoint-40/   the last whole state; earlier ones go once it is there
    runs/mine/metrics.jsonl             a line a step
    runs/mine/config.json ...           the model, once it is done
    runs/mine/adapter/                  of LoRA and DoRA: what was merged in
    runs/mine/finetune.json             settings, data, versions, results; written last

A folder that holds anything else is refused, and a finished one is not touched without --fresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from hymba.files import is_leftover, write_json
from hymba.finetune.settings import FinetuneError
from hymba.train.claim import LOCK

STARTED, DONE, METRICS, ADAPTER = "started.json", "finetune.json", "metrics.jsonl", "adapter"
WHOLE = "whole"  # an empty file: the checkpoint it lies in was written to its end
# What a result may consist of, removed with --fresh; anything else in the folder stays.
MADE = (
    *(DONE, METRICS, "config.json", "generation_config.json", "LICENSE"),
    *("model*.safetensors", "model.safetensors.index.json", "README.md", "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)

Found = Literal["nothing", "a run", "a result"]


class Folder:
    """One --out. `asked` is what decides the result, as JSON has it."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.training = path, path / "training"
        self.asked: dict[str, Any] = json.loads(json.dumps(asked))

    def look(self, fresh: bool) -> Found:
        """What is in the folder. FinetuneError where that is another thing. Nothing is changed."""
        if self.path.exists() and not self.path.is_dir():
            raise FinetuneError(f"{self.path} is a file: name another --out")
        done, started = self.path / DONE, self.training / STARTED
        if not done.is_file() and not started.is_file():
            if self.path.is_dir() and not all(map(self._is_nothing, self.path.iterdir())):
                raise FinetuneError(
                    f"{self.path} holds something that is no fine-tuning: name another --out"
                )
            return "nothing"
        if fresh or not (done.is_file() or self.latest()):
            return "nothing"  # that is worth keeping
        self._same(done if done.is_file() else started)
        return "a result" if done.is_file() else "a run"

    def _is_nothing(self, file: Path) -> bool:
        """What a kill may have left at the very beginning."""
        begun = file == self.training and not any(self._checkpoints(whole=True))
        return file.name == LOCK or is_leftover(file) or begun

    def begin(self, found: Found) -> None:
        """Make the folder ready to train in."""
        if found == "nothing":
            self._empty()
            self.training.mkdir(parents=True, exist_ok=True)
            write_json(self.training / STARTED, self.asked)
        for checkpoint in self._checkpoints(whole=False):
            shutil.rmtree(checkpoint)

    def _same(self, kept: Path) -> None:
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            before = before["asked"] if kept.name == DONE else before
            told = list(_differences(before, self.asked))
        except (ValueError, KeyError, TypeError, AttributeError):
            told = ["a record that cannot be read"]
        if told:
            raise FinetuneError(
                f"{self.path} holds a fine-tuning with {'; '.join(told)}: add --fresh to start"
                " anew, or name another --out"
            )

    def _empty(self) -> None:
        for name in (self.training, self.path / ADAPTER, self.path / "tensorboard"):
            shutil.rmtree(name, ignore_errors=True)
        for pattern in MADE:
            for file in self.path.glob(pattern):
                file.unlink()
        for file in filter(is_leftover, self.path.glob(".*")):
            file.unlink()

    # ---- checkpoints

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return max(self._checkpoints(whole=True), key=step_of, default=None)

    def keep(self, checkpoint: Path) -> None:
        """`checkpoint` has been written: mark it, and let go of the others."""
        (checkpoint / WHOLE).touch()
        for other in self._checkpoints(whole=True):
            if other != checkpoint:
                (other / WHOLE).unlink()  # first: a removal that is interrupted leaves a part
                shutil.rmtree(other)

    def _checkpoints(self, whole: bool) -> list[Path]:
        found = self.training.glob("checkpoint-*")
        return [path for path in found if (path / WHOLE).exists() == whole]

    # ---- the result

    def finish(self, result: Path, record: Mapping[str, Any]) -> None:
        """Move the files of `result` to their places and say that it is done."""
        for file in result.iterdir():
            target = self.path / file.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(file, target)
        write_json(self.path / DONE, {"asked": self.asked, **record})
        shutil.rmtree(self.training)

    def record(self) -> dict[str, Any]:
        """What `finish` has written."""
        content: dict[str, Any] = json.loads((self.path / DONE).read_text(encoding="utf-8"))
        return content


def step_of(checkpoint: Path) -> int:
    """checkpoint-40 -> 40"""
    return int(checkpoint.name.rpartition("-")[2])


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of files' names and contents, 16 hex digits of it."""
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()[:16]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            long = key in ("base", "data", "held-out data")
            yield f"another {key}" if long else f"{key} {before.get(key)}, not {now.get(key)}"
