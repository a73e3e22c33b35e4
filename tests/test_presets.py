"""Named configs are the published models, to the last parameter."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from hymba.config import Config, ConfigError, Layer
from hymba.model.accounting import cache_bytes
from hymba.model.decoder import LanguageModel
from hymba.presets import (
    PRESETS,
    first_middle_last,
    hymba,
    llama,
    mamba,
    pairs,
    samba,
    scattered,
    sequential,
)
from hymba.weights import to_official, to_ours


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its official name, without memory for it."""
    with torch.device("meta"):
        model = LanguageModel(Config.preset(name))
    return {to_official(key): tuple(p.shape) for key, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "parameters", "owners"),
    [
        ("hymba-1.5b", 1_522_797_824, 17),
        ("hymba-350m", 354_291_712, 18),
        ("hymba-125m", 130_337_280, 14),
        ("llama-3.2-1b", 1_235_814_400, 16),
        ("llama-3.2-3b", 3_212_749_824, 28),
    ],
)
def test_exact_sizes(name: str, parameters: int, owners: int) -> None:
    with torch.device("meta"):
        model = LanguageModel(Config.preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.config.kv_owners) == owners


def released_checkpoint() -> dict[str, tuple[int, ...]]:
    """The 611 tensors of NVIDIA's Hymba-1.5B: names and shapes as published."""
    D, E, F, R, N, K = 1600, 3200, 5504, 100, 16, 4
    consumers = {2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30}
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32001, D),
        "model.memory_tokens": (128, D),
        "model.final_layernorm.weight": (D,),
    }
    for i in range(32):
        found |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (D,),
                "pre_moe_layernorm.weight": (D,),
                "mamba.in_proj.weight": (8000 if i in consumers else 8960, D),
                "mamba.out_proj.weight": (D, E),
                "mamba.conv1d.weight": (E, 1, K),
                "mamba.conv1d.bias": (E,),
                "mamba.x_proj.0.weight": (R + 2 * N, E),
                "mamba.dt_proj.0.weight": (E, R),
                "mamba.dt_proj.0.bias": (E,),
                "mamba.A_log.0": (E, N),
                "mamba.D.0": (E,),
                "mamba.dt_layernorm.weight": (R,),
                "mamba.B_layernorm.weight": (N,),
                "mamba.C_layernorm.weight": (N,),
                "mamba.pre_avg_layernorm1.weight": (E,),
                "mamba.pre_avg_layernorm2.weight": (E,),
                "moe.experts.0.gate_proj.weight": (F, D),
                "moe.experts.0.up_proj.weight": (F, D),
                "moe.experts.0.down_proj.weight": (D, F),
            }.items()
        }
    return found


def test_the_released_checkpoint() -> None:
    want = released_checkpoint()
    assert len(want) == 611
    assert shapes("hymba-1.5b") == want
    for name in want:
        assert to_official(to_ours(name)) == name


def test_plan_of_the_15b() -> None:
    config = Config.preset("hymba-1.5b")
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == [0, 15, 31]
    assert {layer.window for layer in config.layers} == {None, 1024}
    groups = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18]]
    groups += [[19, 20], [21, 22], [23, 24], [25, 26], [27, 28], [29, 30]]
    found = config.to_dict()
    assert found["kv_reuse_group"] == groups
    assert found["global_attn_idx"] == [0, 15, 31]
    assert config.rope_base == pytest.approx(74534.8303, abs=1e-3)
    assert (config.head_dim, config.value_dim(config.layers[0])) == (64, 128)
    assert (config.meta_tokens, config.ssm_dt_rank) == (128, 100)
    assert "hymba_plan" not in found


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_of_its_config_json(name: str) -> None:
    """Written and read again it is the same; the tiny ones are small enough for a laptop."""
    config = Config.preset(name)
    assert Config.from_dict(config.to_dict()) == config
    if name.endswith("-tiny"):
        with torch.device("meta"):
            assert sum(p.numel() for p in LanguageModel(config).parameters()) < 5e6


def test_llama_is_llama() -> None:
    """Nothing of the hybrid is left: 9 tensors a layer in transformers, 6 here with q, k and v in
    one projection, and no norm or scan among them."""
    names = [n for n in shapes("llama-3.2-1b") if n.startswith("model.layers.3.")]
    assert len(names) == 7
    assert not any(part in n for n in names for part in ("conv", "A_log", "pre_avg", "x_proj"))
    assert shapes("llama-3.2-1b")["model.layers.3.mamba.in_proj.weight"] == (2048 + 2 * 512, 2048)
    assert shapes("llama-3.2-1b")["model.layers.3.mamba.out_proj.weight"] == (2048, 2048)


def test_sharing_in_pairs() -> None:
    """From each global layer on; an odd one out keeps its own."""
    assert pairs(7, (0, 3, 6)) == [[1, 2], [4, 5]]
    assert pairs(8, (0, 3, 7)) == [[1, 2], [4, 5]]
    assert pairs(4, ()) == [[0, 1], [2, 3]]
    assert pairs(1, ()) == pairs(3, (0, 1, 2)) == []


