"""A training run: steps, held-out checks, checkpoints, stopping and going on.

    trainer = Trainer(model, TrainConfig(folder=Path("run"), steps=1000), train, held_out)
    result = trainer.run()      # the same lines again go on where it stopped

One step: take rows, add up the gradients of its micro-batches, clip, let the optimisers move. The
sum equals the gradient of one big batch, because each micro-batch counts by its labels, and each
process's rows too. A run that was killed and resumed gives, on one machine with the same threads,
the same losses bit for bit as one that was not: learning rate and data are functions of the step,
and the rest is in the checkpoint.

Not here: the format of checkpoints (resume.py), what rows there are (rows.py), how weights are
spread over processes (parallel.py), what is printed (metrics.py).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.layers import MLP
from hymba.train import metrics
from hymba.train.claim import claimed
from hymba.train.config import TrainConfig, TrainError
from hymba.train.optim import clip, normalize_weights, optimizers, set_lr
from hymba.train.parallel import World, exchange, spread
from hymba.train.resume import CheckpointError, Checkpoints, step_of
from hymba.train.rows import Loader, Packed
from hymba.train.stages import Rowmaker, Stage, stages
from hymba.train.stop import stop_signals
from hymba.train.store import TokenStore
from hymba.train.track import Tracker, numbers, trackers


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
    """Trains `model` in place.

    `train` is a TokenStore, rows of the caller's, or a function (sequence_length, seed) -> rows.
    With several processes (`world`) each makes the same Trainer and calls the same methods; the
    model's weights become shares."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        train: TokenStore | Rowmaker,
        held_out: TokenStore | None = None,
        say: Callable[[str], None] = print,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.model, self.config = model, config
        self.say = say if self.world.first else _nothing
        self._first_config = model.config
        self._stages = stages(config, model.config, train, held_out, self.world.size)
        spread(model, self.world, config.copies)
        model.decoder.checkpoint_blocks = recomputed if config.recompute else None
        if config.compile:
            compile_parts(model)
        self.optimizers = optimizers(model, config.optimizer)
        self.checkpoints = Checkpoints(config.folder / "checkpoints", config.keep, self.world)
        self.step = 0  # done
        self.tokens = 0  # of the rows taken; a run may go on with other rows
        self.skipped = 0  # steps whose gradients were not finite, in all
        self.skipped_in_a_row = 0
        self.seconds = 0.0  # spent in training steps, over all calls
        self._stage = self._stages[0]
        self._began = time.monotonic()
        self._rate: float | None = None  # of matrix products on this device

    # ---- the run

    def run(self, begin: Callable[[], None] = lambda: None) -> Result:
        """Train until config.steps are done or a signal (Ctrl-C, SIGTERM) comes.

        A signal lets the step finish and be saved, as config.minutes does; a second Ctrl-C stops at
        once. The first process calls `begin` when nothing stands against the run. TrainError where
        something does: another run in the folder, going on or of other settings; and if gradients
        stay non-finite for config.most_skips steps.
        """
        self._began = time.monotonic()
        with claimed(self.config.folder) if self.world.first else nullcontext(True) as ours:
            if not ours:
                raise TrainError(f"another run is going on in {self.config.folder}: name another")
            self._resume()
            if self.world.first:
                begin()
            return self._run()

    def _run(self) -> Result:
        watchers = self._watchers()
        record: metrics.Record = {}
        try:
            with stop_signals(self.world.joined) as stop:
                while self.step < self.config.steps and not self._agreed(
                    stop.is_set() or self._late()
                ):
                    record = self._one_step()
                    self._record(watchers, record)
                    self._stop_if_lost()
                    self.checkpoints.check()
                    if self._due(self.config.save_every) and not self.skipped_in_a_row:
                        self._save(wait=False)
                saved = self._saved()
        finally:
            self.checkpoints.settle()
            for watcher in watchers:
                watcher.close()
        stopped = self.step < self.config.steps
        if stopped:
            self.say(f"stopped after step {self.step} of {self.config.steps}, saved in {saved}")
            self.say("the same command goes on from there")
        return Result(self.step, record.get("loss", math.nan), self._last_bits(), stopped, saved)

    @property
    def metrics_path(self) -> Path:
        """The JSONL file of the run (metrics.read reads it)."""
        return self.config.folder / "metrics.jsonl"

    @property
    def loader(self) -> Loader:
        """Of the rows that the next step takes."""
        return self._stage.loader

    def _late(self) -> bool:
        """Whether this call has had its minutes."""
        minutes = self.config.minutes
        return minutes is not None and time.monotonic() - self._began > 60 * minutes

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was told to stop, so that all stop after the same step."""
        return bool(self.world.sum(torch.tensor(float(stop))))

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if self.world.first:
            self.checkpoints.clean()
        latest = self.checkpoints.agreed()
        if latest is None:
            if self.config.optimizer.normalize:
                normalize_weights(self.model)
            return
        if self.config.resume == "never":
            raise TrainError(
                f"{self.config.folder} holds a run ({latest.name}): use resume auto to go on with "
                "it, or another folder"
            )
        state = self.checkpoints.state(latest)
        self._same_model(state["model"], latest)
        self._refuse_others(state, latest)
        self._enter(state["step"])
        self.loader.load_state_dict(state["data"])
        self.checkpoints.load(latest, self.model, self.optimizers)
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.tokens = state.get("tokens", self.step * self.config.tokens)
        self.say(f"going on after step {self.step} from {latest}")

    def _same_model(self, saved: dict[str, Any], place: Path) -> None:
        """Not left to the tensors' shapes: a window or a rotary base has none."""
        ours = _plain(self._first_config)
        other = sorted(k for k in saved.keys() | ours.keys() if saved.get(k) != ours.get(k))
        if other:
            raise TrainError(
                f"{place} was made by a model with another {', '.join(other)}: go on with the same "
                "model, or start in another folder"
            )

    def _refuse_others(self, state: dict[str, Any], place: Path) -> None:
        """What would else end in torch's words, or in a run that says it is done and is not."""
        kind = self.config.optimizer.kind
        if state.get("optimizer", kind) != kind:
            raise TrainError(
                f"{place} was made with optimizer.kind {state['optimizer']}, now it is {kind}: go "
                f"on with {state['optimizer']}, or start in another folder"
            )
        if state["step"] > self.config.steps:
            raise TrainError(
                f"{place} has done {state['step']} steps, the run has {self.config.steps}: give it "
                "as many, or start in another folder"
            )

    def _save(self, wait: bool = True) -> Path:
        state = {
            "model": _plain(self._first_config),
            "optimizer": self.config.optimizer.kind,
            "tokens": self.tokens,
            "data": self._stage_of(self.step).loader.state_dict(),  # that the next step takes from
            "skipped": self.skipped,
            "seconds": self.seconds,
        }
        return self.checkpoints.save(self.step, self.model, self.optimizers, state, wait)

    def _saved(self) -> Path:
        """The checkpoint of this very step, written now if it is not there."""
        self.checkpoints.finish()
        latest = self.checkpoints.agreed()
        return latest if latest and step_of(latest) == self.step else self._save()

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _stage_of(self, step: int) -> Stage:
        """The stage that step number `step` (0 is the first) belongs to."""
        return [stage for stage in self._stages if stage.start <= step][-1]

    def _enter(self, step: int) -> None:
        """Be in the stage that step number `step` belongs to."""
        current = self._stage_of(step)
        if current is not self._stage:
            self._stage = current
            self.model.set_config(current.model)

    # ---- one step

    def _one_step(self) -> metrics.Record:
        self._enter(self.step)
        began = time.perf_counter()
        lr = self.config.schedule.at(self.step, self.config.steps)
        batches = self._micro_batches()
        total = self._gradients(batches)
        self._look_ahead()
        loss = float(self.world.sum(total))
        norm = clip(self.model.parameters(), self.config.optimizer.clip)
        if math.isfinite(norm) and math.isfinite(loss):
            set_lr(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.config.optimizer.normalize:
                normalize_weights(self.model)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self.config.tokens
        seconds = time.perf_counter() - began
        self.seconds += seconds
        return {
            "step": self.step,
            "loss": loss,
            "bits_per_byte_train": self._bits(loss),
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.tokens,
            "epoch": self.loader.epoch,
            "tokens_per_second": self.config.tokens / seconds,
            "mfu": self._mfu(batches, seconds),
            "memory_gb": metrics.memory_gb(self.model.device),
            "eta": self.seconds / self.step * (self.config.steps - self.step),
            "skipped_steps": self.skipped,
        }

    def _micro_batches(self) -> list[Packed]:
        """This process's rows of the step."""
        return self.loader.take(*self._share())

    def _look_ahead(self) -> None:
        """Make the next step's rows while a GPU works on this one's."""
        if self.step + 1 < self.config.steps:
            self.loader.prepare(*self._share())

    def _share(self) -> tuple[int, int | None, int, int]:
        return self._stage.rows, self._stage.micro_rows, self.world.rank, self.world.size

    def _gradients(self, micro_batches: list[Packed]) -> torch.Tensor:
        """Add up the gradients of the mean loss over all labels of the step; return this process's
        part of that loss."""
        total = torch.zeros((), device=self.model.device)
        counted = sum(int((packed.labels >= 0).sum()) for packed in micro_batches)
        labels = self.world.sum(total + counted).clamp(min=1)
        for number, packed in enumerate(micro_batches, 1):
            exchange(self.model, self.world, last=number == len(micro_batches))
            loss = self._nats(packed, self.config.z_loss) / labels
            (loss * self.world.size).backward()  # FSDP2 takes the mean over processes
            total += loss.detach()
        return total

    def _nats(self, packed: Packed, z_loss: float = 0.0) -> torch.Tensor:
        """Cross-entropy of one batch, a scalar in nats, summed over its labels."""
        device = self.model.device
        tokens = packed.tokens.to(device, non_blocking=True)
        labels = packed.labels.to(device, non_blocking=True)
        with self._precision():
            hidden = self.model(tokens, Batch.of(packed.lengths, device=device))  # (N, D)
            return self.model.loss(hidden, labels, reduction="sum", z_loss=z_loss)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    # ---- what a run tells

    def _watchers(self) -> list[Tracker]:
        """Those that get each record: the file, and other people's viewers."""
        if not self.world.first:
            return []
        log = metrics.MetricsLog(self.metrics_path, self.step)
        settings = {"model": _plain(self._first_config), "steps": self.config.steps}
        others = trackers(self.config.track, self.config.folder, settings, self.step)
        return [Tracker(lambda record, _: log.write(record), log.close), *others]

    def _record(self, watchers: list[Tracker], record: metrics.Record) -> None:
        if self._due(self.config.log_every):
            self.say(metrics.step_line(record, self.config.steps))
        if self._stage.held_out and self._due(self.config.held_out_every):
            record |= self.evaluate()
            self.say(metrics.held_out_line(record))
        for log, *others in [watchers] if watchers else []:
            log.write(record, self.step)
            for other in others:
                other.write(numbers(record), self.step)

    def _bits(self, loss: float) -> float | None:
        """Of a training loss in nats per token."""
        each = self.loader.rows.bytes_per_label
        return None if each is None else loss / math.log(2) / each

    def _mfu(self, batches: list[Packed], seconds: float) -> float:
        """Useful FLOPs of this process's step over what its device's matrix products could do."""
        if self._rate is None:
            dtype = getattr(torch, self.config.precision)
            self._rate = metrics.matrix_rate(self.model.device, dtype)
        lengths = (length for packed in batches for length in packed.lengths)
        return metrics.step_flops(self.model.config, lengths) / seconds / self._rate

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats per token) and bits per byte on the held-out documents."""
        held_out, world = self._stage.held_out, self.world
        if held_out is None:
            raise TrainError("this run has no held-out documents to evaluate on")
        nats = 0.0
        for first in range(0, len(held_out), world.size):
            mine = first + world.rank
            # Every process computes as often: the weights are gathered from all.
            found = float(self._nats(held_out[min(mine, len(held_out) - 1)]))
            nats += found if mine < len(held_out) else 0.0
        nats = float(world.sum(torch.tensor(nats, dtype=torch.float64)))
        return {
            "held_out_loss": nats / held_out.labels,
            "bits_per_byte": nats / math.log(2) / held_out.bytes,
        }

    def _last_bits(self) -> float | None:
        last = [r for r in metrics.read(self.metrics_path) if r["step"] == self.step]
        return last[-1].get("bits_per_byte") if last else None

    def _stop_if_lost(self) -> None:
        if self.skipped_in_a_row < self.config.most_skips:
            return
        # Not saved: weights that give such gradients may be why, and would push out better ones.
        try:
            place = self.checkpoints.agreed() or self._save()
        except CheckpointError:
            place = None
        kept = f"go on from {place}; if that fails too, delete it" if place else "start again"
        raise TrainError(
            f"gradients were not finite in {self.skipped_in_a_row} steps in a row up to step "
            f"{self.step}: lower the learning rate and {kept}"
        )


def recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """A block whose activations are computed again in backward."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *args, use_reentrant=False)


def compile_parts(model: LanguageModel) -> None:
    """Compile what is the same for all rows. The mixers are not: the lengths of the documents in a
    row decide what they compute, and every step has others."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.compile()


def _plain(config: Config) -> dict[str, Any]:
    """As it reads when it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain


def _nothing(_: str) -> None:
    """What a process says that is not the first."""
