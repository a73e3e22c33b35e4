"""The door to the numbers. Ops know nothing of models: tensors, segments and sizes only.

Every op here has a slow, obvious twin of the same signature (`..._reference`); `backend` picks
between them and faster ones, so nobody else asks what device it is on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hymba.ops.attention_step  # before the functions of these names, or they would replace them
import hymba.ops.swiglu  # noqa: F401
from hymba.ops.attention import Meta, Past
from hymba.ops.backend import twin, wants_grad
from hymba.ops.loss import IGNORE
from hymba.ops.packed import Packed, packed_linear_reference
from hymba.ops.segments import Segments, send
from hymba.ops.thin import MOST_ROWS as THIN_ROWS

__all__ = [
    "IGNORE",
    "Meta",
    "Packed",
    "Past",
    "Segments",
    "add_rms_norm",
    "attention",
    "attention_step",
    "causal_conv",
    "conv_step",
    "fuse_heads",
    "fuse_linear",
    "linear",
    "linear_add",
    "linear_cross_entropy",
    "narrow_linear",
    "norm_linear",
    "norm_swiglu",
    "packed_fuse_linear",
    "packed_linear",
    "packed_linear_add",
    "packed_norm_linear",
    "packed_norm_swiglu",
    "packed_rows",
    "rms_norm",
    "rms_norms",
    "rope_and_store",
    "rotate",
    "selective_scan",
    "send",
    "ssm_step",
    "state_step",
    "swiglu",
]


def _fit(op: str, **sizes: tuple[int, int]) -> None:
    """Sizes that must be equal. Kernels do not look: they would read beyond a tensor's end."""
    for name, (got, want) in sizes.items():
        if got != want:
            raise ValueError(f"{op}: {name} has size {got} where {want} is needed")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    meta: Meta | None = None,
    past: Past | None = None,
) -> Tensor:
    """q (N, H, h), k (N, G, h), v (N, G, e) -> (N, H, e); see hymba.ops.attention."""
    rows = q.shape[0]
    _fit("attention", segments=(segments.total, rows), k=(len(k), rows), v=(len(v), rows))
    op = twin("attention", q)
    return op(q, k, v, segments, window, meta, past)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, E), weight (E, K) -> silu(conv) (N, E), last inputs (S, K-1, E)."""
    rows, channels = x.shape
    _fit("causal_conv", segments=(segments.total, rows), weight=(len(weight), channels))
    op = twin("causal_conv", x)
    return op(x, weight, bias, segments, initial_state)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u, dt, z (N, E); A (E, n); B, C (N, n) -> y (N, E), states (S, E, n)."""
    rows = len(u)
    _fit("selective_scan", segments=(segments.total, rows), dt=(len(dt), rows), z=(len(z), rows))
    _fit("selective_scan", B=(len(B), rows), C=(len(C), rows), A=(len(A), u.shape[1]))
    op = twin("selective_scan", u)
    return op(u, dt, A, B, C, D, z, dt_bias, segments, initial_state)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N), -100 left out -> the sum of losses in nats, with
    z_loss * logsumexp(logits)^2 for each label."""
    rows, size = hidden.shape
    _fit("linear_cross_entropy", labels=(len(labels), rows), weight=(weight.shape[1], size))
    op = twin("linear_cross_entropy", hidden)
    return op(hidden, weight, labels, z_loss)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    _fit("rms_norm", weight=(len(weight), x.shape[-1]))
    return twin("rms_norm", x)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> rms_norm(x + residual), x + residual."""
    _fit("add_rms_norm", weight=(len(weight), x.shape[-1]), x=(x.numel(), residual.numel()))
    return twin("add_rms_norm", x)(x, residual, weight, eps)


def rms_norms(x: Tensor, weights: Sequence[Tensor], eps: float) -> list[Tensor]:
    """x (N, D1 + D2 + ...), weights (D1), (D2), ... -> each slice's norm (N, D1), (N, D2), ..."""
    _fit("rms_norms", weights=(sum(len(weight) for weight in weights), x.shape[-1]))
    return twin("rms_norms", x)(x, weights, eps)