@pytest.mark.parametrize(
    ("layers", "want"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (32, (0, 15, 31))]
)
def test_first_middle_last(layers: int, want: tuple[int, ...]) -> None:
    assert first_middle_last(layers) == want


def test_plans_are_laid_out_as_named() -> None:
    sizes = {"hidden_size": 32, "vocab_size": 61}
    heads = {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40}
    assert not any(x.mlp or x.attention for x in mamba(num_layers=3, **sizes).layers)
    assert all(x.mlp for x in mamba(num_layers=3, mlp=True, intermediate_size=40, **sizes).layers)
    turns = samba(num_layers=5, window=8, **sizes, **heads).layers
    assert [x.attention for x in turns] == [False, True] * 2 + [False]
    assert {x.window for x in turns if x.attention} == {8}
    alone = hymba(num_layers=6, share=False, **sizes, **heads)
    assert len(alone.kv_owners) == 6 and all(x.hybrid for x in alone.layers)


SIZES = {
    "hidden_size": 32,
    "vocab_size": 61,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 40,
}


def test_by_turns() -> None:
    """The paper's table 1, row A: the SSM first, attention that sees everything."""
    ssm, attention = Layer(attention=False), Layer(ssm=False)
    assert sequential(num_layers=4, **SIZES).layers == (ssm, attention, ssm, attention)
    assert sequential(num_layers=4, window=8, **SIZES) == samba(num_layers=4, window=8, **SIZES)


def test_attention_in_some_layers() -> None:
    """The others have the SSM alone; who sees everything and who shares goes by the neighbours
    that have attention."""
    config = hymba(num_layers=9, attention_layers=(7, 1, 3, 4, 5, 6), window=8, **SIZES)
    assert [i for i, x in enumerate(config.layers) if not x.attention] == [0, 2, 8]
    assert all(x.ssm and x.mlp for x in config.layers)
    assert [x.window for x in config.layers if x.attention] == [None, 8, None, 8, 8, None]
    assert [x.kv_from for x in config.layers if x.attention] == [None] * 4 + [5, None]
    far = hymba(num_layers=9, attention_layers=(1, 4, 7), global_layers=(), window=8, **SIZES)
    assert [i for i, x in enumerate(far.layers) if x.kv_from == 1] == [4]
    assert not any(x.attention for x in hymba(num_layers=3, attention_layers=(), **SIZES).layers)
    every = hymba(num_layers=9, attention_layers=range(9), **SIZES)
    assert every == hymba(num_layers=9, **SIZES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_layers": (1, 9)}, "attention_layers names layer 9, which does not exist"),
        ({"attention_layers": (-1,)}, "attention_layers names layer -1, which does not exist"),
        ({"attention_layers": (1,), "global_layers": (0,)}, "global_layers names layer 0, which"),
        ({"global_layers": (0, 9)}, "global_layers names layer 9, which has no attention"),
        ({"attention_layers": (1, 2), "share": [[1, 3]]}, "share names layer 3, which has no"),
        ({"attention_layers": (1, 2), "share": [[0, 2]]}, "which has none of its own"),
    ],
)
def test_layers_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hymba(num_layers=9, window=None, **changes, **SIZES)


def test_scattered() -> None:
    """Evenly, never first or last, as many as were asked for."""
    assert scattered(12, 3) == (2, 5, 8) and scattered(32, 1) == (15,)
    assert scattered(5, 3) == (1, 2, 3) and scattered(1, 0) == scattered(0, 0) == ()
    for layers in range(2, 40):
        for count in range(layers - 1):
            found = scattered(layers, count)
            assert len(set(found)) == count and not {0, layers - 1} & set(found)
            gaps = [b - a for a, b in pairwise([0, *found, layers - 1])]
            assert max(gaps) - min(gaps) <= 1
    for count in (-1, 4):
        with pytest.raises(ConfigError, match=f"{count} of 5 layers cannot be scattered"):
            scattered(5, count)


def test_llama_with_the_cache_of_hymba() -> None:
    """The paper's table 10, row 10: the same windows, the same sharing, no SSM. Its values are
    half as wide, so it keeps two thirds of the K/V."""
    hybrid = hymba(num_layers=8, window=6, meta_tokens=2, **SIZES)
    compressed = llama(num_layers=8, window=6, share=True, meta_tokens=2, **SIZES)
    assert compressed.layers == tuple(replace(x, ssm=False) for x in hybrid.layers)
    assert [x.kv_from for x in compressed.layers].count(None) < 8
    kept, kept_by_hybrid = (cache_bytes(x, 300) for x in (compressed, hybrid))
    for kind in ("global_kv", "window_kv"):
        assert 3 * kept[kind] == 2 * kept_by_hybrid[kind] > 0
    assert llama(num_layers=2, **SIZES).layers == (Layer(ssm=False),) * 2


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(
        ConfigError, match="no preset is called 'hymba-1.5'; did you mean hymba-1.5b"
    ):
        Config.preset("hymba-1.5")
    with pytest.raises(ConfigError, match="there are: hymba-1.5b"):
        Config.preset("qqqq")
