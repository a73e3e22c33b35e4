r"""The SSM seen as attention: which earlier tokens an output is made of, and how much of each.

One channel's recurrence is linear in its input u once dt, B and C are known (they come from the
text, not from the state):

    h_i = exp(A dt_i) h_{i-1} + dt_i B_i u_i                      n numbers, A (n) of the channel
    y_i = C_i . h_i + D u_i

Put the first line into itself, from the zeros before row 0 on:

    h_i = sum_{j <= i}  ( prod_{k=j+1..i} exp(A dt_k) )  dt_j B_j u_j

and what y_i takes from row j is a number, the paper's equation 2 (after Ali, Zimerman and Wolf
2024, "The Hidden Attention of Mamba Models", arXiv 2403.01590):

    alpha_ij = C_i . ( prod_{k=j+1..i} exp(A dt_k) ) B_j dt_j     0 for j > i
             = sum_n  C_in B_jn exp(A_n (s_i - s_j)) dt_j         s = cumulative sum of dt

so  y = alpha @ u + D u,  times silu(gate): tests/eval/test_probe_walk.py holds that to the model's
own scan. u is what leaves the convolution, which has mixed K neighbours already; rows are one
text's with the meta tokens in front, whose state is what the text starts from.

Unlike attention's, alpha has signs, no row adds up to 1, and each channel has its own matrix (for
which only s and A differ). As a share we take |alpha_ij| / sum_j |alpha_ij|. D, a way past the
state, and the gate, which scales whole rows, are no part of it.

s grows with the text and only differences are used, so s is summed in float64; exponents are never
positive (A < 0, s_i >= s_j). Memory: strips of rows, one state at a time, never (E, R, R, n).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.eval.probe import attention
from hymba.eval.probe.attention import Rows
from hymba.eval.probe.walk import Seen
from hymba.ops import Segments

LESS = 2  # strips are so many times smaller than attention's: more temporaries, none looks ahead


class Recurrence(NamedTuple):
    """What the scan of one layer is given, over R rows."""

    u: Tensor  # (R, E) behind the convolution
    dt: Tensor  # (R, E) behind softplus
    A: Tensor  # (E, n)
    B: Tensor  # (R, n)
    C: Tensor  # (R, n)
    D: Tensor  # (E)


@torch.no_grad()
def recurrence(seen: Seen) -> Recurrence:
    """Read with the layer's own modules; one text, so that its rows are one sequence."""
    ssm = seen.mixer.ssm
    assert ssm is not None and seen.u is not None
    rows = Segments((len(seen.u),))
    u, _ = ops.causal_conv(seen.u, ssm.conv.weight.squeeze(1), ssm.conv.bias, rows)
    norms = ssm.dt_norm.weight, ssm.B_norm.weight, ssm.C_norm.weight
    low, B, C = ops.rms_norms(ssm.x_proj(u), norms, ssm.dt_norm.eps)
    wide = torch.promote_types(u.dtype, torch.float32)
    dt = F.softplus(ssm.dt_proj(low).to(wide) + ssm.dt_bias.to(wide))
    return Recurrence(u.to(wide), dt, ssm.rates(u.dtype), B.to(wide), C.to(wide), ssm.D.to(wide))


def channels(total: int, most: int) -> Tensor:
    """Which channels are looked at: all, or `most` of them, evenly spread."""
    return torch.arange(total) if total <= most else torch.arange(most) * total // most


def alpha(r: Recurrence, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, alpha (c, T, R)) of the chosen channels, strip by strip, 0 for later rows."""
    total, chosen = len(r.u), chosen.to(r.u.device)
    dt, A = r.dt[:, chosen].T, r.A[chosen]  # (c, R), (c, n)
    s = dt.double().cumsum(-1)
    for first, end in attention.strips(total, LESS * len(chosen) * total):
        gone = (s[:, first:end, None] - s[:, None, :end]).clamp(min=0).to(dt.dtype)  # (c, T, end)
        found = torch.zeros_like(gone)
        for n in range(A.shape[1]):
            pairs = r.C[first:end, n, None] * r.B[None, :end, n]  # (T, end)
            found.addcmul_((gone * A[:, n, None, None]).exp_(), pairs)
        yield first, F.pad((found * dt[:, None, :end]).tril_(first), (0, total - end))


def hidden_rows(seen: Seen, chosen: Tensor) -> Iterator[Rows]:
    """|alpha|, each row adding up to 1: (c, T, R) strip by strip, a channel in place of a head."""
    for first, found in alpha(recurrence(seen), chosen):
        found = found.abs_()
        yield Rows(first, found / found.sum(-1, keepdim=True).clamp(min=1e-30))
