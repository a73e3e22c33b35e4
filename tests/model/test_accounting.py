"""What accounting.py says without torch is what the model has, does and holds. Cache bytes are
compared with real allocations in test_cache.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hymba.config import FUSIONS, Config, ConfigError
from hymba.model import accounting
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.presets import PRESETS, hymba, llama, mamba, samba

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
Tiny = Callable[[str], Config]
WIDTH = {"hidden_size": 64, "vocab_size": 512}
HEADS = {"num_heads": 4, "num_kv_heads": 2}


def empty(config: Config) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)


def count(module: nn.Module, *parts: str) -> int:
    """Parameters whose name has one of these parts."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if any(part in f".{name}" for part in parts))


VARIANTS = [{}, {"mlp_activation": "relu2"}, {"ssm_conv_bias": False}, {"tie_embeddings": False}]
VARIANTS += [{"fusion": fusion} for fusion in FUSIONS]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters(plan: str, changes: dict[str, object], tiny: Tiny) -> None:
    config = tiny(plan).replace(**changes)
    model, found = empty(config), accounting.parameters(config)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert found["embedding"] == count(model, ".embed_tokens.")
    assert found["head"] == count(model, ".lm_head.")
    assert found["meta_tokens"] == count(model, ".meta_tokens.")
    assert found["mixer"] == count(model, ".in_proj.", ".out_proj.")
    assert found["ssm"] == count(model, ".ssm.")
    assert found["mlp"] == count(model, ".mlp.")
    names = (".input_norm.", ".mlp_norm.", ".attention_norm.", ".ssm_norm.", ".final_norm.")
    names += (".scales.",)
    assert found["norms"] == count(model, *names)
    assert found["total"] == sum(n for part, n in found.items() if part != "total")


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    config = Config.preset(name)
    want = sum(p.numel() for p in empty(config).parameters())
    assert accounting.parameters(config)["total"] == want


@pytest.mark.parametrize("plan", PLANS)
def test_flops_of_projections(plan: str, tiny: Tiny) -> None:
    """Twice every weight of a linear layer; what is beyond is the convolution, the scan and
    attention, which grow with nothing but their own sizes."""
    config, model = tiny(plan), empty(tiny(plan))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    ssm = sum(layer.ssm for layer in config.layers) * config.inner_size
    elementwise = ssm * (2 * config.ssm_conv + accounting.SCAN_FLOPS * config.ssm_state)
    attention = 0
    for layer in config.layers:
        if layer.attention:
            keys = 1 + config.meta_tokens
            attention += 2 * config.num_heads * keys * (config.head_dim + config.value_dim(layer))
    want = 2 * linear + elementwise + attention
    assert accounting.flops_per_token(config, context=1) == want


@pytest.mark.parametrize("plan", ["hymba", "llama", "samba"])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 4), (1, 5), (1, 30), (17, 0), (9, 3)])
def test_flops_of_attention(plan: str, tokens: int, past: int, tiny: Tiny) -> None:
    """Each row pays for the keys it sees, counted one by one, and for its meta tokens."""
    config = tiny(plan)
    want = 0
    for layer in config.layers:
        if not layer.attention:
            continue
        widths = config.head_dim + config.value_dim(layer)
        for row in range(past, past + tokens):
            seen = [k for k in range(row + 1) if layer.window is None or row - k <= layer.window]
            want += 2 * config.num_heads * widths * (len(seen) + config.meta_tokens)
    # One token without attention, from the difference of two contexts that cost the same.
    base = accounting.forward_flops(config, 1)
    first = sum(
        2 * config.num_heads * (config.head_dim + config.value_dim(x)) * (1 + config.meta_tokens)
        for x in config.layers
        if x.attention
    )
    assert accounting.forward_flops(config, tokens, past) == tokens * (base - first) + want


