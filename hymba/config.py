"""What a model is, as data: a `Config` and one `Layer` for each block. No torch here.

The hybrid head is the general case and every baseline is a plan of layers: Llama is "attention
only", Mamba is "ssm only, no mlp", Hymba is both everywhere. A plan is a tuple of `Layer`s:

    Layer(window=1024)              attention (1024 back) and SSM heads side by side, then the MLP
    Layer(window=1024, kv_from=1)   the same, but reads the keys and values of layer 1
    Layer(ssm=False)                Llama's layer;  Layer(attention=False, mlp=False) is Mamba's

`Config.from_dict` reads the released checkpoints' config.json and `Config.to_dict` writes it. What
the official keys cannot say goes into keys of our own, `hymba_plan` and `hymba_fusion`, and only
then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from hymba.errors import UserError

PLAN_KEY, FUSION_KEY = "hymba_plan", "hymba_fusion"
# How a hybrid layer joins its branches: what its output projection reads, where a and s are the
# normed outputs of attention and of the SSM. The first is the released one.
FUSIONS = {
    "mean": "(a + s) / 2",
    "subtract": "(a - s) / 2",
    "scalars": "(alpha a + beta s) / 2, learned in each layer",
    "concat": "a and s side by side",
}
KV_BLOCK = 256  # a layer's K/V grows by whole blocks of so many tokens


class ConfigError(UserError):
    """A config that cannot be a model; the message says which key and what to do."""


@dataclass(frozen=True)
class Layer:
    """One block: which branches it has, how far it sees, and whose keys and values it reads."""

    attention: bool = True
    ssm: bool = True
    mlp: bool = True
    window: int | None = None  # query q sees keys k with q - k <= window; None sees everything
    kv_from: int | None = None  # index of the earlier layer whose K/V this one reads

    @property
    def hybrid(self) -> bool:
        return self.attention and self.ssm

    @property
    def owns_kv(self) -> bool:
        return self.attention and self.kv_from is None

    def kv_places(self, tokens: int) -> int:
        """Tokens a K/V store of this layer has room for once a sequence has so many: whole
        blocks, and a ring of window + 1 (the new token's key included) is never outgrown."""
        places = -(-tokens // KV_BLOCK) * KV_BLOCK
        return places if self.window is None else min(places, self.window + 1)


@dataclass(frozen=True)
class Config:
    """The whole architecture. Sizes are counts of elements; names in brackets are official keys."""

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    num_heads: int  # query heads [num_attention_heads]
    num_kv_heads: int  # [num_key_value_heads]
    intermediate_size: int  # width of the MLP
    meta_tokens: int = 0  # learned tokens in front of every sequence [num_memory_tokens]
    ssm_expand: int = 2  # inner width of the SSM over hidden_size [mamba_expand]
    ssm_state: int = 16  # states per channel [mamba_d_state]
    ssm_conv: int = 4  # width of the causal convolution [mamba_d_conv]
    ssm_dt_rank: int = 0  # 0: hidden_size / 16, rounded up [mamba_dt_rank]
    ssm_conv_bias: bool = True
    fusion: str = "mean"  # how hybrid layers join their branches, one of FUSIONS [hymba_fusion]
    mlp_activation: str = "silu"  # "silu": gated; "relu2": down(relu(up(x))^2), no gate
    rope_type: str = "default"  # or "ntk": a larger base, always on
    rope_theta: float = 10000.0
    max_positions: int = 8192  # text tokens a sequence may have [max_position_embeddings]
    original_max_positions: int = 2048  # "ntk" scales from here [orig_max_position_embeddings]
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    # The config.json this was read from, so that saving it again loses no key.
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.ssm_dt_rank == 0:
            object.__setattr__(self, "ssm_dt_rank", ceil(self.hidden_size / 16))
        _check_sizes(self)
        for index in range(self.num_layers):
            _check_layer(self, index)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head_dim(self) -> int:
        """Width of one query or key head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Channels of the SSM, and width of a hybrid layer's attention output."""
        return self.ssm_expand * self.hidden_size

    @property
    def kv_owners(self) -> list[int]:
        """Layers that compute and keep their own keys and values."""
        return [i for i, layer in enumerate(self.layers) if layer.owns_kv]

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies. "ntk" is static; its factor 2 is the released code's."""
        if self.rope_type == "default":
            return self.rope_theta
        scale = 2 * self.max_positions / self.original_max_positions - 1
        return self.rope_theta * scale ** (self.head_dim / (self.head_dim - 2))

    def value_dim(self, layer: Layer) -> int:
        """Width of a value head: the SSM's inner width shared out in a hybrid, else Llama's."""
        return (self.inner_size if layer.ssm else self.hidden_size) // self.num_heads

    def mixer_size(self, layer: Layer) -> int:
        """Width of what enters a layer's output projection."""
        if layer.hybrid and self.fusion == "concat":
            return 2 * self.inner_size
        return self.inner_size if layer.ssm else self.hidden_size

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)

    @staticmethod
    def preset(name: str) -> Config:
        """A named config, such as "hymba-1.5b"; `hymba.presets.PRESETS` lists them."""
        from hymba.presets import preset

        return preset(name)

    @staticmethod
    def from_dict(keys: Mapping[str, Any]) -> Config:
        """Read official config.json keys (and our own). Raises ConfigError, one line."""
        return _Reader(keys).config()

    @staticmethod
    def from_folder(folder: str | Path) -> Config:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: a model folder has a config.json")
        try:
            keys = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(keys, dict):
            raise ConfigError(f"{path} must hold one JSON object")
        return Config.from_dict(keys)

    def to_dict(self) -> dict[str, Any]:
        """Official config.json keys: those it was read from as long as they still say the same."""
        canonical = _write(self)
        if not self.source:
            return canonical
        if Config.from_dict(self.source) == self:
            return dict(self.source)
        ours = (PLAN_KEY, FUSION_KEY)
        return {**{k: v for k, v in self.source.items() if k not in ours}, **canonical}


def _check_sizes(config: Config) -> None:
    sizes = "vocab_size hidden_size num_heads num_kv_heads intermediate_size ssm_expand ssm_state"
    for name in f"{sizes} ssm_dt_rank ssm_conv max_positions original_max_positions".split():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive whole number, not {value!r}")
    if config.meta_tokens < 0:
        raise ConfigError(f"meta_tokens must be 0 or more, not {config.meta_tokens}")
    if not config.layers:
        raise ConfigError("a model needs at least one layer")
    pad = config.pad_token_id
    if pad is not None and not (_is_whole(pad) and 0 <= pad < config.vocab_size):
        raise ConfigError(f"pad_token_id {pad!r} is not in a vocabulary of {config.vocab_size}")
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} does not divide into {config.num_heads} heads"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head width {config.head_dim} is odd: rotary embedding turns pairs")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{config.num_heads} query heads cannot share {config.num_kv_heads} key/value heads"
            " evenly: num_heads must be a multiple of num_kv_heads"
        )
    if config.mlp_activation not in ("silu", "relu2"):
        raise ConfigError(f"mlp activation {config.mlp_activation!r} is not 'silu' or 'relu2'")
    if config.fusion not in tuple(FUSIONS):  # a tuple: what is no string may not be hashable
        raise ConfigError(f"fusion {config.fusion!r} is not one of {', '.join(FUSIONS)}")
    if config.rope_type not in ("default", "ntk"):
        raise ConfigError(f"rope_type {config.rope_type!r} is not supported: 'default' or 'ntk'")
    if config.rope_type == "ntk" and (config.head_dim == 2 or config.rope_base <= 0):
        raise ConfigError("rope_type 'ntk' needs heads wider than 2 and a positive base")


