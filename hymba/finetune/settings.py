"""What decides a fine-tuning: one frozen dataclass, which the command line reads too. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hymba.errors import UserError

Objective = Literal["sft", "dpo"]
Method = Literal["full", "lora", "dora"]
Precision = Literal["float32", "bfloat16"]

# The paper's section 3.4: full fine-tuning with 5e-5, DPO with 3e-6, one epoch, cosine. Adapters
# begin at zero and move a product of two matrices: ten times the rate is the usual start.
LEARNING_RATE = {"sft": 5e-5, "dpo": 3e-6}
FOR_ADAPTERS = 10

# Settings that change what a run prints, keeps or waits for, but not what comes out of it.
FREE = ("out", "save_every", "log_every", "device", "threads", "fresh", "micro_rows")


class FinetuneError(UserError):
    """A fine-tuning that cannot be done as asked; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """Fine-tune a model on chats or preferences: TRL and PEFT, from a JSONL to a model folder."""

    model: str
    """A model folder or a hub id."""
    data: tuple[Path, ...] = ()
    """JSONL files of {"messages"}, {"prompt", "completion"} or {"prompt", "chosen", "rejected"}."""
    out: Path | None = None
    """Where the result goes; an interrupted run goes on from here."""
    method: Method = "full"
    """Train every weight, or an adapter (LoRA, DoRA) that is merged in at the end and kept too."""
    objective: Objective | None = None
    """sft learns the answers, dpo to prefer; without it the lines decide."""
    epochs: float = 1.0
    """How often the data is seen."""
    lr: float | None = None
    """Peak learning rate, cosine to zero (sft 5e-5, dpo 3e-6, ten times that for adapters)."""
    rows: int = 32
    """Chats, pairs or packs a step, over all processes."""
    micro_rows: int = 4
    """Of those in one forward: the less, the less memory."""
    max_length: int = 2048
    """Tokens of a line at most, longer ones are left out; the length of a pack too."""
    packing: bool = False
    """Put several chats in a row, kept apart from each other (sft)."""
    rank: int = 16
    """Rank of an adapter."""
    alpha: int = 32
    """Scale of an adapter: its product counts alpha / rank times."""
    beta: float = 0.1
    """How closely dpo stays at the model it starts from: more is closer."""
    held_out: str = ""
    """A JSONL file, or a share of the data such as 5%, that is never trained on."""
    held_out_every: int = 0
    """Steps between looks at it (0: before the first step and after the last)."""
    precision: Precision | None = None
    """Of the arithmetic (bfloat16 on GPUs, float32 elsewhere); trained weights stay float32."""
    checkpoint_blocks: bool = False
    """Compute each block again in the backward pass: less memory, a third more time."""
    seed: int = 0
    """Order of the data and an adapter's first values."""
    save_every: int = 0
    """Steps between checkpoints (0: ten in a run)."""
    log_every: int = 0
    """Steps between lines on the screen (0: a hundred lines in a run); the file has every step."""
    device: Literal["cpu", "cuda"] | None = None
    """Without it a GPU where there is one."""
    threads: int = 0
    """CPU threads (0: half the cores)."""
    fresh: bool = False
    """Start anew even if the folder holds a fine-tuning."""

    def check(self) -> None:
        """Raise FinetuneError, one line, for what no run can be."""
        if not self.data:
            raise FinetuneError("name the data: --data chats.jsonl")
        if self.out is None:
            raise FinetuneError("name the folder of the result: --out runs/mine")
        for name in ("rows", "micro_rows", "rank", "alpha"):
            _need(getattr(self, name) >= 1, name, "must be 1 or more")
        for name in ("held_out_every", "save_every", "log_every", "threads", "seed"):
            _need(getattr(self, name) >= 0, name, "must be 0 or more")
        _need(self.seed < 2**32, "seed", "must be below 2**32")
        _need(self.max_length >= 8, "max_length", "must be 8 or more")
        for name in ("epochs", "beta"):
            _need(0 < getattr(self, name) < 1e6, name, "must be above 0")
        _need(self.lr is None or 0 < self.lr < 1, "lr", "must be between 0 and 1")

    def rate(self, objective: str) -> float:
        """The peak learning rate of a run with this objective."""
        if self.lr is not None:
            return self.lr
        return LEARNING_RATE[objective] * (1 if self.method == "full" else FOR_ADAPTERS)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        content = asdict(self)
        content["data"] = [str(path) for path in self.data]
        content["out"] = str(self.out)
        return content

    def deciding(self) -> dict[str, Any]:
        """What must stay the same for a run to go on (files are known by their content)."""
        left_out = {*FREE, "model", "data", "held_out"}
        names = (field.name for field in fields(self) if field.name not in left_out)
        return {name: getattr(self, name) for name in names}


def _need(true: bool, name: str, what: str) -> None:
    if not true:
        raise FinetuneError(f"--{name.replace('_', '-')} {what}")
