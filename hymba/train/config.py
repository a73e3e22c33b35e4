"""What a training run is, as data: a `TrainConfig`. No torch here.

A recipe (hymba/recipes) is a function that returns one; `hymba train RECIPE --key value` changes
single fields of it; `Trainer` does what it says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hymba.config import Config
from hymba.errors import UserError
from hymba.train.data import DataConfig
from hymba.train.optim import OptimConfig, Schedule


class TrainError(UserError):
    """A run that cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class Extension:
    """The end of a run on longer rows, with a larger rotary base (paper section 2.5: the last 100B
    of 1.5T tokens on 8k). The base is the released config's: "ntk" from the rows before to these."""

    share: float = 1 / 15
    """Share of the steps, at the end."""
    sequence_length: int = 8192
    """Tokens per row there; a step has as many tokens as before, so fewer rows."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise TrainError(f"the extension's share is {self.share}, but must be between 0 and 1")


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
    data: DataConfig = field(default_factory=DataConfig)
    rows: int = 8
    """Rows per step; tokens per step = rows * sequence_length."""
    micro_rows: int | None = None
    """Rows per forward and backward of a process (all its rows at once if None); fewer need less
    memory."""
    sequence_length: int = 512
    """Tokens per row."""
    extension: Extension | None = None
    """Longer rows at the end."""
    seed: int = 0
    """Decides the order of the data, and the initial weights where a recipe makes them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: weights stay float32, activations are computed in bfloat16 where that is safe."""
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    z_loss: float = 0.0
    """Adds so much times the squared log of the softmax's denominator to the loss (1e-4 is usual)."""
    recompute: bool = False
    """Compute activations again in backward instead of keeping them: less memory, a third slower."""
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
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in the folder; never: refuse a folder with one."""
    most_skips: int = 10
    """Steps in a row with non-finite gradients after which the run stops."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "rows": 1, "micro_rows": 1, "sequence_length": 1, "log_every": 1}
        for name, smallest in (least | {"keep": 1, "most_skips": 1, "copies": 1}).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise TrainError(f"{name} is {value}, but must be {smallest} or more")
        for name in ("held_out_every", "save_every", "z_loss"):
            if not getattr(self, name) >= 0:
                raise TrainError(f"{name} is {getattr(self, name)}, but must be 0 or more")
        if self.precision not in ("float32", "bfloat16"):
            raise TrainError(f"precision {self.precision!r} is unknown: use float32 or bfloat16")
        if self.resume not in ("auto", "never"):
            raise TrainError(f"resume {self.resume!r} is unknown: use auto or never")
        self._check_extension()

    def _check_extension(self) -> None:
        if self.extension is None:
            return
        longer = self.extension.sequence_length
        if longer <= self.sequence_length or self.tokens % longer:
            raise TrainError(
                f"the extension's rows of {longer} tokens must be longer than {self.sequence_length}"
                f" and divide a step of {self.tokens} tokens"
            )

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.rows * self.sequence_length