def _check_layer(config: Config, index: int) -> None:
    layer = config.layers[index]
    name = f"layer {index}"
    if not (layer.attention or layer.ssm):
        raise ConfigError(f"{name} has neither attention nor an SSM")
    if not layer.attention and (layer.window is not None or layer.kv_from is not None):
        raise ConfigError(f"{name} has no attention, so no window and no shared K/V")
    if layer.window is not None and layer.window < 1:
        raise ConfigError(f"{name}: a window of {layer.window} is not possible, 1 is the smallest")
    if layer.kv_from is None:
        return
    if not 0 <= layer.kv_from < config.num_layers:
        raise ConfigError(f"{name} reads K/V of layer {layer.kv_from}, which does not exist")
    if layer.kv_from >= index:
        raise ConfigError(
            f"{name} reads K/V of layer {layer.kv_from}, which comes after it:"
            " a K/V group must start with its producer"
        )
    producer = config.layers[layer.kv_from]
    if not producer.owns_kv:
        raise ConfigError(f"{name} reads K/V of layer {layer.kv_from}, which has none of its own")
    if producer.window != layer.window:
        raise ConfigError(
            f"{name} shares K/V with layer {layer.kv_from} but their windows differ"
            f" ({layer.window} and {producer.window}): a group must not mix window and global"
        )
    if config.value_dim(producer) != config.value_dim(layer):
        raise ConfigError(f"{name} shares K/V with layer {layer.kv_from}: value widths differ")


