"""TRL's trainers, given tokens that are ready, and what they tell while they run.

TRL packs, shuffles, adds up gradients and computes both losses. What is changed here: preferences
come as tokens (TRL would render and encode them by rules of its own), and a held-out loss is the
mean over learnt tokens, whatever the batches. `Watch` hears the trainer's events: it prints, writes
the metrics, marks whole checkpoints and passes Ctrl-C on between two steps.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hymba.finetune.folder import METRICS, Folder, step_of
from hymba.finetune.masks import IGNORE, Learnt, Pair
from hymba.finetune.settings import FinetuneError, Settings
from hymba.train.metrics import MetricsLog, step_line

# Every product of a block. in_proj makes queries, keys, values, the SSM's input and its gate in one
# go, so these five share one A of an adapter and have a B each.
TARGETS = ("in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")
WARMUP = 0.03  # of the steps
RENAMED = {
    "eval_loss": "held_out_loss",
    "eval_mean_token_accuracy": "held_out_accuracy",
    "eval_rewards/accuracies": "held_out_preferred",
    "eval_rewards/margins": "held_out_margin",
    "mean_token_accuracy": "token_accuracy",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "epoch": "epoch",
}


class Warmed:
    """A warm-up is a step at least, and its first step has the rate 0: a run of one step would
    learn nothing, so it has none."""

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if num_training_steps == 1:
            self.args.warmup_steps = 0  # type: ignore[attr-defined]
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]


class Sft(Warmed, SFTTrainer):
    """TRL's, whose held-out loss weighs tokens equally, not batches."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        # The loop takes the mean over rows of their batch's mean; these weights undo both.
        rows = max(1, inputs["labels"].shape[0])
        labels = int((inputs["labels"][:, 1:] != IGNORE).sum())
        return (loss * labels / rows / self.labels_per_row, *others)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        rows = self.eval_dataset["labels"]
        counted = sum(label != IGNORE for labels in rows for label in labels[1:])
        self.labels_per_row = counted / len(rows)
        return loader


class Dpo(Warmed, DPOTrainer):
    """TRL's, given tokens."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def sft_rows(examples: Sequence[Learnt]) -> Dataset:
    columns = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    return Dataset.from_dict(columns)


def dpo_rows(examples: Sequence[Pair]) -> Dataset:
    columns = {
        "prompt_ids": [e.prompt for e in examples],
        "chosen_ids": [e.chosen for e in examples],
        "rejected_ids": [e.rejected for e in examples],
    }
    return Dataset.from_dict(columns)


def adapter(settings: Settings) -> LoraConfig | None:
    """PEFT's description of the adapter, None where every weight is trained."""
    if settings.method == "full":
        return None
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(TARGETS),
        use_dora=settings.method == "dora",
        task_type="CAUSAL_LM",
    )


def arguments(
    settings: Settings, objective: str, precision: str, folder: Folder, limit: int
) -> Any:
    """TRL's arguments. `limit` is the most tokens of a row; nothing is cut off, since nothing
    longer is given."""
    rows, micro = _rows(settings)
    common: dict[str, Any] = {
        "output_dir": str(folder.training),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.rate(objective),
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "per_device_train_batch_size": micro,
        # A pack is one row to the evaluation loop, however many chats are in it.
        "per_device_eval_batch_size": 1 if settings.packing else micro,
        "gradient_accumulation_steps": rows // micro,
        "max_length": limit,
        "bf16": precision == "bfloat16",
        "use_cpu": settings.device == "cpu" or not torch.cuda.is_available(),
        "gradient_checkpointing": settings.checkpoint_blocks,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_every or 0.1,
        "eval_strategy": "steps" if settings.held_out and settings.held_out_every else "no",
        "eval_steps": settings.held_out_every or None,
        "eval_on_start": bool(settings.held_out),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "report_to": _reports(folder),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if objective == "dpo":
        return DPOConfig(**common, beta=settings.beta)
    return SFTConfig(**common, packing=settings.packing, eval_packing=False)


def _rows(settings: Settings) -> tuple[int, int]:
    """Rows a step of this process, and of those in one forward: an exact part of them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.rows % world:
        raise FinetuneError(f"--rows {settings.rows} cannot be shared by {world} processes evenly")
    rows = settings.rows // world
    return rows, max(n for n in range(1, min(settings.micro_rows, rows) + 1) if rows % n == 0)


def _reports(folder: Folder) -> list[str]:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return []
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
    return ["tensorboard"]


def quiet() -> None:
    """Libraries tell their developers much that a user of this command cannot act on: what is
    deprecated inside them, and settings that were chosen here on purpose. Errors stay."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(trl|peft|accelerate)\b")


