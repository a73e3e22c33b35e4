r"""The hybrid head: attention and SSM heads read the same rows side by side.

    x --in_proj--> q k v ----> attention ----> norm --\
              \--> u gate ---> conv, scan ---> norm ---+--> mean --out_proj-->

The mean may be another of `hymba.config.FUSIONS`. A layer with one branch has no norms and no
fusion: attention alone is exactly Llama's, the SSM alone Mamba's. A layer that reads another's K/V
has no k and v rows in its projection. The meta tokens are an initial state: while gradients flow
their rows stand in front of the batch's rows and what they leave (`Left.meta`) is what the text
rows start from; otherwise it is given (`Before.meta`), a constant of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hymba import ops
from hymba.cache import Held, State
from hymba.config import Config, Layer
from hymba.model.attention import attend
from hymba.model.batch import Batch
from hymba.model.layers import MLP, RMSNorm, Scales, apply_rope
from hymba.model.ssm import SSM, is_matrix, is_packed, is_plain, matrix_of
from hymba.ops import Meta, Packed, Past, Segments


class Before(NamedTuple):
    """What one layer is given beside its rows."""

    meta: State | None = None  # what the meta tokens left, unless their rows are in the batch
    past: Past | None = None  # K/V of the text before the rows
    conv: Tensor | None = None  # (S or 1, K-1, E)
    ssm: Tensor | None = None  # (S or 1, E, n)
    kv_dtype: torch.dtype | None = None  # to which K/V are rounded, as those of the past were


class Left(NamedTuple):
    """What one layer leaves; a consumer of its K/V gets this from its producer."""

    text: State
    meta: State | None


class HybridMixer(nn.Module):
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        self.layer = layer
        self.head_dim, self.value_dim = config.head_dim, config.value_dim(layer)
        self.sizes = self._sizes(config, layer)
        self.fusion = config.fusion if layer.hybrid else None
        width, eps = config.inner_size, config.norm_eps
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes.values()), bias=False)
        self.ssm = SSM(config) if layer.ssm else None
        self.attention_norm = RMSNorm(width, eps) if layer.hybrid else None
        self.ssm_norm = RMSNorm(width, eps) if layer.hybrid else None
        self.scales = Scales() if self.fusion == "scalars" else None
        self.out_proj = nn.Linear(config.mixer_size(layer), config.hidden_size, bias=False)

    @staticmethod
    def _sizes(config: Config, layer: Layer) -> dict[str, int]:
        """Rows of the input projection, in the checkpoint's order."""
        sizes = {"q": config.hidden_size} if layer.attention else {}
        if layer.owns_kv:
            sizes["k"] = config.num_kv_heads * config.head_dim
            sizes["v"] = config.num_kv_heads * config.value_dim(layer)
        if layer.ssm:
            sizes |= {"u": config.inner_size, "gate": config.inner_size}
        return sizes

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        before: Before,
        producer: Left | None,
    ) -> tuple[Tensor, Left]:
        """x (batch.meta + N, D) -> the same shape, and what the rows leave."""
        split = self.in_proj(x).split(list(self.sizes.values()), dim=-1)
        rows = dict(zip(self.sizes, split, strict=True))
        outs, left = [], Left(State(), before.meta)
        if self.layer.attention:
            q = apply_rope(rows["q"].unflatten(-1, (-1, self.head_dim)), rope)
            left = self.keys_and_values(rows, rope, batch, before) if producer is None else producer
            outs.append(attend(q, left.text, left.meta, self.layer, batch, before.past))
        if self.ssm is not None:
            y, left = self.summarise(rows["u"], rows["gate"], batch, before, left)
            outs.append(y)
        return self.out_proj(self.fuse(outs)), left

    def step(self, rows: Tensor, rope: tuple[Tensor, Tensor], now: Held) -> list[Tensor]:
        """What in_proj gives for one new token of each sequence, (S, ...) -> what each branch makes
        of it; what is held is updated in place."""
        split = rows.split(list(self.sizes.values()), dim=-1)
        parts = dict(zip(self.sizes, split, strict=True))
        ssm = self.ssm
        if ssm is None:
            return [self.attend_step(parts, rope, now)]
        summarise = partial(ssm.step, parts["u"], parts["gate"], now)
        if not self.layer.attention:
            return [summarise()]
        return both(lambda: self.attend_step(parts, rope, now), summarise, rows.device)

    def attend_step(
        self, rows: dict[str, Tensor], rope: tuple[Tensor, Tensor], now: Held
    ) -> Tensor:
        """-> (S, H * e). The new keys and values are stored first, then seen like all others."""
        assert now.k is not None and now.v is not None and now.places is not None
        q, at = rows["q"].unflatten(-1, (-1, self.head_dim)), now.places
        if self.layer.owns_kv:
            k = rows["k"].unflatten(-1, (-1, self.head_dim))
            v = rows["v"].unflatten(-1, (-1, self.value_dim))
            q, _ = ops.rope_and_store(q, k, v, *rope, now.k, now.v, at.page, at.place)
        else:
            q = apply_rope(q, rope)
        meta = None
        if now.meta is not None and now.meta.k is not None and now.meta.v is not None:
            meta = Meta(now.meta.k, now.meta.v)
        return ops.attention_step(q, now.k, now.v, at.table, at.counts, at.most, meta).flatten(1)

    def keys_and_values(
        self,
        rows: dict[str, Tensor],
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        before: Before,
    ) -> Left:
        k = apply_rope(rows["k"].unflatten(-1, (-1, self.head_dim)), rope)
        v = rows["v"].unflatten(-1, (-1, self.value_dim))
        if before.kv_dtype is not None:  # now, or a row would see its neighbours as chunks were cut
            k, v = (x.to(before.kv_dtype).to(x.dtype) for x in (k, v))
        elif not torch.is_grad_enabled():
            v = v.clone()  # a view would keep all that in_proj gave until the last layer is through
        if not batch.meta:
            return Left(State(k, v), before.meta)
        (meta_k, k), (meta_v, v) = batch.split(k), batch.split(v)
        return Left(State(k, v), State(meta_k, meta_v))

    def summarise(
        self, u: Tensor, gate: Tensor, batch: Batch, before: Before, left: Left
    ) -> tuple[Tensor, Left]:
        """The SSM branch: meta rows from zero, text rows from what the meta tokens left."""
        assert self.ssm is not None
        outs, text, meta = [], left.text, left.meta
        conv, ssm, A = before.conv, before.ssm, self.ssm.rates(u.dtype)
        if batch.meta:
            (meta_u, u), (meta_gate, gate) = batch.split(u), batch.split(gate)
            y, conv, ssm = self.ssm(meta_u, meta_gate, Segments((batch.meta,)), None, None, A)
            # Not `_replace`, at which torch 2.11's compiler stops.
            meta = State(conv=conv, ssm=ssm) if meta is None else State(*meta[:2], conv, ssm)
            outs.append(y)
        if batch.segments.count:
            y, conv, ssm = self.ssm(u, gate, batch.segments, conv, ssm, A)
            text = State(text.k, text.v, conv, ssm)
            outs.append(y)
        return torch.cat(outs) if len(outs) > 1 else outs[0], Left(text, meta)

    def fuse(self, outs: list[Tensor]) -> Tensor:
        """What each branch made of the rows -> what out_proj reads."""
        if self.attention_norm is None or self.ssm_norm is None:
            return outs[0]
        attention, ssm = outs
        weights = self.weights_of_mean()
        if weights is not None:
            return ops.fuse_heads(attention, ssm, *weights, eps=self.ssm_norm.eps)
        return torch.cat([self.attention_norm(attention), self.ssm_norm(ssm)], dim=-1)

    def weights_of_mean(self) -> tuple[Tensor, Tensor] | None:
        """The norms' weights with which the mean is this fusion, None where no weights do that. A
        sign or a scalar of a normed branch is one of its norm's weight."""
        if self.attention_norm is None or self.ssm_norm is None or self.fusion == "concat":
            return None
        attention, ssm = self.attention_norm.weight, self.ssm_norm.weight
        if self.scales is not None:
            return self.scales(attention, ssm)
        return attention, -ssm if self.fusion == "subtract" else ssm