def test_flops_of_parts_are_those_of_the_whole(tiny: Tiny) -> None:
    """Chunks of a prefill cost what the prefill costs; rows that need no logits cost no head."""
    config = tiny("hymba")
    whole = accounting.forward_flops(config, 40)
    cuts = [0, 3, 20, 40]
    parts = [
        accounting.forward_flops(config, b - a, past=a)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    assert sum(parts) == whole
    head = 2 * config.vocab_size * config.hidden_size
    assert whole - accounting.forward_flops(config, 40, logits=1) == 39 * head


def test_a_window_layer_has_a_ceiling() -> None:
    """Llama's cost grows with the context for ever; with windows alone it does not."""
    sizes = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
    bounded = hymba(window=16, global_layers=(), **sizes, **WIDTH)
    growing = llama(**sizes, **WIDTH)
    flops, held = accounting.flops_per_token, accounting.cache_bytes
    assert flops(bounded, 17) == flops(bounded, 4096) > flops(bounded, 16)
    assert flops(growing, 4096) > flops(growing, 4095)
    assert held(bounded, 300)["total"] == held(bounded, 8192)["total"]
    assert held(growing, 8192)["total"] > 31 * held(growing, 256)["total"]


def test_cache_of_the_15b() -> None:
    """By hand: 3 global layers of 8192 places, 14 rings of 1025, K/V of 960 numbers a token; 32
    states of 3200 x 16 and 3 x 3200 convolution inputs."""
    found = accounting.cache_bytes(Config.preset("hymba-1.5b"), 8192)
    assert found["global_kv"] == 3 * 8192 * 960 * 2
    assert found["window_kv"] == 14 * 1025 * 960 * 2
    assert found["ssm"] == 32 * 3200 * 16 * 4
    assert found["conv"] == 32 * 3 * 3200 * 2
    assert found["meta"] == 17 * 128 * 960 * 2 + found["ssm"] + found["conv"]
    assert found["total"] == 47_185_920 + 27_552_000 + 6_553_600 + 614_400
    assert accounting.paper_cache_bytes(Config.preset("hymba-1.5b")) == pytest.approx(
        78.6e6, rel=0.05
    )


def test_cache_of_llama() -> None:
    found = accounting.cache_bytes(Config.preset("llama-3.2-3b"), 8192)
    assert found["global_kv"] == found["total"] == 28 * 8192 * 2 * 8 * 128 * 2
    assert found["meta"] == 0


PLANS_TO_FIT: dict[str, Callable[[int], Config]] = {
    "hymba": lambda width: hymba(
        num_layers=5, intermediate_size=width, window=16, meta_tokens=4, **WIDTH, **HEADS
    ),
    "llama": lambda width: llama(num_layers=5, intermediate_size=width, **WIDTH, **HEADS),
    "mamba": lambda width: mamba(num_layers=5, hidden_size=width, vocab_size=512),
    "samba": lambda width: samba(
        num_layers=6, intermediate_size=width, window=16, **WIDTH, **HEADS
    ),
}


@pytest.mark.parametrize("plan", PLANS_TO_FIT)
@pytest.mark.parametrize("budget", [600_000, 1_000_000])
def test_fit_finds_the_nearest(plan: str, budget: int) -> None:
    """No other multiple of 8 comes nearer: controlled comparisons stand on this."""

    def total(width: int) -> int:
        return accounting.parameters(PLANS_TO_FIT[plan](width))["total"]

    config = accounting.fit(PLANS_TO_FIT[plan], budget, tolerance=0.05)
    off = abs(accounting.parameters(config)["total"] - budget)
    assert off == min(abs(total(width) - budget) for width in range(8, 1200, 8))
    assert off <= 0.05 * budget


def test_fit_says_when_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="the nearest to 1000 parameters is"):
        accounting.fit(PLANS_TO_FIT["llama"], 1000)
    with pytest.raises(ConfigError, match="change the other sizes"):
        accounting.fit(PLANS_TO_FIT["llama"], 600_000, multiple=500)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_step_bytes_are_those_of_the_tensors(plan: str, tokens: int, tiny: Tiny, lively) -> None:
    """Every weight that a step reads, what is seen of the caches' K/V, states read and written."""
    config = tiny(plan)
    model = lively(config)
    found = accounting.step_bytes(config, tokens, 3, weight_bytes=4, kv_bytes=4, state_bytes=4)
    unread = [model.decoder.meta_tokens] if model.decoder.meta_tokens else []
    unread += [] if config.tie_embeddings else [model.decoder.embed_tokens]
    idle = sum(p.nbytes for module in unread for p in module.parameters())
    assert found["weights"] == sum(p.nbytes for p in model.parameters()) - idle
    cache = model.new_cache(3)
    with torch.no_grad():
        model(torch.ones(3 * tokens, dtype=torch.long), Batch.of([tokens] * 3), cache)
    owned = [kv for kv in cache.kv if kv is not None]
    seen = [min(tokens, kv.ring or tokens) / kv.k.shape[2] for kv in owned]
    pairs = zip(owned, seen, strict=True)
    assert found["kv"] == round(sum((kv.k.nbytes + kv.v.nbytes) * share for kv, share in pairs))
    states = [x.nbytes for ssm in cache.ssm if ssm is not None for x in (ssm.conv, ssm.ssm)]
    assert found["states"] == 2 * sum(states)
    meta = [x.nbytes for state in cache.meta for x in state[:2] if x is not None]
    assert found["meta"] == sum(meta)
    assert found["total"] == sum(found[part] for part in ("weights", "meta", "kv", "states"))


def test_step_bytes_of_what_is_shared() -> None:
    """In the 1.5B 15 window layers read what 14 own; Llama shares nothing."""
    found = accounting.step_bytes(Config.preset("hymba-1.5b"), 8192, batch=128)
    assert found["again"] == 15 * (128 * 1025 + 128) * 5 * (64 + 128) * 2
    assert found["total"] == 14_450_825_728
    assert accounting.step_bytes(Config.preset("llama-3.2-3b"), 8192, 128)["again"] == 0