class Watch(TrainerCallback):
    """Hears a trainer's events."""

    def __init__(self, folder: Folder, settings: Settings, begun_at: int, writes: bool) -> None:
        """For a run that has done `begun_at` steps; one of its processes `writes`."""
        self.folder, self.settings = folder, settings
        self.interrupted = False
        self.stop = Event()
        self.first: dict[str, Any] = {}  # what the first step of this process told
        self.last: dict[str, Any] = {}
        self.held_out: dict[str, Any] = {}
        self._log = MetricsLog(folder.path / METRICS, begun_at) if writes else None
        self._begun_at, self._tokens = begun_at, 0
        self._began = self._took = self._seconds = 0.0
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = Bar(state.max_steps, state.global_step) if state.is_world_process_zero else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._took = time.perf_counter() - self._began
        self._seconds += self._took
        if self._asked_to_stop(args):
            self.interrupted = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def _asked_to_stop(self, args: Any) -> bool:
        """Whether any process was: all must save the same step."""
        if args.world_size == 1:
            return self.stop.is_set()
        asked = torch.tensor(float(self.stop.is_set()), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self._tell_held_out(state, logs)
        elif "loss" in logs:
            self._tell_step(state, logs)

    def _tell_step(self, state: Any, logs: Mapping[str, Any]) -> None:
        if not math.isfinite(logs["loss"]) or not math.isfinite(float(logs["grad_norm"])):
            raise FinetuneError(
                f"the loss is not finite at step {state.global_step}: lower --lr"
                f" ({self._kept()}), and add --fresh"
            )
        step, tokens = state.global_step, logs.get("num_tokens", 0)
        a_step = self._seconds / max(1, step - self._begun_at)
        self.last = {
            "step": step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_second": (tokens - self._tokens) / self._took,
            "eta": a_step * (state.max_steps - step),
            "seconds": self._took,
            **_renamed(logs),
        }
        self._tokens, self.first = tokens, self.first or self.last
        if self._log is None:
            return
        self._log.write(self.last)
        every = self.settings.log_every or math.ceil(state.max_steps / 100)
        if step % every == 0 or step in (1, state.max_steps):
            margin = f"  margin {self.last['margin']:.3f}" if "margin" in self.last else ""
            say(step_line(self.last, state.max_steps) + margin)
        if self._bar is not None:
            self._bar.at(step)

    def _kept(self) -> str:
        latest = self.folder.latest()
        return f"step {step_of(latest)} is kept" if latest else "nothing is kept"

    def _tell_held_out(self, state: Any, logs: Mapping[str, Any]) -> None:
        self.held_out = {"step": state.global_step, **_renamed(logs)}
        if self._log is not None:
            self._log.write(self.held_out)
            say(held_out_line(self.held_out))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # each process writes its random state
        if state.is_world_process_zero:
            self.folder.keep(self.folder.training / f"checkpoint-{state.global_step}")


def held_out_line(record: Mapping[str, Any]) -> str:
    """What a look at the held-out lines prints."""
    parts = [f"step {record['step']}  held out: loss {record['held_out_loss']:.4f}"]
    if "held_out_preferred" not in record:
        parts.append(f"tokens right {record['held_out_accuracy']:.1%}")
    else:
        parts.append(f"chosen preferred {record['held_out_preferred']:.1%}")
        parts.append(f"margin {record['held_out_margin']:.3f}")
    return "  ".join(parts)


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _renamed(logs: Mapping[str, Any]) -> dict[str, float]:
    return {ours: float(logs[theirs]) for theirs, ours in RENAMED.items() if theirs in logs}


class Bar:
    """A progress bar on a terminal's standard error; elsewhere nothing."""

    def __init__(self, steps: int, done: int) -> None:
        self._progress: Any = None
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import Progress

        # Lines that go to a file must not be caught and shown on the terminal instead.
        self._progress = progress = Progress(
            console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
        )
        self._task = progress.add_task("training", total=steps, completed=done)
        progress.start()

    def at(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
