# mypy: allow-untyped-defs, allow-incomplete-defs
"""Linear + cross-entropy: matrix products by cuBLAS, and one kernel between them.

What bounds it: the three matrix products of N x V x D, 6 N V D FLOP. Between them logits become
gradients in place, by a kernel that reads them twice, the second time from the L2 cache, and
writes them once. How far from it, on an H200: 75 % of the rate of a large product.

The products are several times slower where V is no multiple of 8, as 32001 is not: so the weight is
padded with rows of zeros, once a call, and the kernel sees to it that their logits count for
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.backend import cdiv, launch, operator
from hymba.ops.loss import IGNORE

CHUNK_ROWS = 4096
PADDING = 64  # V is rounded up to a multiple of it
BLOCK, WARPS = 4096, 8  # words at a time
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cross_entropy_kernel(
    logits, labels, losses, V, width, IGNORE: tl.constexpr, Z_LOSS: tl.constexpr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row by row: logits to softmax - onehot (nothing, where the label does not count). A row is
    `width` numbers, a multiple of 16, so that loads are wide; those behind V become 0. Z_LOSS is
    one number in a run, and without it nothing is computed for it."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    word = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(losses + row, 0.0)
        if GRAD:
            nothing = tl.zeros((BLOCK,), tl.float32)
            for at in range(0, width, BLOCK):
                tl.store(logits + at + word, nothing, mask=at + word < width)
    else:
        # No such word: the loss becomes NaN. (To stop would be to wait for the device.)
        there = (label >= 0) & (label < V)
        goal = tl.load(logits + label, mask=there, other=float("nan")).to(tl.float32) * LOG2E
        most = tl.where(there, goal, 0.0)  # the running maximum, from a number that is there
        total = 0.0
        for at in range(0, width, BLOCK):
            x = tl.load(logits + at + word, mask=at + word < width).to(tl.float32) * LOG2E
            x = tl.where(at + word < V, x, float("-inf"))
            new = tl.maximum(most, tl.max(x, 0))
            total = total * tl.exp2(most - new) + tl.sum(tl.exp2(x - new), 0)
            most = new
        log_sum = most + tl.log2(total)
        loss = (log_sum - goal) / LOG2E
        if Z_LOSS != 0.0:
            lse = log_sum / LOG2E
            loss += Z_LOSS * lse * lse
        tl.store(losses + row, loss)
        if GRAD:
            tl.debug_barrier()  # every thread has read its goal before it is overwritten
            for at in range(0, width, BLOCK):
                x = tl.load(logits + at + word, mask=at + word < width).to(tl.float32) * LOG2E
                p = tl.exp2(x - log_sum)
                if Z_LOSS != 0.0:
                    p *= 1.0 + 2.0 * Z_LOSS * (log_sum / LOG2E)
                p -= tl.where(at + word == label, 1.0, 0.0)
                p = tl.where(at + word < V, p, 0.0)
                tl.store(logits + at + word, p, mask=at + word < width)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N) with -100 left out -> the sum of losses in nats."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    track = torch.is_grad_enabled()
    want = track and hidden.requires_grad, track and weight.requires_grad
    return _linear_cross_entropy(hidden, weight, labels, z_loss, *want)[0]


@operator("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients where wanted (empty otherwise), as gradients are made at once.

    The weight's gradient is float32 and has the padding's rows."""
    (N, _), V = hidden.shape, weight.shape[0]
    loss, dhidden, dweight = _like(hidden, weight, labels, z_loss, want_hidden, want_weight)
    if not N:
        return loss.zero_(), dhidden, dweight.zero_()
    losses = hidden.new_empty(N, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = _pad(weight)
        buffer = hidden.new_empty(min(N, CHUNK_ROWS), weight.shape[0])
        for start in range(0, N, CHUNK_ROWS):
            part = hidden[start : start + CHUNK_ROWS]
            logits = buffer[: len(part)]
            torch.mm(part, weight.T, out=logits)
            launch(
                _cross_entropy_kernel, (len(part),), logits, labels[start:].contiguous(),
                losses[start:], V, logits.shape[1], IGNORE=IGNORE, Z_LOSS=z_loss,
                GRAD=want_hidden or want_weight, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            if want_hidden:
                torch.mm(logits, weight, out=dhidden[start : start + CHUNK_ROWS])
            if want_weight:
                _add_product(dweight, logits.T, part, begin=start == 0)
    return losses.sum(), dhidden, dweight


def _padded(V: int) -> int:
    return cdiv(V, PADDING) * PADDING


def _pad(weight: Tensor) -> Tensor:
    V, D = weight.shape
    if _padded(V) == V:
        return weight
    padded = weight.new_empty(_padded(V), D)
    padded[:V] = weight
    padded[V:] = 0
    return padded


def _add_product(out: Tensor, a: Tensor, b: Tensor, begin: bool) -> None:
    """out (float32) = or += a @ b, with nothing rounded to the dtype of a and b."""
    wide = out.dtype
    if a.dtype == wide or not a.is_cuda:
        torch.addmm(out, a.to(wide), b.to(wide), beta=0 if begin else 1, out=out)
    elif begin:
        torch.mm(a, b, out_dtype=wide, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=wide, out=out)


@_linear_cross_entropy.register_fake
def _like(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    shape = (_padded(weight.shape[0]), weight.shape[1]) if want_weight else (0,)
    return loss, dhidden, weight.new_empty(shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, _, _, ctx.want_hidden, ctx.want_weight = inputs
    ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, scale: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy can be differentiated once, not twice")
    dhidden, dweight = ctx.saved_tensors
    dhidden = (dhidden * scale).to(dhidden.dtype) if ctx.want_hidden else None
    dweight = (dweight[: ctx.rows] * scale).to(ctx.dtype) if ctx.want_weight else None
    return dhidden, dweight, None, None, None, None


_linear_cross_entropy.register_autograd(_gradients, setup_context=_keep)
