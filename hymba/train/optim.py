"""What turns gradients into steps: AdamW's groups, the learning rate, clipping.

Nothing here keeps state of its own: groups are read off the parameters' names and shapes, the
learning rate is a function of the step alone (so a resumed run needs no scheduler state).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hymba.errors import UserError


class OptimError(UserError):
    """Settings of the optimiser or schedule that make no sense; the message says which."""


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW. The paper states only the learning rate (schedule); the rest is the field's habit."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of gradient and squared gradient."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Shrinks matrices by this times the learning rate each step."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""


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
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise OptimError(
                f"warmup {self.warmup} and decay {self.decay} must be shares of the run that "
                "together are at most 1"
            )

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (0 is the first) of a run of `steps`.

        The first step has peak / warmup steps, the last one exactly peak * floor.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        falling = steps - rising if self.kind == "cosine" else round(self.decay * steps)
        done = step + 1 - (steps - falling)  # steps of the fall taken, counting this one
        if done <= 0:
            return self.peak
        progress = done / falling
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.floor + (1 - self.floor) * left)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay shrinks this parameter: matrices and convolution kernels, but not

    | undecayed | why |
    |---|---|
    | norms, biases, D (one dimension) | scales and offsets: zero is no natural resting place |
    | A_log | the state's time constants; 0 would mean one fixed forgetting rate (as in Mamba) |
    | meta tokens | inputs, learnt as such; the norm after them makes their size meaningless |
    | embeddings, tied or not | the same, and shrunken rows get larger gradients through that norm |
    """
    parts = name.split(".")
    return parameter.ndim >= 2 and not {"A_log", "meta_tokens", "embed_tokens"} & set(parts)


def adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters, fused (one pass over memory) where it exists.

    The learning rate is set before each step (`set_lr`).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise OptimError("the model has no trainable parameters")
    decayed = [p for name, p in named if decays(name, p)]
    others = [p for name, p in named if not decays(name, p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale the gradients so that their joint norm is at most `most`; return the norm before.

    The norm is inf or nan exactly when some gradient is; the gradients are of no use then.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), most)
    return float(norm)
