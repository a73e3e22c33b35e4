"""Checkpoints that a run goes on from. The only file that knows their format.

    run/checkpoints/step_000120/   120 steps are done
        .metadata, __0_0.distcp    weights, AdamW's means and the random state (torch's own format)
        state.json                 step, place in the data, counters: the caller's dictionary

Tensors go through torch.distributed.checkpoint, which works in one process without a process group
and is what FSDP2 needs: every rank writes its shards, a run may go on with another number of
ranks, and saving can be asynchronous. For one process it costs about twice torch.save's time (a
tenth of a second for tens of MB), which is nothing beside a step of a model that large.

A checkpoint is written under another name and renamed when it is whole, and deleted under another
name too, so a folder called step_N is always whole: `kill -9` at any moment leaves the last one
usable. Like all pickle-based formats these files can run code when read: resume only from your
own. For weights to share there is hymba.weights (safetensors).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hymba.errors import UserError

_WHOLE = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"step_\d{6,}\.(unfinished|deleted)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run, in one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: a run keeps at least one checkpoint")
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _WHOLE.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        return max(self.all(), key=step_of, default=None)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of a run that has done `step` steps, then delete the oldest ones.

        `state` must survive JSON. CheckpointError if a weight is not finite: a run never goes on
        from such weights, and keeping them would push out a good checkpoint.
        """
        _refuse_non_finite(model, step)
        self.clean()
        place = self.folder / f"step_{step:06}"
        unfinished = place.with_name(place.name + ".unfinished")
        unfinished.mkdir(parents=True)
        with _errors_in_one_line(f"{unfinished} cannot be written: make room, then go on"):
            dcp.save(_tensors(model, optimizer), checkpoint_id=unfinished)
        _write_through(unfinished / "state.json", json.dumps({"step": step, **state}, indent=2))
        if place.exists():
            self._delete(place)
        os.rename(unfinished, place)
        _flush_folder(self.folder)
        for old in self.all()[: -self.keep]:
            self._delete(old)
        return place

    def state(self, place: Path) -> dict[str, Any]:
        """The `state` that a checkpoint was saved with, and its step."""
        with _errors_in_one_line(_not_resumed(place)):
            found: dict[str, Any] = json.loads((place / "state.json").read_text())
        return found

    def load(self, place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put a checkpoint's tensors into model, optimiser and random state.

        The optimiser's settings (weight decay, betas) stay as they are now, so that a run can go
        on with changed ones.
        """
        with _errors_in_one_line(_not_resumed(place)):
            tensors = _tensors(model, optimizer)
            dcp.load(tensors, checkpoint_id=place)
        _put(tensors, model, optimizer)

    def clean(self) -> None:
        """Remove what killed saves and deletions left behind."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)

    def _delete(self, place: Path) -> None:
        condemned = place.with_name(place.name + ".deleted")
        os.rename(place, condemned)
        shutil.rmtree(condemned)


def step_of(place: Path) -> int:
    """Steps done at a checkpoint, from its name."""
    match = _WHOLE.fullmatch(place.name)
    if match is None:
        raise CheckpointError(f"{place} is not called step_N: it is no checkpoint of a run")
    return int(match[1])


def _not_resumed(place: Path) -> str:
    return (
        f"{place} cannot be resumed by this run: delete it to go on from an earlier one, or use "
        "another folder"
    )


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors of a run, by parameter names (not indices, so that layouts may change)."""
    fresh = not optimizer.state
    weights, means = get_state_dict(model, optimizer)
    if fresh:  # torch made the means by taking a step of length 0, and counted it
        for each in optimizer.state.values():
            each["step"].zero_()
    return {"model": weights, "optimizer": means, "random": _random_state()}


def _put(tensors: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    torch.set_rng_state(tensors["random"]["cpu"])


def _random_state() -> dict[str, torch.Tensor]:
    """The CPU generator only: nothing in a training step draws on a device."""
    return {"cpu": torch.get_rng_state()}


@contextmanager
def _errors_in_one_line(what: str) -> Iterator[None]:
    """Raise what the disk or torch.distributed.checkpoint could not do as a CheckpointError."""
    try:
        with warnings.catch_warnings():
            # Said at every save and load that has no process group; none is needed.
            warnings.filterwarnings("ignore", message="torch.distributed is")
            yield
    except (CheckpointException, Exception) as error:  # the former is no Exception
        cause = _cause(error)
        if not isinstance(cause, Exception):  # Ctrl-C in the middle
            raise cause from None
        detail = str(cause).strip().splitlines() or [type(cause).__name__]
        raise CheckpointError(f"{what} ({detail[0]})") from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _refuse_non_finite(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{name} has non-finite values after step {step}: nothing saved, the checkpoint "
                "before is still there"
            )


def _write_through(path: Path, text: str) -> None:
    """Write and force to disk, so that a rename after it never outlives its content."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
