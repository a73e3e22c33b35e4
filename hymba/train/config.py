"""What a training run is, as data: a `TrainConfig`. No torch here.

A recipe (hymba/recipes) is a function that returns one; `hymba train RECIPE --key value` changes
single fields of it; `Trainer` does what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hymba.config import Config
from hymba.errors import UserError
from hymba.train.data import DataConfig


class TrainError(UserError):
    """A run that cannot start or go on; the message says what to do."""


class OptimError(UserError):
    """Settings of the optimiser or schedule that make no sense; the message says which."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

    The paper states only the learning rate (schedule); the rest is the field's habit.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for all, or muon for the matrices of the blocks and adamw for the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay of the running means of gradient and squared gradient."""
    eps: float = 1e-8
    """AdamW: added to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Shrinks matrices by this times the learning rate each step."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""
    normalize: bool = False
    """Scale the matrices of the blocks to unit rows or columns after each step (Nemotron-Flash)."""
    muon_lr: float = 1.0
    """Muon's learning rate over AdamW's; its steps are scaled to the size of AdamW's already."""
    muon_momentum: float = 0.95
    """Muon: decay of the running mean of the gradient."""

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise OptimError(f"optimiser kind {self.kind!r} is unknown: use adamw or muon")
        for name, value in (("betas", max(self.betas)), ("muon_momentum", self.muon_momentum)):
            if not 0 <= min(value, *self.betas) <= value < 1:
                raise OptimError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        for name in ("eps", "clip", "muon_lr"):
            if not getattr(self, name) > 0:
                raise OptimError(f"{name} is {getattr(self, name)}, but must be above 0")
        if not self.weight_decay >= 0:
            raise OptimError(f"weight_decay is {self.weight_decay}, but must be 0 or more")


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step.

    `wsd` (warmup-stable-decay, the paper's: 3e-3 to 1e-5, 1 % and 20 %) rises in a line to `peak`,
    stays, and falls in a line to peak * floor (the paper does not state the shape of its fall).
    `cosine` rises the same way and falls along half a cosine over all the rest.
    """

    kind: Literal["wsd", "cosine"] = "wsd"
    peak: float = 3e-3
    """The largest learning rate."""
    warmup: float = 0.01
    """Share of all steps that rises to the peak."""
    decay: float = 0.2
    """Share of all steps, at the end, that falls (wsd only)."""
    floor: float = 1 / 300
    """The last step's learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.kind not in ("wsd", "cosine"):
            raise OptimError(f"schedule kind {self.kind!r} is unknown: use wsd or cosine")
        if not 0 < self.peak < math.inf or not 0 <= self.floor <= 1:
            raise OptimError(
                f"peak {self.peak} must be a number above 0, floor {self.floor} from 0 to 1"
            )
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise OptimError(
                f"warmup {self.warmup} and decay {self.decay} must be shares of the run that "
                "together are at most 1"
            )

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (0 is the first) of a run of `steps`.

        The first step has peak / warmup steps, the last one exactly peak * floor. Shares are
        rounded to steps: one that is less than half a step (1 % of 49) is none at all.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        falling = steps - rising if self.kind == "cosine" else round(self.decay * steps)
        falling = min(falling, steps - rising)  # both were rounded up
        done = step + 1 - (steps - falling)  # steps of the fall taken, counting this one
        if done <= 0:
            return self.peak
        progress = done / falling
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.floor + (1 - self.floor) * left)


@dataclass(frozen=True)
class Extension:
    """The end of a run on longer rows, with a larger rotary base (paper section 2.5: the last 100B
    of 1.5T tokens on 8k). The base is the released config's: "ntk", from those rows to these."""

    share: float = 0.0
    """Share of the steps, at the end; 0 for none (the paper's is about 1/15)."""
    sequence_length: int = 8192
    """Tokens per row there; a step has as many tokens as before, so fewer rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise TrainError(f"the extension's share is {self.share}, but must be 0 or up to 1")


@dataclass(frozen=True)
class TrainConfig:
    """All that defines a run."""

    folder: Path
    """Where checkpoints/, metrics.jsonl and the trained model go."""
    steps: int
    """Steps of the whole run; the schedule is laid over them."""
    model: Config | None = None
    """The architecture: a preset, or a folder with a config.json."""
    start_from: str | None = None
    """A model folder or hub id whose weights to start from, instead of random ones."""
    dt_start: tuple[float, float] | None = None
    """Between which the SSM's dt starts (Mamba's own start: 0.001 0.1; see docs/log.md); without it
    all of it at 0.69, as in the released code."""
    data: DataConfig = field(default_factory=DataConfig)
    rows: int = 8
    """Rows per step; tokens per step = rows * sequence_length."""
    micro_rows: int | None = None
    """Rows per forward and backward of a process (all its rows at once if None); fewer need less
    memory."""
    sequence_length: int = 512
    """Tokens per row."""
    extension: Extension = field(default_factory=Extension)
    """Longer rows at the end."""
    seed: int = 0
    """Decides the order of the data, and the initial weights where a recipe makes them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: weights stay float32, activations are computed in bfloat16 where that is safe."""
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    z_loss: float = 0.0
    """Adds to the loss so much times the squared log of the softmax's denominator (1e-4 is usual);
    the training loss that is printed has it in it, the held-out loss has not."""
    recompute: bool = False
    """Compute activations again in backward instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile each layer's MLP (torch.compile); what follows the documents' lengths is not."""
    copies: int = 1
    """Of the model among all processes, each in shares (FSDP2); one a machine where there are
    several."""
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
    track: tuple[str, ...] = ()
    """Other viewers for the figures: tensorboard, wandb, trackio."""
    minutes: float | None = None
    """Stop after so many minutes, saved as by Ctrl-C; the same command goes on."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in the folder; never: refuse a folder with one."""
    most_skips: int = 10
    """Steps in a row with non-finite gradients after which the run stops."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "rows": 1, "micro_rows": 1, "sequence_length": 1, "log_every": 1}
        more = {"held_out_tokens": 1, "keep": 1, "most_skips": 1, "copies": 1}
        for name, smallest in (least | more).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise TrainError(f"{name} is {value}, but must be {smallest} or more")
        for name in ("held_out_every", "save_every", "z_loss"):
            if not getattr(self, name) >= 0:
                raise TrainError(f"{name} is {getattr(self, name)}, but must be 0 or more")
        if self.minutes is not None and not self.minutes >= 0:
            raise TrainError(f"minutes is {self.minutes}, but must be 0 or more")
        if self.precision not in ("float32", "bfloat16"):
            raise TrainError(f"precision {self.precision!r} is unknown: use float32 or bfloat16")
        if self.dt_start is not None and not 0 < self.dt_start[0] <= self.dt_start[1] < math.inf:
            raise TrainError(
                f"dt_start is {self.dt_start}, but must be two numbers above 0, rising"
            )
        if self.dt_start is not None and self.start_from is not None:
            raise TrainError("dt_start is for new weights: leave it out, or start_from")
        if self.resume not in ("auto", "never"):
            raise TrainError(f"resume {self.resume!r} is unknown: use auto or never")
        self._check_extension()

    def _check_extension(self) -> None:
        if not self.extension.share:
            return
        longer = self.extension.sequence_length
        if longer <= self.sequence_length or self.tokens % longer:
            raise TrainError(
                f"the extension's rows of {longer} tokens must be longer than the others"
                f" ({self.sequence_length}) and divide a step of {self.tokens} tokens"
            )

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.rows * self.sequence_length