def fuse_heads(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Mean of the two normed branches, all (N, E)."""
    width = attention.shape[-1]
    _fit("fuse_heads", ssm=(ssm.numel(), attention.numel()))
    _fit("fuse_heads", weight=(len(attention_weight), width), ssm_weight=(len(ssm_weight), width))
    op = twin("fuse_heads", attention)
    return op(attention, ssm, attention_weight, ssm_weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (..., F)."""
    _fit("swiglu", up=(up.numel(), gate.numel()))
    return twin("swiglu", gate)(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + width/2) of x (N, heads, width), turned; cos, sin (N, 1, width/2)."""
    _fit("rotate", cos=(len(cos), len(x)), sin=(len(sin), len(x)))
    return twin("rotate", x)(x, cos, sin)


# The decode step: one new token a row, what a cache keeps updated in place by slot.


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
    """q (S, H, h) and k (S, G, h) turned; k and v (S, G, e) written to their places of the slots.
    Without k, v and stores (another layer's are read) only q is turned."""
    _fit("rope_and_store", slots=(len(slots), len(q)), places=(len(places), len(q)))
    op = twin("rope_and_store", q)
    return op(q, k, v, cos, sin, store_k, store_v, slots, places)


def attention_step(
    q: Tensor,
    store_k: Tensor,
    store_v: Tensor,
    table: Tensor,
    counts: Tensor,
    most: int,
    meta: Meta | None = None,
) -> Tensor:
    """q (S, H, h), store_k (pages, G, P, h), store_v (pages, G, P, e) -> (S, H, e): row s sees the
    first counts[s] places of its pages table[s] (S, T), and all meta keys."""
    rows, (pages, groups, size, width) = len(q), store_k.shape
    _fit("attention_step", table=(len(table), rows), counts=(len(counts), rows))
    _fit("attention_step", store_k=(width, q.shape[2]))
    for got, want in zip(store_v.shape, (pages, groups, size), strict=False):
        _fit("attention_step", store_v=(got, want))
    if q.shape[1] % groups:
        raise ValueError(f"attention_step: {q.shape[1]} query heads do not share {groups} evenly")
    if most > table.shape[1] * size:
        raise ValueError(
            f"attention_step: most is {most}, a row has {table.shape[1] * size} places"
        )
    for x, store in zip(meta or (), (store_k, store_v), strict=False):
        _fit("attention_step", meta=(x.shape[1], groups))
        _fit("attention_step", meta=(x.shape[2], store.shape[3]))
    op = twin("attention_step", q)
    return op(q, store_k, store_v, table, counts, most, meta)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """x (S, E), weight (E, K) -> silu(conv) (S, E); state (slots, K-1, E) moves on by one."""
    _fit("conv_step", slots=(len(slots), len(x)))
    return twin("conv_step", x)(x, weight, bias, state, slots)


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
    """`selective_scan` of one row each: u, dt, z (S, E) -> y (S, E); state (slots, E, n)."""
    _fit("state_step", slots=(len(slots), len(u)), dt=(len(dt), len(u)), z=(len(z), len(u)))
    return twin("state_step", u)(u, dt, A, B, C, D, z, dt_bias, state, slots)


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
    """All behind x_proj at once: low (S, R + 2n) -> y (S, E); state (slots, E, n)."""
    _fit("ssm_step", slots=(len(slots), len(u)), low=(len(low), len(u)), z=(len(z), len(u)))
    norms = dt_norm, B_norm, C_norm
    op = twin("ssm_step", u)
    return op(u, low, dt_weight, dt_bias, *norms, A, D, z, state, slots, eps)


# Thin products, for a step of few rows: a whole weight and what stands before and behind it.


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight): x (S, D), weight (F, D) -> (S, F), S <= 2."""
    _fit_thin("linear", x, weight)
    return twin("linear", x)(x, weight)


def narrow_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) of some rows and few outputs: x (S, D), weight (F, D) -> (S, F)."""
    _fit("narrow_linear", weight=(weight.shape[1], x.shape[1]))
    return twin("narrow_linear", x)(x, weight)


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """x (N, columns) -> (N, rows): F.linear with a matrix in few bits; see hymba.ops.packed."""
    _fit("packed_linear", x=(x.shape[1], packed.columns))
    if wants_grad(x):  # kernels have none
        return packed_linear_reference(x, packed)
    return twin("packed_linear", x)(x, packed)


def packed_norm_linear(x: Tensor, norm_weight: Tensor, eps: float, packed: Packed) -> Tensor:
    """packed_linear(rms_norm(x), packed), without gradients: x (S, columns) -> (S, rows)."""
    _fit("packed_norm_linear", x=(x.shape[1], packed.columns))
    _fit("packed_norm_linear", norm_weight=(len(norm_weight), packed.columns))
    return twin("packed_norm_linear", x)(x, norm_weight, eps, packed)


def packed_norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Packed) -> Tensor:
    """swiglu of two such products, their rows one behind the other, in whole tiles:
    x (S, columns) -> (S, rows / 2)."""
    _fit("packed_norm_swiglu", x=(x.shape[1], gate_up.columns), tiles=(gate_up.rows % 64, 0))
    _fit("packed_norm_swiglu", norm_weight=(len(norm_weight), gate_up.columns))
    return twin("packed_norm_swiglu", x)(x, norm_weight, eps, gate_up)


