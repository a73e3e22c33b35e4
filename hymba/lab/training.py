"""One model of the laboratory, trained: the same settings for every variant of a size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hymba.config import Config
from hymba.lab.sizes import Run
from hymba.model.decoder import LanguageModel
from hymba.train import OptimConfig, Schedule, TrainConfig, Trainer, metrics
from hymba.train.rows import Rows
from hymba.train.store import TokenStore
from hymba.weights import usable_device

POINTS = 50  # of a loss curve that is kept
LOOKS = 8  # at the held-out text while training
MANY = 50_000_000  # tokens of a run that is worth checkpoints on its way


@dataclass(frozen=True)
class Device:
    """Where a laboratory runs, and in what precision: bfloat16 on a GPU, float32 on a CPU."""

    type: str

    @staticmethod
    def find(asked: str = "") -> Device:
        """UserError where the device does not exist or cannot compute."""
        found = asked or ("cuda" if torch.cuda.is_available() else "cpu")
        return Device(usable_device(found).type)

    @property
    def precision(self) -> str:
        return "bfloat16" if self.type == "cuda" else "float32"

    @property
    def is_gpu(self) -> bool:
        return self.type == "cuda"


@dataclass(frozen=True)
class Trained:
    """What a whole run leaves to be measured."""

    model: LanguageModel
    metrics: Path
    seconds: float
    tokens_per_second: float  # of the median step

    @property
    def losses(self) -> list[list[float]]:
        """(step, training loss), thinned out: whether a run had learnt what it could."""
        steps, losses = metrics.series(metrics.read(self.metrics), "loss")
        thin = slice(None, None, -(-len(steps) // POINTS))
        return [list(pair) for pair in zip(steps[thin], losses[thin], strict=True)]


def settings(
    folder: Path, run: Run, seed: int, precision: str, normalize: bool, held_out_tokens: int
) -> TrainConfig:
    return TrainConfig(
        folder=folder,
        steps=run.steps,
        rows=run.rows,
        micro_rows=run.micro_rows,
        sequence_length=run.sequence_length,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        optimizer=OptimConfig(normalize=normalize),
        schedule=Schedule(kind="cosine", peak=run.peak, warmup=0.05, floor=0.05),
        held_out_every=-(-run.steps // LOOKS),
        held_out_tokens=held_out_tokens // 4,
        save_every=-(-run.steps // 4) if run.tokens > MANY else 0,
        keep=1,
        log_every=-(-run.steps // 5),
    )


def new_model(
    config: Config, seed: int, device: Device, dt: tuple[float, float] | None = None
) -> LanguageModel:
    """The same weights on every device: they are drawn on the CPU."""
    return LanguageModel(config).init_weights(seed, dt).to(device.type)


def train(
    model: LanguageModel,
    config: TrainConfig,
    rows: Rows | TokenStore,
    held_out: TokenStore | None,
    minutes: float | None,
    say: Callable[[str], None],
) -> Trained | None:
    """None where a signal or the clock stopped it; the same call goes on."""
    trainer = Trainer(model, replace(config, minutes=minutes), rows, held_out, say)
    if trainer.run().stopped:
        return None
    records = metrics.read(trainer.metrics_path)
    speeds = sorted(record["tokens_per_second"] for record in records)
    middle = speeds[len(speeds) // 2]
    return Trained(model.eval(), trainer.metrics_path, trainer.seconds, middle)


def forget(folder: Path) -> None:
    """Drop the checkpoints of a run that is done: its weights and figures are kept elsewhere."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
