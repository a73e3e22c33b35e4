"""The decode step of a layer's branches, in place: one new token a row, states kept by slot.

A cache holds the states of many sequences, one a *slot*; a step reads and writes those of its rows
where they lie, without gathering them. `slots` (S,) is a device tensor, so that a captured CUDA
graph can serve other sequences next time; no slot may be in it twice. No gradients: this is decode.
Letters: S rows, E channels, K taps, n states a channel, R rank of dt; H and G query and K/V heads,
h and e their widths, P places of a K/V store.

Each of these is the obvious form of itself; see `step_triton` for kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.norm import rms_norm
from hymba.ops.rotary import rotate
from hymba.ops.scan import scan_step


@torch.no_grad()
def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """x (S, E), weight (E, K), bias (E) -> silu(conv) (S, E), as `causal_conv` over rows of length
    1; state (slots, K-1, E), the inputs before x, moves on by one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    before = state.index_select(0, slots)  # on a CPU a quarter of the time of state[slots]
    rows = torch.cat([before.to(x.dtype), x[:, None]], dim=1)  # (S, K, E)
    out = (rows.to(wide) * weight.T.to(wide)).sum(1)
    state[slots] = rows[:, 1:].to(state.dtype)
    return F.silu(out if bias is None else out + bias.to(wide)).to(x.dtype)


@torch.no_grad()
def state_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """u, dt, z (S, E); A (E, n); B, C (S, n); D, dt_bias (E) -> y (S, E), as `selective_scan` over
    rows of length 1; state (slots, E, n) is brought up to date."""
    y, left = scan_step(u, dt, A, B, C, D, z, dt_bias, state.index_select(0, slots))
    state[slots] = left.to(state.dtype)
    return y


@torch.no_grad()
def ssm_step(
    u: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    dt_norm: Tensor,
    B_norm: Tensor,
    C_norm: Tensor,
    A: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """`state_step` from what x_proj gives: low (S, R + 2n) is dt, B and C before their norms, whose
    weights are dt_norm (R), B_norm and C_norm (n); dt_weight (E, R) brings dt to the channels."""
    rank, states = dt_weight.shape[1], A.shape[1]
    dt, B, C = low.split([rank, states, states], dim=-1)
    dt = F.linear(rms_norm(dt, dt_norm, eps), dt_weight)
    B, C = rms_norm(B, B_norm, eps), rms_norm(C, C_norm, eps)
    return state_step(u, dt, A, B, C, D, z, dt_bias, state, slots)


@torch.no_grad()
def rope_and_store(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    store_k: Tensor | None,
    store_v: Tensor | None,
    slots: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """q (S, H, h) and k (S, G, h) with their pairs (i, i + h/2) turned by cos, sin (S, 1, h/2).

    The turned k and v (S, G, e) go to place `places[i]` (S,) of slot `slots[i]` in store_k
    (slots, G, P, h) and store_v (slots, G, P, e). A layer that uses another's K/V gives only q."""
    if k is None or v is None or store_k is None or store_v is None:
        return rotate(q, cos, sin), None
    k = rotate(k, cos, sin)
    store_k[slots, :, places] = k.to(store_k.dtype)
    store_v[slots, :, places] = v.to(store_v.dtype)
    return rotate(q, cos, sin), k
