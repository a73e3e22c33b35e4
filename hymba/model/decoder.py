"""The whole model: embedding, meta tokens, blocks, head. One forward for training, prefill and
decode; they differ only in the batch and in whether a cache is given.

`hidden` and `logits` are two verbs, so that logits are made only where they are needed. While
gradients flow, the meta tokens' rows run in front of the batch (once a forward, whatever the number
of sequences) and every sequence starts from what they leave; without gradients that is a constant
of the weights, computed once by `meta_states` and again when any weight has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba import ops
from hymba.cache import Cache, Held, State
from hymba.config import Config, Layer
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.hybrid import Before, Block, Left
from hymba.model.layers import MetaTokens, RMSNorm, rope_tables
from hymba.model.memo import fingerprint
from hymba.model.packed import PackedLinear
from hymba.model.ssm import is_matrix, is_packed, matrix_of
from hymba.ops import Packed


class Decoder(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        count = config.meta_tokens
        self.meta_tokens = MetaTokens(count, config.hidden_size) if count else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Activation checkpointing: called as fn(block, *args) in place of block(*args).
        self.checkpoint_blocks: Callable[..., Any] | None = None
        self._memo: tuple[Any, list[State]] | None = None

    def forward(self, rows: Tensor, batch: Batch, cache: Cache | None = None) -> Tensor:
        """rows: token ids (N,) or embeddings (N, D) of the batch -> hidden (N, D), after the norm.

        With a cache this is inference: no gradients, states are written, lengths advance."""
        if cache is not None:
            with torch.no_grad():
                return self._continue(rows, batch, cache)
        x = self.embed(rows)
        if self.meta_tokens is not None and self._gradients_flow():
            x = torch.cat([self.meta_tokens().to(x.dtype), x])
            batch = batch.with_meta(self.config.meta_tokens)
            befores = [Before()] * len(self.layers)
        else:
            constants = self.meta_states()
            befores = [Before(meta, conv=meta.conv, ssm=meta.ssm) for meta in constants]
        x, _ = self._blocks(x, batch, befores)
        return self.final_norm(x[batch.meta :])

    def _continue(self, rows: Tensor, batch: Batch, cache: Cache) -> Tensor:
        held = tuple(cache.length(slot) for slot in batch.slots)
        if held != batch.past:
            raise ValueError(f"the batch continues {batch.past} tokens, its slots hold {held}")
        x = self.embed(rows)
        if batch.segments.uniform == 1:
            lengths, layers = cache.begin_step(batch.slots)
            hidden = self.final_norm(self.step(x, lengths, layers))
            cache.end_step(batch.slots)
            return hidden
        befores = [self._before(i, batch, cache) for i in range(len(self.layers))]
        x, lefts = self._blocks(x, batch, befores)
        hidden = self.final_norm(x)
        cache.commit(batch.slots, batch.segments, [left.text for left in lefts])
        return hidden

    def _before(self, index: int, batch: Batch, cache: Cache) -> Before:
        past = cache.past(index, batch.slots)
        states = cache.ssm_state(index, batch.slots)
        return Before(cache.meta[index], past, *states, cache.kv_dtype)

    @torch.no_grad()
    def step(self, rows: Tensor, lengths: Tensor, layers: Sequence[Held]) -> Tensor:
        """One new token of each of S sequences: ids (S,) or embeddings (S, D), behind `lengths`
        (S,) text tokens -> hidden (S, D), before the norm. `layers` are updated in place.

        The same numbers as `forward` with segments of one row, told on the device: nothing here
        waits for the host, so a CUDA graph can hold it."""
        x = rows.clone() if rows.is_floating_point() else self.embed(rows)  # blocks use it up
        positions = lengths + self.config.meta_tokens
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_base)
        for block, now in zip(self._each(), layers, strict=True):
            x = block.step(x, rope, now)
        return x

    def rates(self) -> list[Tensor | None]:
        """A of every layer's SSM, a constant of the weights that a step can be given (`Held.A`)."""
        ssms = (block.mixer.ssm for block in self._each())
        return [None if ssm is None else ssm.rates(self.final_norm.weight.dtype) for ssm in ssms]

    def wide_dts(self) -> list[Tensor | None]:
        """`SSM.wide_dt` of every layer (`Held.dt`)."""
        ssms = (block.mixer.ssm for block in self._each())
        dtype = self.final_norm.weight.dtype
        return [None if ssm is None else ssm.wide_dt(dtype) for ssm in ssms]

    def pack(self) -> list[Tensor | Packed | None]:
        """`MLP.pack` of every layer (`Held.gate_up`); None where its projections are more than
        their weights."""
        device = self.final_norm.weight.device.type
        mlps = (
            block.mlp if block.is_bare(device) or block.is_bare(device, is_packed) else None
            for block in self._each()
        )
        return [None if mlp is None else mlp.pack() for mlp in mlps]

    def _each(self) -> Iterator[Block]:
        return iter(self.layers)  # type: ignore[arg-type]

    def embed(self, rows: Tensor) -> Tensor:
        if rows.is_floating_point():
            return rows
        if rows.device.type == "cpu" and rows.numel():  # elsewhere the look would wait for a device
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                size = self.config.vocab_size
                raise UserError(f"token id {bad} is outside the vocabulary (0 to {size - 1})")
        return self.embed_tokens(rows).to(self.final_norm.weight.dtype)  # packed rows are wide

    def _blocks(self, x: Tensor, batch: Batch, befores: list[Before]) -> tuple[Tensor, list[Left]]:
        """x (batch.meta + N, D) through every block; what each leaves."""
        meta = torch.arange(batch.meta, device=x.device)
        positions = torch.cat([meta, batch.positions.to(x.device) + self.config.meta_tokens])
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_base)
        run = self.checkpoint_blocks if torch.is_grad_enabled() else None
        lefts: list[Left] = []
        for block, layer, before in zip(self.layers, self.config.layers, befores, strict=True):
            producer = None if layer.kv_from is None else lefts[layer.kv_from]
            args = (x, rope, batch, before, producer)
            x, left = block(*args) if run is None else run(block, *args)
            lefts.append(left)
        return x, lefts

    def _gradients_flow(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    @torch.inference_mode(False)  # or autograd would refuse what was kept
    @torch.no_grad()
    def meta_states(self) -> list[State]:
        """What the meta tokens leave in each layer, without gradients; a constant of the weights.

        Kept until a weight changes, by training, loading, casting or in place; not kept at all
        where foreign modules (adapters, wrappers) stand among ours, since those can change what
        a weight means without changing it."""
        if self.meta_tokens is None:
            return [State()] * len(self.layers)
        key = fingerprint(self)
        if key is None or self._memo is None or self._memo[0] != key:
            x = self.meta_tokens()
            batch = Batch.of((), device=x.device).with_meta(self.config.meta_tokens)
            _, lefts = self._blocks(x, batch, [Before()] * len(self.layers))
            layers = zip(lefts, self.config.layers, strict=True)
            self._memo = key, [_own(left.meta, layer) for left, layer in layers]
        return self._memo[1]

    def forget_meta_states(self) -> None:
        """Compute them anew: something changed that no weight shows."""
        self._memo = None

    def new_cache(self, slots: int, state_dtype: torch.dtype = torch.float32) -> Cache:
        """An empty cache for so many sequences, beginning after the meta tokens."""
        like = self.final_norm.weight.detach()
        return Cache(self.config, slots, self.meta_states(), like, state_dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (S, D), weight (V, D) -> (S, V). The fast matrix products of a GPU write no rows of an odd
    number of numbers: those of this result are further apart."""
    size = len(weight)
    if x.device.type != "cuda" or size % 64 == 0:
        return x @ weight.T
    even = size - size % 64
    out = x.new_empty(len(x), even + 64)
    torch.mm(x, weight[:even].T, out=out[:, :even])
    torch.mm(x, weight[even:].T, out=out[:, even:size])
    return out[:, :size]


def _own(state: State | None, layer: Layer) -> State:
    """A copy of what one layer keeps: not its producer's K/V, nor all that these are views of."""
    state = state or State()
    state = state if layer.owns_kv else state._replace(k=None, v=None)
    return State(*(None if x is None else x.clone() for x in state))


class LanguageModel(nn.Module):
    """A decoder and its head, tied to the embedding where the config says so."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight
        self.folder: Path | None = None  # where it was loaded from: tokenizer files are there

    def forward(self, rows: Tensor, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Hidden states (N, D); see Decoder.forward."""
        return self.decoder(rows, batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    @torch.no_grad()
    def step(self, rows: Tensor, lengths: Tensor, layers: Sequence[Held]) -> Tensor:
        """A decode step, `Decoder.step`, and the logits (S, V) after it."""
        x, norm = self.decoder.step(rows, lengths, layers), self.decoder.final_norm
        if is_packed(self.lm_head):
            return ops.packed_norm_linear(x, norm.weight, norm.eps, matrix_of(self.lm_head))
        if not is_matrix(self.lm_head):
            return self.logits(norm(x))
        if len(x) <= ops.THIN_ROWS:
            return ops.norm_linear(x, norm.weight, norm.eps, self.lm_head.weight)
        return _product(norm(x), self.lm_head.weight)

    def loss(
        self, hidden: Tensor, labels: Tensor, reduction: str = "mean", z_loss: float = 0.0
    ) -> Tensor:
        """Cross-entropy in nats of hidden (N, D) against labels (N), -100 left out; "mean" or
        "sum". Never holds (N, V) for backward. z_loss: see hymba.ops.loss."""
        if isinstance(self.lm_head, PackedLinear):
            total = self._packed_loss(hidden, labels)
        else:
            total = ops.linear_cross_entropy(hidden, self.lm_head.weight, labels, z_loss)
        return total if reduction == "sum" else total / (labels != ops.IGNORE).sum().clamp(min=1)

    def _packed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed over labels, of a model that is read and not trained."""
        parts = zip(hidden.split(512), labels.split(512), strict=True)
        losses = (
            F.cross_entropy(
                self.logits(rows).float(), wanted, ignore_index=ops.IGNORE, reduction="sum"
            )
            for rows, wanted in parts
        )
        return torch.stack(list(losses)).sum()

    def new_cache(self, slots: int, state_dtype: torch.dtype = torch.float32) -> Cache:
        return self.decoder.new_cache(slots, state_dtype)

    def set_config(self, config: Config) -> None:
        """Another rotary base, or more positions, for the same weights (longer texts)."""
        positions = ("rope_type", "rope_theta", "max_positions", "original_max_positions")
        now = {name: getattr(config, name) for name in positions}
        if self.config.replace(**now, source={}) != config:
            raise UserError("only positions may change: the rest of a config made the weights")
        self.config = self.decoder.config = config
        self.decoder.forget_meta_states()

    @property
    def device(self) -> torch.device:
        return self.decoder.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.final_norm.weight.dtype

    @torch.no_grad()
    def init_weights(
        self, seed: int | None = None, dt: tuple[float, float] | None = None
    ) -> LanguageModel:
        """Fill every parameter, as the released code does:

        | parameter                      | value                                            |
        |--------------------------------|--------------------------------------------------|
        | linear, conv, embedding        | normal(0, initializer_range)                     |
        | meta_tokens                    | normal(0, 1)                                     |
        | conv.bias, dt_bias             | 0                                                |
        | A_log                          | log(1 .. n) in every channel                     |
        | D, norms, scales               | 1                                                |
        | embedding row of pad_token_id  | 0                                                |

        So every dt starts at softplus(0) = 0.69, and the slowest state halves with each token. With
        `dt` it starts between the two, evenly in its logarithm: Mamba's own start is (0.001, 0.1).
        """
        if dt is not None and not 1e-30 < dt[0] <= dt[1] < 20:
            raise ValueError(f"dt must start between two numbers above 0 and below 20, not {dt}")
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            _fill(name.split("."), parameter, self.config, generator)
        if dt is not None:  # after all others, which are the same with it and without
            for name, parameter in self.named_parameters():
                if name.endswith("dt_bias"):
                    _fill_dt(parameter, dt, generator)
        if self.config.pad_token_id is not None:
            self.decoder.embed_tokens.weight[self.config.pad_token_id] = 0
        return self


def _fill_dt(parameter: Tensor, dt: tuple[float, float], generator: torch.Generator | None) -> None:
    """What softplus makes numbers of that lie between the two, evenly in their logarithm."""
    low, high = map(math.log, dt)
    start = parameter.uniform_(low, high, generator=generator).exp()
    parameter.copy_(start + torch.log(-torch.expm1(-start)))


def _fill(
    name: list[str], parameter: Tensor, config: Config, generator: torch.Generator | None
) -> None:
    if name[-1] == "A_log":
        states = torch.arange(1, config.ssm_state + 1, device=parameter.device)
        parameter.copy_(states.log().expand_as(parameter))
    elif name[-1] == "D" or name[-2].endswith(("norm", "scales")):
        parameter.fill_(1)
    elif name[-1] in ("bias", "dt_bias"):
        parameter.zero_()
    else:
        std = 1.0 if name[-2] == "meta_tokens" else config.initializer_range
        parameter.normal_(0, std, generator=generator)
