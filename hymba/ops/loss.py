"""Cross-entropy straight from hidden states, in chunks of rows.

The logits of N rows and V words are the largest tensor of a small model (8192 x 32001 floats are
1 GB), so they are made for a few rows at a time, turned into gradients at once and dropped:
nothing of size N x V is kept for backward. The gradients are right because a sum of losses enters
everything after it linearly: backward only scales them.

With `z_loss` every label that counts costs z_loss * lse^2 more, where lse is the logarithm of the
sum of its row's exponentiated logits. Cross-entropy does not see a number added to all logits of a
row; this keeps it near 0, where low precision is finest (PaLM, arXiv 2204.02311: 1e-4).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # logits made at a time


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N) with -100 left out -> the sum of losses in nats."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        total = total + z_loss * logits[labels != IGNORE].logsumexp(-1).square().sum()
    return total


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> Tensor:
    """As `linear_cross_entropy_reference`, never holding (N, V)."""
    return _LinearCrossEntropy.apply(hidden, weight, labels, z_loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        read = weight.to(hidden.dtype)  # under autocast the weight is wider
        for start in range(0, hidden.shape[0], rows):
            part, goal = hidden[start : start + rows], labels[start : start + rows]
            logits = (part @ read.T).to(wide)
            total += F.cross_entropy(logits, goal, ignore_index=IGNORE, reduction="sum")
            lse = logits.logsumexp(-1).where(goal != IGNORE, 0) if z_loss else None
            if lse is not None:
                total += z_loss * lse.square().sum()
            if not (want_hidden or want_weight):
                continue
            scale = None if lse is None else 1 + 2 * z_loss * lse  # d(lse) is the softmax
            dlogits = _softmax_minus_one_hot(logits, goal, scale).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, read, out=dhidden[start : start + rows])
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
        return dhidden, dweight, None, None


def _softmax_minus_one_hot(logits: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
    """d loss / d logits; rows that do not count give zeros. Overwrites the logits.

    `scale` (N,) multiplies the softmax alone."""
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    if scale is not None:
        probabilities *= scale[:, None]
    counts = labels != IGNORE
    rows = counts.nonzero().squeeze(1)
    probabilities[rows, labels[rows]] -= 1
    return probabilities.mul_(counts[:, None])
