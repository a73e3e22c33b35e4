"""Muon: a matrix moves by the orthogonal matrix nearest to its gradient's running mean.

Of a gradient U S V^T, whose few large singular values would decide everything, only U V^T is
kept: every direction that the batch speaks of moves alike (Jordan et al. 2024). Steps are scaled
to the size that AdamW's usually have, 0.2 an element, so that AdamW's learning rate and weight
decay serve both (Liu et al. 2025, arXiv 2502.16982).

torch.optim.Muon is the same for one whole matrix, and the tests compare with it. Here are two
things that it has not. A weight in which several projections lie one behind the other is
orthogonalised part by part: as one matrix the parts would share out the directions between them.
(Moonlight's authors found parts better; Megatron-LM splits too, some split attention's heads as
well.) And a parameter sharded by FSDP2 is gathered for the moment, so that its step is the one it
would take in one process; means stay sharded. All processes then compute the same,
5 * (4 m m n + 2 m m m) operations for a part of m x n, m <= n: 55 TFLOP for hymba-1.5b, what
forward and backward take for 6,000 tokens. Where steps have not many times as many, the matrices
would have to be shared out between the processes, which is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Parts = Mapping[Tensor, Sequence[int]]
# Five steps bring singular values of 0.01 to 1 near 1 (0.7 to 1.2) rather than few of them to
# exactly 1: the coefficients of a x + b x^3 + c x^5 are Jordan's.
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
ADAMWS_SIZE = 0.2  # an element's root mean square step over the learning rate, as measured by Liu


class Muon(torch.optim.Optimizer):
    """`params`: matrices, or groups of them. `parts`: rows of the parts of those that have some."""

    def __init__(
        self, params: Any, parts: Parts | None = None, lr: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.parts = dict(parts or {})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon moves matrices, not tensors of shape {tuple(p.shape)}")
                if p in self.parts and sum(self.parts[p]) != len(p):
                    raise ValueError(f"parts {self.parts[p]} are not the {len(p)} rows of a matrix")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[p], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        ahead = grad.lerp(mean, momentum)  # Nesterov's: the mean as if the gradient came again
        direction = _sharded_as(p, _each_part(_whole(ahead), self.parts.get(p)))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction.to(p.dtype), alpha=-group["lr"])


def _each_part(update: Tensor, rows: Sequence[int] | None) -> Tensor:
    """(F, D) -> (F, D), a step of learning rate 1."""
    parts = [update] if rows is None else update.split(list(rows))
    scaled = [ADAMWS_SIZE * math.sqrt(max(x.shape)) * orthogonal(x) for x in parts]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def orthogonal(x: Tensor) -> Tensor:
    """x (F, D) = U S V^T -> about U V^T, by Newton and Schulz' iteration: products alone.

    In bfloat16 on a GPU, where its rounding is far below what five steps leave; float32 elsewhere.
    Zeros stay zeros."""
    a, b, c = COEFFICIENTS
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y.T if len(x) > x.shape[1] else y  # (m, n), m <= n
    y = y / y.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(STEPS):
        gram = y @ y.T  # (m, m)
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if len(x) > x.shape[1] else y


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    """The shard of `whole`, which every process has, that belongs to the parameter `like`."""
    if not isinstance(like, DTensor):
        return whole
    # No rank is the source: nothing is sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
