"""Checkpoints that a run goes on from. The only file that knows their format.

    run/checkpoints/step_000120/   120 steps are done
        .metadata, __0_0.distcp    weights, the optimisers' means, the random state (torch's format)
        state.json                 step, place in the data, counters: the caller's dictionary

Tensors go through torch.distributed.checkpoint: every process writes its shares of the weights, and
a run may go on with another number of processes. Saving copies the tensors to the host's memory and
writes them from there in the background while training goes on.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from hymba.errors import UserError
from hymba.train.parallel import World, share

# Said at every save and load that has no process group; none is needed. For all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_WHOLE = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"step_\d{6,}\.(unfinished|deleted)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run, in one folder; the newest `keep` stay.

    Every process of `world` makes one and calls `save`, `finish` and `load` at the same step; the
    first alone touches what is already there."""

    def __init__(self, folder: Path, keep: int = 2, world: World | None = None) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: a run keeps at least one checkpoint")
        self.folder, self.keep, self.world = folder, keep, world or World()
        # A group of its own: the background must not speak between the sums of a training step.
        self._group = dist.new_group(backend="gloo") if self.world.joined else None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._naming: Future[None] | None = None  # of what is being written

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _WHOLE.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        return max(self.all(), key=step_of, default=None)

    def agreed(self) -> Path | None:
        """What the first process finds the newest, told to all: a shared disk may show it to some
        of them later."""
        names = [place.name if (place := self.latest()) else None]
        if self.world.joined:
            dist.broadcast_object_list(names, src=0, group=self._group)
        return self.folder / names[0] if names[0] else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        state: dict[str, Any],
        wait: bool = True,
    ) -> Path:
        """The checkpoint of a run that has done `step` steps; without `wait` it is written while
        the caller goes on, and what goes wrong there is raised by `check` or `finish`.

        `state` must survive JSON. CheckpointError if a weight is not finite: a run never goes on
        from such weights, and keeping them would push out a good checkpoint.
        """
        self.finish()
        self._refuse_non_finite(model, step)
        place = self.folder / f"step_{step:06}"
        unfinished = _unfinished(place)
        with _errors_in_one_line(_not_written(unfinished)):
            if self.world.first:
                self.clean()
                unfinished.mkdir(parents=True)
                written = json.dumps({"step": step, **state}, indent=2)
                _write_through(unfinished / "state.json", written)
            self.world.wait()
            done = dcp.async_save(
                _tensors(model, optimizers), checkpoint_id=unfinished, process_group=self._group
            )
        self._naming = self._background.submit(self._name, done, place)
        if wait:
            self.finish()
        return place

    def _name(self, done: Any, place: Path) -> None:
        """Once a checkpoint is on the disk, the first process gives it its name: it is told when
        all have written."""
        unfinished = _unfinished(place)
        with _errors_in_one_line(_not_written(unfinished)):
            done.result()
            if not self.world.first:
                return
            if place.exists():
                self._delete(place)
            os.rename(unfinished, place)
            _flush_folder(self.folder)
            for old in self.all()[: -self.keep]:
                self._delete(old)

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._naming is not None and self._naming.done():
            naming, self._naming = self._naming, None
            naming.result()

    def finish(self) -> None:
        """Wait until what was saved is there, everywhere."""
        self.settle()
        self.check()
        self.world.wait()

    def settle(self) -> None:
        """Wait until nothing is written here any more; never raises what went wrong."""
        if self._naming is not None:
            self._naming.exception()

    def state(self, place: Path) -> dict[str, Any]:
        """The `state` that a checkpoint was saved with, and its step."""
        with _errors_in_one_line(_not_resumed(place)):
            found: dict[str, Any] = json.loads((place / "state.json").read_text())
            if "step" not in found:
                raise ValueError("state.json names no step")
        return found

    def load(self, place: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Put a checkpoint's tensors into model, optimisers and random state.

        The optimisers' settings (weight decay, betas) stay as they are now, so that a run can go
        on with changed ones.
        """
        with _errors_in_one_line(_not_resumed(place)):
            tensors = _tensors(model, optimizers)
            dcp.load(tensors, checkpoint_id=place)
        _put(tensors, model, optimizers)

    def clean(self) -> None:
        """Remove what killed saves and deletions left behind."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)

    def _delete(self, place: Path) -> None:
        condemned = place.with_name(place.name + ".deleted")
        os.rename(place, condemned)
        shutil.rmtree(condemned)

    def _refuse_non_finite(self, model: nn.Module, step: int) -> None:
        named = model.named_parameters()
        bad = [name for name, p in named if not torch.isfinite(share(p)).all()]
        found = torch.tensor(float(len(bad)), device=next(model.parameters()).device)
        if self.world.sum(found):
            where = bad[0] if bad else "a weight"  # of another process
            raise CheckpointError(
                f"{where} has non-finite values after step {step}: nothing saved, the checkpoint "
                "before is still there"
            )


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


def _unfinished(place: Path) -> Path:
    return place.with_name(place.name + ".unfinished")


def _not_written(place: Path) -> str:
    return f"{place} cannot be written: make room, then go on"


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """All tensors of a run, by parameter names (not indices, so that layouts may change)."""
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    weights, means = get_state_dict(model, optimizers)
    for optimizer in fresh:  # torch made the means by taking a step of length 0, and counted it
        for each in optimizer.state.values():
            if "step" in each:
                each["step"].zero_()
    return {"model": weights, "optimizer": means, "random": _random_state()}


def _put(tensors: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    set_state_dict(
        model,
        optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(settings.pop(0))
    torch.set_rng_state(tensors["random"]["cpu"])


def _random_state() -> dict[str, torch.Tensor]:
    """The CPU generator only: nothing in a training step draws on a device."""
    return {"cpu": torch.get_rng_state()}


@contextmanager
def _errors_in_one_line(what: str) -> Iterator[None]:
    """Raise what the disk or torch.distributed.checkpoint could not do as a CheckpointError."""
    try:
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
