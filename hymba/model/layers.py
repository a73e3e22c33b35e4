"""The small parts every layer is made of: RMSNorm, rotary positions, the gated MLP, meta tokens,
scalars of branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba import ops
from hymba.model.packed import PackedLinear
from hymba.ops import Packed
from hymba.ops.packed import TILE


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class MetaTokens(nn.Module):
    """Learned embeddings (M, D) in front of every sequence (paper eq. 4). A module of its own, so
    that fine-tuning libraries which save modules can save it."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))

    def forward(self) -> Tensor:
        return self.weight


class Scales(nn.Module):
    """A learned scalar for each branch of a hybrid layer, 1 at first: attention's, the SSM's. A
    module for the same reason."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, attention: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.weight.unbind()
        return alpha * attention, beta * ssm


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(relu(up(x))^2) without a gate."""

    def __init__(self, size: int, width: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False) if activation == "silu" else None
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., width), before the way down."""
        if self.gate_proj is None:
            return F.relu(self.up_proj(x)).square()
        return ops.swiglu(self.gate_proj(x), self.up_proj(x))

    @torch.no_grad()
    def pack(self) -> Tensor | Packed | None:
        """Lay the weights of gate and up one behind the other in memory: they stay what they are,
        and one product can read both. -> both (2 width, D), None without a gate."""
        if self.gate_proj is None:
            return None
        if isinstance(self.gate_proj, PackedLinear):
            return self._pack_tiles(self.gate_proj, self.up_proj)
        gate, up = self.gate_proj.weight, self.up_proj.weight
        both = torch.cat([gate, up])
        gate.data, up.data = both.chunk(2)
        return both

    @staticmethod
    def _pack_tiles(gate: PackedLinear, up: nn.Module) -> Packed | None:
        """None where the first matrix' rows do not end with a tile."""
        if not isinstance(up, PackedLinear) or up.scheme != gate.scheme or gate.rows % TILE:
            return None
        both = torch.cat([gate.tiles, up.tiles])
        gate.tiles.data, up.tiles.data = both.chunk(2)
        return Packed(both, 2 * gate.rows, gate.columns, gate.scheme)


def rope_tables(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, width / 2), float32 as in the released code."""
    pair = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None].float() * base ** -(pair / width)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + width/2) of x (N, heads, width) by their position's angles."""
    return ops.rotate(x, *tables)