class Block(nn.Module):
    """Pre-norm residual block: x += mixer(norm(x)); x += mlp(norm(x)).

    The second norm is one op with the addition before it, so its module gives only the weight: like
    the norms of two branches whose mean is taken it is never called, and hooks on it do not run."""

    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = HybridMixer(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps) if layer.mlp else None
        sizes = config.hidden_size, config.intermediate_size, config.mlp_activation
        self.mlp = MLP(*sizes) if layer.mlp else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        before: Before,
        producer: Left | None = None,
    ) -> tuple[Tensor, Left]:
        out, left = self.mixer(self.input_norm(x), rope, batch, before, producer)
        return self.add(x, out), left

    def step(self, x: Tensor, rope: tuple[Tensor, Tensor], now: Held) -> Tensor:
        """`forward` for a decode step: x (S, D), one new token of each sequence. x is used up."""
        mixer, bare = self.mixer, self.is_bare(x.device.type)
        if bare and len(x) <= ops.THIN_ROWS:
            return self.thin_step(x, rope, now)
        if not bare and self.is_bare(x.device.type, is_packed):
            return self.packed_step(x, rope, now)
        outs = mixer.step(mixer.in_proj(self.input_norm(x)), rope, now)
        if not bare:
            return self.add(x, mixer.out_proj(mixer.fuse(outs)))
        x.addmm_(mixer.fuse(outs), mixer.out_proj.weight.T)  # in place: else x is copied first
        if self.mlp is None or self.mlp_norm is None:
            return x
        normed = self.mlp_norm(x)
        if not isinstance(now.gate_up, Tensor):
            inner = self.mlp.inner(normed)
        else:
            inner = ops.swiglu(*(normed @ now.gate_up.T).chunk(2, dim=-1))
        return x.addmm_(inner, self.mlp.down_proj.weight.T)

    def thin_step(self, x: Tensor, rope: tuple[Tensor, Tensor], now: Held) -> Tensor:
        """`step` for a few rows: five products with their neighbours, five readings of weights."""
        norm, mixer, mlp = self.input_norm, self.mixer, self.mlp
        rows = ops.norm_linear(x, norm.weight, norm.eps, mixer.in_proj.weight)
        outs, back = mixer.step(rows, rope, now), mixer.out_proj.weight
        weights = mixer.weights_of_mean()
        if weights is None:
            x = ops.linear_add(mixer.fuse(outs), back, x)
        else:
            attention, ssm = outs
            x = ops.fuse_linear(attention, ssm, *weights, norm.eps, back, x)
        if mlp is None or self.mlp_norm is None or mlp.gate_proj is None:
            return x if mlp is None or self.mlp_norm is None else x + mlp(self.mlp_norm(x))
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        hidden = ops.norm_swiglu(x, self.mlp_norm.weight, norm.eps, gate, up)
        return ops.linear_add(hidden, mlp.down_proj.weight, x)

    def packed_step(self, x: Tensor, rope: tuple[Tensor, Tensor], now: Held) -> Tensor:
        """`step` with matrices in few bits, each product with its neighbours."""
        norm, mixer, mlp = self.input_norm, self.mixer, self.mlp
        rows = ops.packed_norm_linear(x, norm.weight, norm.eps, matrix_of(mixer.in_proj))
        outs, back = mixer.step(rows, rope, now), matrix_of(mixer.out_proj)
        weights = mixer.weights_of_mean()
        if weights is None:
            x = ops.packed_linear_add(mixer.fuse(outs), back, x)
        else:
            attention, ssm = outs
            x = ops.packed_fuse_linear(attention, ssm, *weights, norm.eps, back, x)
        if mlp is None or self.mlp_norm is None:
            return x
        if not isinstance(now.gate_up, Packed):
            return x + mlp(self.mlp_norm(x))
        hidden = ops.packed_norm_swiglu(x, self.mlp_norm.weight, norm.eps, now.gate_up)
        return ops.packed_linear_add(hidden, matrix_of(mlp.down_proj), x)

    def is_bare(self, device_type: str, kept: Callable[[nn.Module], bool] = is_matrix) -> bool:
        """Whether mixer and MLP are their weights and nothing more: no adapters, no hooks, and no
        autocast, which would make other weights of them. `kept`: as numbers, or in few bits."""
        if torch.is_autocast_enabled(device_type):
            return False
        parts: list[nn.Module] = [self.mixer] if self.mlp is None else [self.mixer, self.mlp]
        inner = [part for module in parts for part in module.children()]
        linears = [x for x in inner if not isinstance(x, (SSM, RMSNorm, Scales))]
        return all(map(is_plain, parts)) and all(map(kept, linears))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x and the mixer's output, added, and the MLP over them."""
        if self.mlp is None or self.mlp_norm is None:
            return x + out
        norm = self.mlp_norm
        normed, x = ops.add_rms_norm(x, out, norm.weight, norm.eps)
        return x + self.mlp(normed)


def both(
    first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device
) -> list[Tensor]:
    """Two branches; in a CUDA graph at the same time. A decode step's attention waits for memory
    and its SSM for arithmetic, so together they take little more than the longer one."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [first(), second()]
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        out = second()
    outs = [first(), out]
    here.wait_stream(aside)
    return outs


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # ahead of the attention its programs cost more than they save
