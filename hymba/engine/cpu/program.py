"""A model and a store as a program: the records that a compiled step walks, made once.

Weights and caches stay where they are, their addresses are noted; small constants (norms, taps, A)
are copied, wide and padded. So a program is of weights that an engine holds still, and prefill by
torch and steps by the program share one cache: slots come and go between them.

`why_not` says what is left to torch: a model without packed weights or with packed floats (fp8),
with hooks or adapters or modules that are not ours, with K/V in other than float32 and bfloat16, or
with states in other than float32; gate and up projections kept in different ways; a CPU or a Python
without the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hymba.config import Layer
from hymba.engine.cpu import layout
from hymba.engine.cpu.attention import MOST_PARTS, SCORES
from hymba.engine.cpu.layout import BLOCK, LAYER, MODEL, ROW, ROWS, SPAN
from hymba.engine.cpu.product import MEET
from hymba.engine.cpu.ssm import CHANNELS
from hymba.engine.cpu.step import phase_count, step
from hymba.engine.store import PagedKV, Store
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Block, HybridMixer
from hymba.model.layers import MLP
from hymba.model.packed import PackedEmbedding, PackedLinear, schemes_of
from hymba.model.ssm import SSM, is_plain
from hymba.ops.cpu.simd import unsupported
from hymba.ops.cpu.team import Team, address, aligned, team
from hymba.ops.cpu.tiles import exact_asked
from hymba.ops.packed import TILE

KV_BYTES = {torch.float32: 4, torch.bfloat16: 2}
KINDS = {  # by scheme, whether activations stay float32
    ("int4", False): layout.INT4,
    ("int8", False): layout.INT8,
    ("int4", True): layout.INT4_EXACT,
    ("int8", True): layout.INT8_EXACT,
}


def why_not(model: LanguageModel, store: Store) -> str:
    """What of a model or its store a program cannot do; empty where it can do all."""
    if missing := unsupported():
        return missing
    if not schemes_of(model):
        return "its weights are not packed"
    for name, module in model.named_modules():
        home = type(module).__module__
        if not is_plain(module) or not home.startswith(("torch.nn.modules", "hymba.")):
            return f"{name or 'the model'} has hooks, or is not one of our modules"
        if isinstance(module, PackedLinear | PackedEmbedding):
            name_of, group = module.scheme.name, module.scheme.group
            if (name_of, False) not in KINDS or SPAN % group:
                return f"{name} is packed as {name_of}, which has no kernels here (int8 has)"
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.uint8) or not parameter.is_contiguous():
            return f"{name} is {parameter.dtype}"
    for x in (*store.rings, *store.paged):
        if x.dtype not in KV_BYTES:
            return f"K/V are {x.dtype}"
    if any(x.dtype != torch.float32 for x in store.states):
        return "states are not float32"
    for name, mlp in model.named_modules():
        gate = mlp.gate_proj if isinstance(mlp, MLP) else None
        if isinstance(mlp, MLP) and gate is not None and _way(gate) != _way(mlp.up_proj):
            return f"{name} keeps its gate and up projections in different ways"
    return ""


def _way(module: nn.Module) -> Any:
    return module.scheme if isinstance(module, PackedLinear) else None


class Program:
    def __init__(
        self,
        model: LanguageModel,
        store: Store,
        exact: bool | None = None,
        by: Team | None = None,
    ):
        """exact: activations stay float32, as HYMBA_EXACT=1 asks for everywhere. by: other threads
        than the process's own."""
        self.model, self.store = model, store
        self.exact = exact_asked() if exact is None else exact
        self._team = by
        self._kept: list[Any] = []  # what addresses point to
        self.rows = np.zeros(ROWS, ROW)
        self.layers = np.zeros(len(model.config.layers), LAYER)
        self.record = np.zeros((), MODEL)
        for index, layer in enumerate(model.config.layers):
            self._layer(index, layer)
        self._model()
        self._buffers()
        self._at, self._phases = address(self.record), phase_count(len(self.layers))

    # ---- a step

    def step(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """tokens, lengths, slots (S,) int64: a new token of each slot's sequence, behind so many
        others -> logits (S, V) float32, which the next step overwrites. K/V and states of the slots
        are brought up to date. UserError for a token that is none."""
        ids = tokens.numpy()
        self._check(ids)
        behind, where = lengths.numpy(), slots.numpy()
        by = self._team or team()
        for first in range(0, len(ids), ROWS):
            count = min(ROWS, len(ids) - first)
            rows, here = self.rows[:count], slice(first, first + count)
            rows["token"], rows["length"], rows["slot"] = ids[here], behind[here], where[here]
            self.record["rows"] = count
            self.record["logits"] = self._logits_at + first * self.logits.strides[0]
            by.run(step, self._at, phases=self._phases)
        return self._logits[: len(ids)]

    def compile(self) -> None:
        """Now, not at the first step: seconds, unless the compiled step is on disk."""
        _ = step.address

    def _check(self, ids: np.ndarray) -> None:
        size = self.model.config.vocab_size
        bad = ids[(ids < 0) | (ids >= size)]
        if len(bad):
            raise UserError(f"token id {bad[0]} is outside the vocabulary (0 to {size - 1})")

    # ---- layers

    def _layer(self, index: int, layer: Layer) -> None:
        block: Block = self.model.decoder.layers[index]  # type: ignore[assignment]
        record, mixer, config = self.layers[index], block.mixer, self.model.config
        record["input_norm"] = self._constant(block.input_norm.weight)
        record["width"] = config.inner_size if layer.ssm else config.hidden_size
        self._matrix(record["in_proj"], mixer.in_proj)
        self._matrix(record["out_proj"], mixer.out_proj)
        self._fusion(record, mixer)
        if layer.attention:
            self._attention(record["attention"], index, layer, mixer)
        if mixer.ssm is not None:
            self._ssm(record["ssm"], index, mixer, mixer.ssm)
        if block.mlp is not None and block.mlp_norm is not None:
            record["mlp"] = 1
            record["mlp_norm"] = self._constant(block.mlp_norm.weight)
            self._mlp(record, block.mlp)

    def _fusion(self, record: np.ndarray, mixer: HybridMixer) -> None:
        if mixer.attention_norm is None or mixer.ssm_norm is None:
            record["fusion"] = layout.PLAIN
            return
        weights = mixer.weights_of_mean()
        if weights is not None:
            record["fusion"] = layout.MEAN
            record["norms"] = self._constant(torch.stack(weights))
        else:
            record["fusion"] = layout.CONCAT
            norms = mixer.attention_norm.weight, mixer.ssm_norm.weight
            record["norms"] = self._constant(torch.cat(norms))

    def _attention(self, record: np.ndarray, index: int, layer: Layer, mixer: HybridMixer) -> None:
        config, owner = self.model.config, index if layer.kv_from is None else layer.kv_from
        record["on"], record["owns_kv"] = 1, layer.owns_kv
        record["groups"] = config.num_kv_heads
        record["heads"] = config.num_heads // config.num_kv_heads
        record["h"], record["e"] = mixer.head_dim, mixer.value_dim
        record["h_padded"], record["e_padded"] = _up(mixer.head_dim, 16), _up(mixer.value_dim, 16)
        record["ring"] = 0 if layer.window is None else layer.window + 1
        for name in ("q", "k", "v"):
            if name in mixer.sizes:
                record[f"{name}_at"] = _offset(mixer, name)
        kv, meta = self.store.kv[owner], self.store.meta[owner]
        assert kv is not None and isinstance(kv, PagedKV) == (layer.window is None)
        # (pages, G, P, width)
        self._keys(record["text"], kv.k, kv.v, kv.k.stride(), kv.v.stride())
        if meta.k is not None and meta.v is not None:
            # (M, G, width): one page
            k, v = (x.contiguous() for x in (meta.k, meta.v))
            record["meta_count"] = len(k)
            steps = ((0, x.stride(1), x.stride(0)) for x in (k, v))
            self._keys(record["meta"], k, v, *steps)

    def _keys(self, record: np.ndarray, k: Tensor, v: Tensor, k_step: Any, v_step: Any) -> None:
        """steps: elements between pages, groups and places."""
        self._kept += [k, v]
        size = record["bytes"] = KV_BYTES[k.dtype]
        for name, x, steps in (("k", k, k_step), ("v", v, v_step)):
            record[name] = x.data_ptr()
            for part, count in zip(("page", "group", "place"), steps, strict=False):
                record[f"{name}_{part}"] = size * count

    def _ssm(self, record: np.ndarray, index: int, mixer: HybridMixer, ssm: SSM) -> None:
        config, kept = self.model.config, self.store.ssm[index]
        assert kept is not None
        channels, states, taps = config.inner_size, config.ssm_state, config.ssm_conv
        record["on"], record["channels"], record["padded"] = 1, channels, _up(channels, SPAN)
        record["states"], record["states_padded"] = states, _up(states, 16)
        record["rank"], record["taps"] = config.ssm_dt_rank, taps
        record["u_at"], record["gate_at"] = _offset(mixer, "u"), _offset(mixer, "gate")
        record["y_at"] = 4 * channels if mixer.layer.attention else 0
        for name, x in (("conv", kept.conv), ("state", kept.ssm)):
            self._kept.append(x)
            record[name], record[f"{name}_slot"] = x.data_ptr(), x.stride(0) * x.element_size()
        bias = torch.zeros(channels) if ssm.conv.bias is None else ssm.conv.bias
        record["conv_weight"] = self._constant(ssm.conv.weight[:, 0].T)
        record["conv_bias"] = self._constant(bias)
        record["A"] = self._constant(ssm.rates(torch.float32), 16)
        record["D"], record["dt_bias"] = self._constant(ssm.D), self._constant(ssm.dt_bias)
        norms = ssm.dt_norm, ssm.B_norm, ssm.C_norm
        for name, norm in zip(("dt_norm", "B_norm", "C_norm"), norms, strict=True):
            record[name] = self._constant(norm.weight)
        self._matrix(record["x_proj"], ssm.x_proj)
        self._matrix(record["dt_proj"], ssm.dt_proj)

    def _mlp(self, record: np.ndarray, mlp: MLP) -> None:
        record["activation"] = layout.RELU2 if mlp.gate_proj is None else layout.GATED
        if mlp.gate_proj is not None:
            self._matrix(record["gate_proj"], mlp.gate_proj)
        self._matrix(record["up_proj"], mlp.up_proj)
        self._matrix(record["down_proj"], mlp.down_proj)

    # ---- the rest

    def _model(self) -> None:
        model, record, config = self.model, self.record, self.model.config
        record["row"], record["layers"] = address(self.rows), address(self.layers)
        record["layer_count"], record["hidden"] = len(self.layers), config.hidden_size
        record["head_dim"], record["meta_tokens"] = config.head_dim, config.meta_tokens
        record["eps"] = config.norm_eps
        record["final_norm"] = self._constant(model.decoder.final_norm.weight)
        pair = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        record["frequencies"] = self._constant(config.rope_base ** -(pair / config.head_dim))
        table = self.store.table
        self._kept.append(table)
        record["table"], record["table_bytes"] = table.data_ptr(), 4 * table.stride(0)
        self._matrix(record["embedding"], model.decoder.embed_tokens)
        self._matrix(record["head"], model.lm_head)

    def _matrix(self, record: np.ndarray, module: nn.Module) -> None:
        if isinstance(module, PackedLinear | PackedEmbedding):
            weight, scheme = module.tiles, module.scheme
            record["kind"] = KINDS[scheme.name, self.exact]
            record["rows"], record["columns"] = module.rows, module.columns
            record["group"], record["group_bytes"] = scheme.group, scheme.group_bytes
            record["groups"], record["tile_bytes"] = scheme.groups(module.columns), weight.shape[1]
            record["meet"] = MEET[int(record["kind"])].address
        else:
            weight = module.weight  # type: ignore[assignment]
            record["kind"] = layout.DENSE
            record["rows"], record["columns"] = weight.shape
            record["tile_bytes"] = TILE * 4 * weight.shape[1]
        record["tiles"] = _up(int(record["rows"]), TILE) // TILE
        record["address"] = weight.data_ptr()
        self._kept.append(weight)

    def _buffers(self) -> None:
        """Room for ROWS rows of everything between the phases, and for each thread."""
        config, record = self.model.config, self.record
        wide = max(int(x["rows"]) for x in self.layers["in_proj"])
        mixed = max(int(x["columns"]) for x in self.layers["out_proj"])
        inner, hidden = config.inner_size, config.hidden_size
        self._rows(("x", "other_x"), "x_stride", hidden)
        self._rows(("proj",), "proj_stride", wide)
        self._rows(("mix",), "mix_stride", 2 * inner)
        self._rows(("u",), "u_stride", inner)
        self._rows(("dt",), "dt_stride", inner)
        self._rows(("turns",), "turns_stride", config.head_dim)
        low, parts = _up(config.ssm_dt_rank + 2 * config.ssm_state, TILE), -(-inner // CHANNELS)
        self._rows(("low",), "low_stride", low * parts)
        record["low_part"] = 4 * low
        self._activations(record["input"], max(hidden, mixed))
        self._activations(record["inner"], config.intermediate_size)
        record["gate"] = self._room(ROWS * int(record["inner"]["stride"]))
        self._attention_buffers()
        self._logits_buffer()

    def _attention_buffers(self) -> None:
        config, record, attention = self.model.config, self.record, self.layers["attention"]
        heads = config.num_heads // config.num_kv_heads
        values = max(16, int(attention["e_padded"].max()))
        tokens = self.store.table.shape[1] * BLOCK
        parts = min(MOST_PARTS, tokens // BLOCK) + -(-config.meta_tokens // BLOCK)
        record["part_bytes"] = _up(8 * heads, 64) + 4 * heads * values
        count = ROWS * config.num_kv_heads * parts if attention["on"].any() else 0
        record["parts"] = self._room(count * int(record["part_bytes"]))
        keys = max(16, int(attention["h_padded"].max()))
        attend = heads * (4 * keys + SCORES) + 16 * 4 * max(keys, values)
        rank, states = _up(config.ssm_dt_rank, SPAN), _up(config.ssm_state, 16)
        scan = (ROWS + 1) * 8 * (rank + 2 * states) + 8 * SPAN
        record["scratch_bytes"] = _up(max(attend, scan, 2 * CHANNELS * ROWS), 4096)
        threads = (self._team or team()).threads
        record["scratch"] = self._room(threads * int(record["scratch_bytes"]))

    def _logits_buffer(self) -> None:
        size = self.model.config.vocab_size
        memory = aligned(4 * self.store.slots * _up(size, SPAN)).view(np.float32)
        self.logits = memory.reshape(self.store.slots, -1)
        self._logits_at = address(self.logits)
        self.record["logits_stride"] = self.logits.strides[0]
        self._logits = torch.from_numpy(self.logits)[:, :size]

    def _rows(self, names: tuple[str, ...], stride: str, columns: int) -> None:
        """Buffers of ROWS rows of float32, each with a whole span of zeros or more behind it."""
        self.record[stride] = 4 * (_up(columns, SPAN) + SPAN)
        for name in names:
            self.record[name] = self._room(ROWS * int(self.record[stride]))

    def _activations(self, record: np.ndarray, columns: int) -> None:
        """float32, int8, and 8 bytes for each group of 32 at least."""
        record["columns"] = _up(columns, SPAN)
        record["stride"] = _up(int(record["columns"]) * 21 // 4, 64)
        record["address"] = self._room(ROWS * int(record["stride"]))

    def _room(self, count: int) -> int:
        memory = aligned(count)
        self._kept.append(memory)
        return address(memory)

    def _constant(self, x: Tensor, multiple: int = SPAN) -> int:
        """A float32 copy whose rows are padded with zeros to a multiple of so many."""
        values = x.detach().float().numpy()
        size = values.shape[-1]
        memory = aligned(4 * values.size // size * _up(size, multiple)).view(np.float32)
        memory.reshape(-1, _up(size, multiple))[:, :size] = values.reshape(-1, size)
        self._kept.append(memory)
        return address(memory)


def _offset(mixer: HybridMixer, name: str) -> int:
    """Bytes before a part of in_proj's output."""
    names = list(mixer.sizes)
    return 4 * sum(mixer.sizes[before] for before in names[: names.index(name)])


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
