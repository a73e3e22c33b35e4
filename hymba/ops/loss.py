"""Cross-entropy straight from hidden states, in chunks of rows.

The logits of N rows and V words are the largest tensor of a small model (8192 x 32001 floats are
1 GB), so they are made for a few rows at a time, turned into gradients at once and dropped:
nothing of size N x V is kept for backward. The gradients are right because a sum of losses enters
everything after it linearly: backward only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # logits made at a time


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N) with -100 left out -> the sum of losses in nats."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As `linear_cross_entropy_reference`, never holding (N, V)."""
    return _LinearCrossEntropy.apply(hidden, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, goal = hidden[start : start + rows], labels[start : start + rows]
            logits = (part @ weight.T).to(wide)
            total += F.cross_entropy(logits, goal, ignore_index=IGNORE, reduction="sum")
            if not (want_hidden or want_weight):
                continue
            dlogits = _softmax_minus_one_hot(logits, goal).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[start : start + rows])
            if dweight is not None:
                dweight += dlogits.T @ part
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy can be differentiated once, not twice")
        dhidden, dweight = ctx.saved_tensors
        scale = grads[0]
        if dhidden is not None:
            dhidden = (dhidden * scale).to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * scale).to(ctx.weight_dtype)
        return dhidden, dweight, None


def _softmax_minus_one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """d loss / d logits; rows that do not count give zeros. Overwrites the logits."""
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    counts = labels != IGNORE
    rows = counts.nonzero().squeeze(1)
    probabilities[rows, labels[rows]] -= 1
    return probabilities.mul_(counts[:, None])
