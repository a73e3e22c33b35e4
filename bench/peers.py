"""What our kernels are held against, in the same run: FlexAttention, SDPA, plain PyTorch of our
own, and the released model's stack. (mamba-ssm's scan is in bench/mamba.py.)

Peers get their inputs in the layout they like best, made before the clock starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.ops import Meta, Past, Segments
from hymba.ops.backend import FILES

DEVICE = "cuda"


class Missing(Exception):
    """There is no such op, so there is nothing to measure."""


class Peer(NamedTuple):
    """One way to compute what a case computes."""

    forward: Callable[..., Any]  # of `inputs`, in order
    inputs: list[Tensor]
    ours: Callable[[Any], Tensor] | None = None  # its first output, laid out as our op's
    same: Callable[[], Any] | None = None  # our op asked the same, where it is not the case itself


# Plain PyTorch of our own


@cache
def plain(name: str) -> Callable[..., Any]:
    """The twin of an op that needs no kernel."""
    if name not in FILES:
        raise Missing(f"hymba.ops has no {name} yet")
    return getattr(importlib.import_module(f"hymba.ops.{FILES[name]}"), name)


def op(name: str) -> Callable[..., Any]:
    """An op of the door, as it is now: `replaced` may have put another there."""
    if name not in FILES:
        raise Missing(f"hymba.ops has no {name} yet")
    return getattr(ops, name)


# Attention. Letters: S segments of T rows, H and G heads, h and e widths, M meta keys.


class Shape(NamedTuple):
    """Which keys the rows of equal segments see; keys are meta, then past in order, then new."""

    count: int  # S
    rows: int  # T
    meta: int = 0  # M
    window: int | None = None
    past: int = 0  # text keys before the rows that are held

    def seen(self) -> int:
        """(query, key) pairs of one segment and head."""
        rows = range(self.past + 1, self.past + self.rows + 1)
        reach = self.past + self.rows if self.window is None else self.window + 1
        return sum(min(row, reach) for row in rows) + self.rows * self.meta


def keyed(x: Tensor, meta: Tensor | None, past: Tensor | None, count: int) -> Tensor:
    """Keys or values of all places: x (N, G, w) -> (S, G, M + P + T, w)."""
    parts = [x.unflatten(0, (count, -1)).transpose(1, 2)]
    if past is not None:
        parts.insert(0, past)
    if meta is not None:
        parts.insert(0, meta.transpose(0, 1).expand(count, -1, -1, -1))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def headed(q: Tensor, count: int) -> Tensor:
    """(N, H, h) -> (S, H, T, h), not copied."""
    return q.unflatten(0, (count, -1)).transpose(1, 2)


def flat(out: Tensor) -> Tensor:
    """(S, H, T, e) -> (N, H, e)."""
    return out.transpose(1, 2).flatten(0, 1)


@cache
def _compiled_flex() -> Any:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one compilation a mask and size
    torch._dynamo.config.accumulated_recompile_limit = 512
    return torch.compile(flex_attention, dynamic=False)


@cache
def block_mask(shape: Shape) -> Any:
    """The same mask for FlexAttention, as blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    meta, window, past = shape.meta, shape.window, shape.past

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = row + past - (key - meta)
        near = distance >= 0
        if window is not None:
            near = near & (distance <= window)
        return near | (key < meta)

    keys = meta + past + shape.rows
    return create_block_mask(sees, None, None, shape.rows, keys, device=DEVICE)


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """q (S, H, T, h), k (S, G, keys, h), v (S, G, keys, e) -> (S, H, T, e)."""
    return _compiled_flex()(q, k, v, block_mask=block_mask(shape), enable_gqa=True)


def dense_mask(shape: Shape) -> Tensor:
    """(T, keys), true where seen."""
    row = torch.arange(shape.past, shape.past + shape.rows, device=DEVICE)[:, None]
    key = torch.arange(shape.past + shape.rows, device=DEVICE)
    seen = key <= row
    if shape.window is not None:
        seen = seen & (row - key <= shape.window)
    return F.pad(seen, (shape.meta, 0), value=True)


def attention_peers(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, meta: Meta | None, past: Past | None
) -> dict[str, Callable[[], Peer]]:
    """FlexAttention, and SDPA with the mask or its own causal one. Past places must be in order."""
    count = shape.count

    def inputs(repeat: int) -> list[Tensor]:
        old = (None, None) if past is None else (past.k, past.v)
        first = (None, None) if meta is None else (meta.k, meta.v)
        keys = [keyed(x, m, p, count) for x, m, p in zip((k, v), first, old, strict=True)]
        keys = [x.repeat_interleave(repeat, dim=1).contiguous() for x in keys]
        return [headed(q, count).contiguous(), *keys]

    def by_flex() -> Peer:
        return Peer(lambda *x: flex(*x, shape), inputs(1), flat)

    def by_sdpa() -> Peer:
        """Its fused kernels want every head's keys, so they are repeated beforehand."""
        square = not (shape.meta or shape.past or shape.window)
        mask = None if square else dense_mask(shape)

        def run(*x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=square)

        return Peer(run, inputs(q.shape[1] // k.shape[1]), flat)

    return {"flex": by_flex, "sdpa": by_sdpa}


# The released stack


def flex_door() -> Callable[..., Tensor]:
    """An `ops.attention` on compiled FlexAttention, for equal segments without a past; what else
    there is (the meta tokens' own rows) runs in plain PyTorch."""
    other = plain("attention")

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        window: int | None = None,
        meta: Meta | None = None,
        past: Past | None = None,
    ) -> Tensor:
        if past is not None or segments.uniform is None or segments.total < 1024:
            return other(q, k, v, segments, window, meta, past)
        first = (None, None) if meta is None else (meta.k, meta.v)
        count, places = segments.count, 0 if meta is None else meta.k.shape[0]
        keys, values = (
            keyed(x, m, None, count).contiguous() for x, m in zip((k, v), first, strict=True)
        )
        shape = Shape(count, segments.uniform, places, window)
        return flat(flex(headed(q, count), keys, values, shape))

    return attention


def released(kernels: Any, elementwise: bool = True) -> dict[str, Callable[..., Any]]:
    """Doors as near the released model's stack as mamba-ssm alone gets: its scan, FlexAttention,
    and plain PyTorch for the rest, where the released code also has causal-conv1d (with
    elementwise=False: for nothing else, so that only those two differ)."""
    from bench.mamba import door

    doors = {name: plain(name) for name in FILES if elementwise}
    doors["attention"] = torch.compiler.disable(flex_door())
    doors["selective_scan"] = torch.compiler.disable(door(kernels))
    return doors


@contextmanager
def replaced(doors: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """These functions in place of the ops of the same names, until the end of the block."""
    before = {name: getattr(ops, name) for name in doors}
    try:
        for name, function in doors.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)