# Keys that name a variant we do not build: {key: (the values that mean "not used", the reason)}.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "kq_norm": (("none", None), "no released checkpoint has query/key norms"),
    "num_experts": ((1, None), "the released code builds one expert whatever it says; write 1"),
    "memory_tokens_interspersed_every": ((0, -1, None), "only meta tokens in front are supported"),
    "kv_weight_reuse": ((False, None), "sharing K/V weights is not part of the released model"),
    "mamba_proj_bias": ((False, None), "the released projections have no bias"),
    "mamba_inner_layernorms": ((True, None), "the released SSM always norms dt, B and C"),
    "attention_dropout": ((0, 0.0, None), "dropout is not supported; write 0.0"),
    "num_mamba": ((1, None), "one SSM of all channels is what the released code builds"),
    "attn_hidden_size": ((-1, 0, None), "attention of another width is not supported; write -1"),
}


class _Reader:
    """Turns official keys into a Config. Missing sizes are errors: the class defaults of the
    released code (16 experts, no RoPE) are not the released model's values."""

    def __init__(self, keys: Mapping[str, Any]):
        self.keys = keys

    def need(self, key: str) -> Any:
        if self.keys.get(key) is None:
            raise ConfigError(f"config.json has no {key!r}")
        return self.keys[key]

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key must be there."""
        value = self.need(key) if default is None else self.get(key, default)
        if not _is_whole(value):
            raise ConfigError(f"config.json: {key} must be a whole number, not {value!r}")
        return int(value)

    def indices(self, key: str, count: int) -> list[int] | None:
        """Numbers of layers, or None where the key says nothing."""
        return None if self.keys.get(key) is None else _indices(key, self.keys[key], count)

    def get(self, key: str, default: Any) -> Any:
        value = self.keys.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def config(self) -> Config:
        self.refuse_other_models()
        head_dim = self.get("kq_head_dim", -1)
        config = Config(
            vocab_size=self.count("vocab_size"),
            hidden_size=self.count("hidden_size"),
            layers=self.layers(),
            num_heads=self.count("num_attention_heads"),
            num_kv_heads=self.count("num_key_value_heads"),
            intermediate_size=self.count("intermediate_size"),
            fusion=self.get(FUSION_KEY, "mean"),
            meta_tokens=self.count("num_memory_tokens", 0),
            ssm_expand=self.count("mamba_expand"),
            ssm_state=self.count("mamba_d_state"),
            ssm_conv=self.count("mamba_d_conv"),
            ssm_dt_rank=0 if self.need("mamba_dt_rank") == "auto" else self.count("mamba_dt_rank"),
            ssm_conv_bias=bool(self.get("mamba_conv_bias", True)),
            mlp_activation=self.get("mlp_hidden_act", self.get("hidden_act", "silu")),
            rope_type=self.get("rope_type", "default"),
            rope_theta=self.number("rope_theta", 10000.0),
            max_positions=self.count("max_position_embeddings"),
            original_max_positions=self.count(
                "orig_max_position_embeddings", self.count("max_position_embeddings")
            ),
            norm_eps=self.number("rms_norm_eps", 1e-6),
            initializer_range=self.number("initializer_range", 0.02),
            tie_embeddings=bool(self.get("tie_word_embeddings", False)),
            bos_token_id=self.keys.get("bos_token_id"),
            eos_token_id=self.keys.get("eos_token_id"),
            pad_token_id=self.keys.get("pad_token_id"),
            source=dict(self.keys),
        )
        if head_dim not in (-1, config.head_dim):
            raise ConfigError(f"kq_head_dim {head_dim} is not hidden_size / heads; write -1")
        return config

    def refuse_other_models(self) -> None:
        if self.keys.get("model_type") != "hymba":
            kind = self.keys.get("model_type")
            raise ConfigError(f"config.json has model_type {kind!r}, which is not 'hymba'")
        if self.keys.get("rope") is not True:
            raise ConfigError("config.json must say rope: true (a model without RoPE is not Hymba)")
        for key, (unused, reason) in _REFUSED.items():
            value = self.keys.get(key)
            if value not in unused:
                raise ConfigError(f"config.json: {key}={value!r} is not supported: {reason}")

    def layers(self) -> tuple[Layer, ...]:
        count = self.count("num_hidden_layers")
        if count < 1:
            raise ConfigError("a model needs at least one layer, num_hidden_layers says none")
        if PLAN_KEY in self.keys:
            return _read_plan(self.keys[PLAN_KEY], count)
        window, kv_from = self.keys.get("sliding_window"), self.kv_from(count)
        global_layers = self.indices("global_attn_idx", count)
        if window is None:
            return tuple(Layer(kv_from=kv_from.get(i)) for i in range(count))
        if global_layers is None:
            raise ConfigError(
                "config.json has sliding_window but no global_attn_idx: list the layers that see"
                " everything ([] for none)"
            )
        reach = self.count("sliding_window")
        return tuple(
            Layer(window=None if i in global_layers else reach, kv_from=kv_from.get(i))
            for i in range(count)
        )

    def kv_from(self, count: int) -> dict[int, int]:
        """{consumer: producer}, from the groups or from the "every n-th layer" rule."""
        groups, every = self.keys.get("kv_reuse_group"), self.count("kv_reuse_every_i_layer", -1)
        if groups is None:
            return {i: i - i % every for i in range(count) if i % every} if every > 0 else {}
        if not isinstance(groups, (list, tuple)):
            raise ConfigError(
                f"config.json: kv_reuse_group must be lists of layers, not {groups!r}"
            )
        shared: dict[int, int] = {}
        for group in groups:
            producer, *consumers = _indices("kv_reuse_group", group, count) or [0]
            for consumer in consumers:
                if consumer in shared:
                    raise ConfigError(f"kv_reuse_group: layer {consumer} is in two groups")
                shared[consumer] = producer
        return shared


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()  # not nan, not inf
    return isinstance(value, int) and not isinstance(value, bool)


def _indices(key: str, value: Any, count: int) -> list[int]:
    if not isinstance(value, (list, tuple)) or not all(map(_is_whole, value)):
        raise ConfigError(f"config.json: {key} must list layers, not {value!r}")
    absent = [index for index in value if not 0 <= index < count]
    if absent:
        raise ConfigError(f"config.json: {key} names layer {absent[0]}, which does not exist")
    return [int(index) for index in value]


def _read_plan(plan: Any, count: int) -> tuple[Layer, ...]:
    try:
        layers = tuple(Layer(**entry) for entry in plan)
    except TypeError as error:
        raise ConfigError(f"config.json: {PLAN_KEY} cannot be read: {error}") from None
    if len(layers) != count:
        raise ConfigError(f"{PLAN_KEY} lists {len(layers)} layers, num_hidden_layers is {count}")
    return layers


def _write_plan(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """Only what differs from a plain global hybrid layer."""
    default = dataclasses.asdict(Layer())
    entries = [dataclasses.asdict(layer) for layer in layers]
    return [{k: v for k, v in entry.items() if v != default[k]} for entry in entries]


def _groups(layers: tuple[Layer, ...]) -> list[list[int]] | None:
    groups: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.kv_from is not None:
            groups.setdefault(layer.kv_from, [layer.kv_from]).append(index)
    return [groups[producer] for producer in sorted(groups)] or None


def _is_official(layers: tuple[Layer, ...]) -> bool:
    """Can the official keys say this plan? Hybrid everywhere and one window size."""
    windows = {layer.window for layer in layers} - {None}
    return all(layer.hybrid and layer.mlp for layer in layers) and len(windows) <= 1


def _write(config: Config) -> dict[str, Any]:
    """The official config.json of a config, sorted as transformers writes it."""
    layers, window = config.layers, next((x.window for x in config.layers if x.window), None)
    global_layers = [i for i, layer in enumerate(layers) if layer.window is None]
    kernel = "flex" if config.meta_tokens else "flash_attention_2"  # what the released code takes
    keys: dict[str, Any] = {
        "architectures": ["HymbaForCausalLM"],
        "attention_dropout": 0.0,
        "attn_hidden_size": -1,
        "attn_implementation": kernel,
        "attn_implementation_new": kernel,
        "bos_token_id": config.bos_token_id,
        "calc_logits_for_entire_prompt": False,
        "conv_dim": {str(i): config.inner_size for i in range(config.num_layers)},
        "eos_token_id": config.eos_token_id,
        "global_attn_idx": global_layers,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "kq_head_dim": -1,
        "kq_norm": "none",
        "kv_reuse_every_i_layer": -1,
        "kv_reuse_group": _groups(layers),
        "kv_weight_reuse": False,
        "layer_type": ["h"] * config.num_layers,
        "mamba_conv_bias": config.ssm_conv_bias,
        "mamba_d_conv": config.ssm_conv,
        "mamba_d_state": config.ssm_state,
        "mamba_dt_rank": config.ssm_dt_rank,
        "mamba_expand": config.ssm_expand,
        "mamba_inner_layernorms": True,
        "mamba_proj_bias": False,
        "max_position_embeddings": config.max_positions,
        "memory_tokens_interspersed_every": 0,
        "mlp_hidden_act": config.mlp_activation,
        "model_type": "hymba",
        "num_attention_heads": config.num_heads,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_mamba": 1,
        "num_memory_tokens": config.meta_tokens,
        "orig_max_position_embeddings": config.original_max_positions,
        "output_router_logits": False,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_theta": config.rope_theta,
        "rope_type": config.rope_type,
        "router_aux_loss_coef": 0.001,
        "seq_length": config.max_positions,
        "sliding_window": window,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "use_mamba_kernels": True,
        "v_head_dim": config.inner_size // config.num_heads,
        "vocab_size": config.vocab_size,
    }
    if not _is_official(layers):
        keys[PLAN_KEY] = _write_plan(layers)
    if config.fusion != "mean":
        keys[FUSION_KEY] = config.fusion
    return keys
