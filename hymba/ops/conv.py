"""Causal depthwise convolution and SiLU over segments.

    out[t] = silu(bias + sum_j weight[j] x[t - K + 1 + j])

What lies left of a segment's first row is its initial state: the last K - 1 inputs before it
(zeros for none). Letters: N rows, S segments, E channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.segments import Segments


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, E), weight (E, K), bias (E), initial_state (S or 1, K-1, E).

    Returns out (N, E) and the last K-1 inputs of each segment (S, K-1, E)."""
    state = _states(x, weight, segments, initial_state)
    outs, final = [], []
    for index, (start, length) in enumerate(segments):
        row = torch.cat([state[index], x[start : start + length]])  # (K-1+T, E)
        windows = row.unfold(0, weight.shape[1], 1)  # (T, E, K)
        out = (windows * weight).sum(-1)
        outs.append(F.silu(out if bias is None else out + bias))
        final.append(row[length:])
    return torch.cat(outs), torch.stack(final)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `causal_conv_reference`: K shifted multiply-adds over all rows at once."""
    state, taps = _states(x, weight, segments, initial_state), weight.shape[1]
    if segments.uniform:
        rows = x.view(segments.count, segments.uniform, -1)
        rows = torch.cat([state, rows], dim=1)  # (S, K-1+T, E)
        out = _slide(rows, weight, bias).flatten(0, 1)
        return out, rows[:, segments.uniform :]
    pieces = x.split(segments.lengths)
    rows = torch.cat([part for pair in zip(state, pieces, strict=True) for part in pair])
    out = _slide(rows[None], weight, bias)[0]
    # The rows between segments mix two of them: cut those out.
    keep = [start + index * (taps - 1) for index, start in enumerate(segments.starts)]
    spans = list(zip(keep, segments.lengths, strict=True))
    out = torch.cat([out[start : start + length] for start, length in spans])
    return out, torch.stack([rows[start + length :][: taps - 1] for start, length in spans])


def _slide(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows (S, K-1+T, E) -> (S, T, E), added up in a wide dtype."""
    dtype, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
    rows, weight = rows.to(wide), weight.to(wide)
    length = rows.shape[1] - weight.shape[1] + 1
    out = rows[:, :length] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        out = torch.addcmul(out, rows[:, tap : tap + length], weight[:, tap])
    return F.silu(out if bias is None else out + bias.to(wide)).to(dtype)


def _states(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Tensor:
    shape = (segments.count, weight.shape[1] - 1, x.shape[1])
    if state is None:
        return x.new_zeros(shape)
    return state.to(x.dtype).expand(shape)
