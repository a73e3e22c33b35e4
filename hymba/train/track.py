"""A run's figures in other people's viewers: TensorBoard, wandb, trackio, where installed.

metrics.jsonl is the record and is always written; a tracker gets the same records as they come.

    tensorboard   files in the run's folder        tensorboard --logdir runs
    wandb         wandb.ai, or files with WANDB_MODE=offline
    trackio       a local database                 trackio show
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hymba.errors import UserError

PROJECT = "hymba"  # what wandb and trackio file runs under
Numbers = dict[str, float]


class Tracker(NamedTuple):
    write: Callable[[Numbers, int], None]
    """What a step gave, and the step."""
    close: Callable[[], None]


def trackers(
    names: Sequence[str], folder: Path, settings: dict[str, Any], step: int
) -> list[Tracker]:
    """Those named, open for a run in `folder` that has done `step` steps. UserError where one is
    unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}: use {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install {name}, or leave it out")
    return [TRACKERS[name](folder, settings, step) for name in names]


def numbers(record: dict[str, Any]) -> Numbers:
    """What of a record can be drawn."""
    drawn = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
    return {k: float(v) for k, v in drawn.items()}


def _tensorboard(folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(record: Numbers, step: int) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, writer.close)


def _wandb(folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=PROJECT,
        name=folder.name,
        id=_identity(folder),
        dir=folder,
        config=settings,
        resume="allow",
    )
    return Tracker(lambda record, step: run.log(record, step=step), run.finish)


def _trackio(folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    import trackio

    run = trackio.init(project=PROJECT, name=_identity(folder), config=settings, resume="allow")
    return Tracker(lambda record, step: run.log(record, step=step), run.finish)


def _identity(folder: Path) -> str:
    """The same for a run that goes on, another for a folder of the same name elsewhere."""
    import hashlib

    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return f"{folder.name}-{place}"


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
