"""A training run: steps, held-out checks, checkpoints, stopping and going on.

    trainer = Trainer(model, TrainConfig(folder=Path("run"), steps=1000), train, held_out)
    result = trainer.run()      # the same lines again go on where it stopped

One step: take rows, add up the gradients of its micro-batches, clip, let AdamW move. The sum equals
the gradient of one big batch, because each micro-batch counts by its labels. A run that was
killed and resumed gives, on one machine with the same threads, the same losses bit for bit as one
that was not: learning rate and data are functions of the step, and the rest is in the checkpoint.

Not here: the format of checkpoints (resume.py), what rows there are (rows.py), several processes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.train import metrics
from hymba.train.optim import AdamWConfig, Schedule, adamw, clip, set_lr
from hymba.train.resume import CheckpointError, Checkpoints, step_of
from hymba.train.rows import HeldOut, Loader, Packed, Packer
from hymba.train.store import TokenStore


class TrainError(UserError):
    """A run that cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """All that defines a run, but for the model and the data."""

    folder: Path
    """Where checkpoints/ and metrics.jsonl go."""
    steps: int
    """Steps of the whole run; the schedule is laid over them."""
    rows: int = 8
    """Rows per step; tokens per step = rows * sequence_length."""
    micro_rows: int | None = None
    """Rows per forward and backward (all at once if None); fewer need less memory."""
    sequence_length: int = 512
    """Tokens per row."""
    seed: int = 0
    """Decides the order of the data (not the initial weights, which the model brings)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: weights stay float32, activations are computed in bfloat16 where that is safe."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: Schedule = field(default_factory=Schedule)
    held_out_every: int = 100
    """Steps between looks at the held-out documents (0: at the end only)."""
    held_out_tokens: int | None = 65536
    """About how many held-out tokens to look at (all if None); always the same documents."""
    save_every: int = 200
    """Steps between checkpoints (0: at the end only); stopping always saves."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    log_every: int = 1
    """Steps between printed lines; the file gets every step."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in the folder; never: refuse a folder with one."""
    most_skips: int = 10
    """Steps in a row with non-finite gradients after which the run stops."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "rows": 1, "micro_rows": 1, "sequence_length": 1, "log_every": 1}
        for name, smallest in (least | {"keep": 1, "most_skips": 1}).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise TrainError(f"{name} is {value}, but must be {smallest} or more")
        if self.precision not in ("float32", "bfloat16"):
            raise TrainError(f"precision {self.precision!r} is unknown: use float32 or bfloat16")
        if self.resume not in ("auto", "never"):
            raise TrainError(f"resume {self.resume!r} is unknown: use auto or never")


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    """Steps done."""
    loss: float
    """Training loss of the last step, nats per token (nan if none was done in this call)."""
    bits_per_byte: float | None
    """On the held-out documents, after the last step; None without them or if stopped before."""
    stopped: bool
    """Whether a signal ended it early; the same call goes on."""
    checkpoint: Path
    """What the same call would go on from."""


class Trainer:
    """Trains `model` in place on the rows of `train`."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        train: TokenStore,
        held_out: TokenStore | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.config, self.say = model, config, say
        self.optimizer = adamw(model, config.optimizer)
        self.loader = Loader(Packer(train, config.sequence_length, config.seed))
        self.held_out = self._choose(held_out) if held_out else None
        self.checkpoints = Checkpoints(config.folder / "checkpoints", config.keep)
        self.step = 0  # done
        self.skipped = 0  # steps whose gradients were not finite, in all
        self.skipped_in_a_row = 0
        self.seconds = 0.0  # spent in training steps, over all calls

    def _choose(self, store: TokenStore) -> HeldOut:
        config = self.config
        rows = config.micro_rows or config.rows
        return HeldOut(store, config.sequence_length, rows, config.held_out_tokens)

    # ---- the run

    def run(self) -> Result:
        """Train until config.steps are done or a signal (Ctrl-C, SIGTERM) comes.

        A signal lets the step finish and be saved; a second Ctrl-C stops at once. TrainError if
        gradients stay non-finite for config.most_skips steps.
        """
        self._resume()
        log = metrics.MetricsLog(self.metrics_path, self.step)
        record: metrics.Record = {}
        try:
            with stop_signals() as stop:
                while self.step < self.config.steps and not stop.is_set():
                    record = self._one_step()
                    self._record(log, record)
                    self._stop_if_lost()
                    if self._due(self.config.save_every):
                        self._save()
                saved = self._saved()
        finally:
            log.close()
        stopped = self.step < self.config.steps
        if stopped:
            self.say(f"stopped after step {self.step} of {self.config.steps}, saved in {saved}")
            self.say("the same command goes on from there")
        return Result(self.step, record.get("loss", math.nan), self._last_bits(), stopped, saved)

    @property
    def metrics_path(self) -> Path:
        """The JSONL file of the run (metrics.read reads it)."""
        return self.config.folder / "metrics.jsonl"

    def _resume(self) -> None:
        self.checkpoints.clean()
        latest = self.checkpoints.latest()
        if latest is None:
            return
        if self.config.resume == "never":
            raise TrainError(
                f"{self.config.folder} holds a run ({latest.name}): use resume auto to go on with "
                "it, or another folder"
            )
        state = self.checkpoints.state(latest)
        self._same_model(state["model"], latest)
        self.loader.load_state_dict(state["data"])
        self.checkpoints.load(latest, self.model, self.optimizer)
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.say(f"going on after step {self.step} from {latest}")

    def _same_model(self, saved: dict[str, Any], place: Path) -> None:
        """Not left to the tensors' shapes: a window or a rotary base has none."""
        ours = self._model_config()
        other = sorted(k for k in saved.keys() | ours.keys() if saved.get(k) != ours.get(k))
        if other:
            raise TrainError(
                f"{place} was made by a model with another {', '.join(other)}: go on with the same "
                "model, or start in another folder"
            )

    def _model_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json.dumps(self.model.config.to_dict()))
        return config  # as it reads when it comes back from JSON

    def _save(self) -> Path:
        state = {
            "model": self._model_config(),
            "data": self.loader.state_dict(),
            "skipped": self.skipped,
            "seconds": self.seconds,
        }
        return self.checkpoints.save(self.step, self.model, self.optimizer, state)

    def _saved(self) -> Path:
        """The checkpoint of this very step, written now if it is not there."""
        latest = self.checkpoints.latest()
        return latest if latest and step_of(latest) == self.step else self._save()

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    # ---- one step

    def _one_step(self) -> metrics.Record:
        began = time.perf_counter()
        lr = self.config.schedule.at(self.step, self.config.steps)
        loss = self._gradients(self._micro_batches())
        norm = clip(self.model.parameters(), self.config.optimizer.clip)
        if math.isfinite(norm) and math.isfinite(loss):
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        tokens = self.config.rows * self.config.sequence_length
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.step * tokens,
            "epoch": self.loader.epoch,
            "tokens_per_second": tokens / seconds,
            "eta": self.seconds / self.step * (self.config.steps - self.step),
            "skipped_steps": self.skipped,
        }

    def _micro_batches(self) -> list[Packed]:
        return self.loader.take(self.config.rows, self.config.micro_rows)

    def _gradients(self, micro_batches: list[Packed]) -> float:
        """Add up the gradients of the mean loss over all labels of the step; return that loss."""
        labels = sum(packed.labels.numel() for packed in micro_batches)
        total = torch.zeros((), device=self.model.device)
        for packed in micro_batches:
            loss = self._nats(packed) / labels
            loss.backward()
            total += loss.detach()
        return float(total)

    def _nats(self, packed: Packed) -> torch.Tensor:
        """Cross-entropy of one batch, a scalar in nats, summed over its labels."""
        device = self.model.device
        tokens = packed.tokens.to(device, non_blocking=True)
        labels = packed.labels.to(device, non_blocking=True)
        with self._precision():
            hidden = self.model(tokens, Batch.of(packed.lengths, device=device))  # (N, D)
            return self.model.loss(hidden, labels, reduction="sum")

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    # ---- what a run tells

    def _record(self, log: metrics.MetricsLog, record: metrics.Record) -> None:
        if self._due(self.config.log_every):
            self.say(metrics.step_line(record, self.config.steps))
        if self.held_out and self._due(self.config.held_out_every):
            record |= self.evaluate()
            self.say(metrics.held_out_line(record))
        log.write(record)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats per token) and bits per byte on the held-out documents."""
        if self.held_out is None:
            raise TrainError("this run has no held-out documents to evaluate on")
        nats = math.fsum(float(self._nats(packed)) for packed in self.held_out)
        return {
            "held_out_loss": nats / self.held_out.labels,
            "bits_per_byte": nats / math.log(2) / self.held_out.bytes,
        }

    def _last_bits(self) -> float | None:
        last = [r for r in metrics.read(self.metrics_path) if r["step"] == self.step]
        return last[-1].get("bits_per_byte") if last else None

    def _stop_if_lost(self) -> None:
        if self.skipped_in_a_row < self.config.most_skips:
            return
        # The skipped steps moved no weight, so what is saved here is the state before them.
        try:
            place = self._save()
        except CheckpointError:
            place = self.checkpoints.latest() or Path("none")
        raise TrainError(
            f"gradients were not finite in {self.skipped_in_a_row} steps in a row up to step "
            f"{self.step}; last good checkpoint: {place}; lower the learning rate and go on"
        )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second such signal acts as usual.

    Outside the main thread, where Python allows no handlers, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not print: a handler may run in the middle of another print.
        os.write(2, b"\nfinishing this step, then saving (once more stops at once)\n")

    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