def packed_linear_add(x: Tensor, packed: Packed, residual: Tensor) -> Tensor:
    """residual + packed_linear(x, packed), without gradients: residual (S, rows) -> (S, rows)."""
    _fit("packed_linear_add", x=(x.shape[1], packed.columns), residual=(len(residual), len(x)))
    _fit("packed_linear_add", residual=(residual.shape[1], packed.rows))
    return twin("packed_linear_add", x)(x, packed, residual)


def packed_fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    packed: Packed,
    residual: Tensor,
) -> Tensor:
    """residual + packed_linear(fuse_heads(attention, ssm), packed), without gradients: attention,
    ssm (S, columns), residual (S, rows) -> (S, rows)."""
    name, width = "packed_fuse_linear", packed.columns
    _fit(name, attention=(attention.shape[1], width), ssm=(ssm.shape[1], width))
    _fit(name, ssm_rows=(len(ssm), len(attention)))
    _fit(name, weight=(len(attention_weight), width), ssm_weight=(len(ssm_weight), width))
    _fit(name, rows=(len(residual), len(attention)), residual=(residual.shape[1], packed.rows))
    op = twin(name, attention)
    return op(attention, ssm, attention_weight, ssm_weight, eps, packed, residual)


def packed_rows(ids: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows ids (N,) of a matrix in few bits, (N, columns): an embedding's look-up."""
    return twin("packed_rows", packed.tiles)(ids, packed, dtype)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """F.linear(rms_norm(x), weight): x (S, D), norm_weight (D), weight (F, D) -> (S, F), S <= 2."""
    _fit_thin("norm_linear", x, weight, norm_weight)
    return twin("norm_linear", x)(x, norm_weight, eps, weight)


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up_weight: Tensor
) -> Tensor:
    """swiglu of two products: x (S, D), gate_weight and up_weight (F, D) -> (S, F), S <= 2."""
    _fit_thin("norm_swiglu", x, gate_weight, norm_weight)
    _fit_thin("norm_swiglu", x, up_weight)
    _fit("norm_swiglu", up_weight=(len(up_weight), len(gate_weight)))
    return twin("norm_swiglu", x)(x, norm_weight, eps, gate_weight, up_weight)


def fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    weight: Tensor,
    residual: Tensor,
) -> Tensor:
    """residual + F.linear(fuse_heads(attention, ssm), weight): attention, ssm (S, E), weight
    (D, E), residual (S, D) -> (S, D), S <= 2."""
    _fit_thin("fuse_linear", attention, weight, attention_weight, residual)
    _fit_thin("fuse_linear", ssm, weight, ssm_weight, residual)
    op = twin("fuse_linear", attention)
    return op(attention, ssm, attention_weight, ssm_weight, eps, weight, residual)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + F.linear(x, weight): x (S, F), weight (D, F) -> as residual (S, D), S <= 2."""
    _fit_thin("linear_add", x, weight, residual=residual)
    return twin("linear_add", x)(x, weight, residual)


def _fit_thin(
    op: str,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    rows, width = x.shape
    if rows > THIN_ROWS:
        raise ValueError(f"{op}: {rows} rows where {THIN_ROWS} are the most")
    _fit(op, weight=(weight.shape[1], width))
    if norm_weight is not None:
        _fit(op, norm_weight=(len(norm_weight), width))
    if residual is not None:
        _fit(op, residual=(len(residual), rows))
        _fit(op, residual=(residual.shape[1], len(weight)))
