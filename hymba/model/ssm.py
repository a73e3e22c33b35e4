"""The SSM heads: Mamba-1 over all channels, with norms on dt, B and C as in the released model.

Letters: N rows, E inner channels, n states a channel, R rank of dt, K taps.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from hymba import ops
from hymba.cache import Held
from hymba.config import Config
from hymba.model.layers import RMSNorm
from hymba.model.packed import PackedLinear
from hymba.ops import Packed, Segments
from hymba.ops.packed import dequantize


class DepthwiseConv(nn.Module):
    """Weights of the causal convolution, shaped as the checkpoint has them."""

    def __init__(self, channels: int, taps: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class SSM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        inner, rank, states = config.inner_size, config.ssm_dt_rank, config.ssm_state
        self.conv = DepthwiseConv(inner, config.ssm_conv, config.ssm_conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_norm = RMSNorm(rank, config.norm_eps)
        self.B_norm = RMSNorm(states, config.norm_eps)
        self.C_norm = RMSNorm(states, config.norm_eps)
        # Its bias is a parameter of its own: it is added in the scan, in the scan's wide dtype,
        # and the projection is called as a module, because an adapter may stand in its place.
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(
        self,
        u: Tensor,
        gate: Tensor,
        segments: Segments,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        A: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u, gate (N, E) -> y (N, E), and what is left: conv (S, K-1, E), ssm (S, E, n).

        The states before the rows are (S or 1, ...); None means zeros. A (E, n) is `rates`."""
        u, conv_left = ops.causal_conv(
            u, self.conv.weight.squeeze(1), self.conv.bias, segments, conv_state
        )
        dt, B, C = ops.rms_norms(self.x_proj(u), self._norms(), self.dt_norm.eps)
        y, ssm_left = ops.selective_scan(
            u=u,
            dt=self.dt_proj(dt),
            A=A,
            B=B,
            C=C,
            D=self.D,
            z=gate,
            dt_bias=self.dt_bias,
            segments=segments,
            initial_state=ssm_state,
        )
        return y, conv_left, ssm_left

    def step(self, u: Tensor, gate: Tensor, now: Held) -> Tensor:
        """`forward` for one row each, u, gate (S, E), with states updated where they lie."""
        assert now.conv is not None and now.ssm is not None and now.slots is not None
        conv, slots = self.conv, now.slots
        A = self.rates(u.dtype) if now.A is None else now.A
        u = ops.conv_step(u, conv.weight.squeeze(1), conv.bias, now.conv, slots)
        low, norms, eps = self._low(u), self._norms(), self.dt_norm.eps
        weight = self.dt_proj.weight if is_matrix(self.dt_proj) else now.dt
        if weight is not None:
            return ops.ssm_step(
                u, low, weight, self.dt_bias, *norms, A, self.D, gate, now.ssm, slots, eps
            )
        step, B, C = ops.rms_norms(low, norms, eps)
        dt = self.dt_proj(step)
        return ops.state_step(u, dt, A, B, C, self.D, gate, self.dt_bias, now.ssm, slots)

    def _low(self, u: Tensor) -> Tensor:
        """x_proj of a step's rows: few outputs, for which a library's products are slow."""
        if not is_matrix(self.x_proj):
            return self.x_proj(u)
        product = ops.linear if len(u) <= ops.THIN_ROWS else ops.narrow_linear
        return product(u, self.x_proj.weight)

    def _norms(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_norm.weight, self.B_norm.weight, self.C_norm.weight

    def wide_dt(self, dtype: torch.dtype) -> Tensor | None:
        """The weight (E, R) of dt_proj written out, if it is kept in few bits (`Held.dt`)."""
        return dequantize(self.dt_proj.packed, dtype) if is_packed(self.dt_proj) else None

    def rates(self, dtype: torch.dtype) -> Tensor:
        """A (E, n), wide."""
        return -torch.exp(self.A_log.to(torch.promote_types(dtype, torch.float32)))


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class' forward and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def is_matrix(linear: nn.Module) -> bool:
    """Whether a projection is its weight and nothing more: no adapter, hook or packed weight."""
    weight = getattr(linear, "weight", None)
    return type(linear) is nn.Linear and type(weight) is nn.Parameter and is_plain(linear)


def is_packed(linear: nn.Module) -> TypeGuard[PackedLinear]:
    """Whether a projection is a matrix in few bits and nothing more."""
    return type(linear) is PackedLinear and is_plain(linear)


def matrix_of(linear: nn.Module) -> Packed:
    """The matrix of a projection that `is_packed`."""
    assert isinstance(linear, PackedLinear)
    return linear.packed
