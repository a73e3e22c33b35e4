"""Configs: official keys in and out without loss, and a precise refusal of what cannot be a model.

A config that is read wrongly gives a model that runs and is wrong: so what is not understood is an
error of one line that names the key.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba.config import FUSION_KEY, FUSIONS, PLAN_KEY, Config, ConfigError, Layer
from hymba.errors import UserError
from hymba.presets import llama

GOLDEN = Path(__file__).parent / "golden"
CASES = ["plain", "swa_meta", "kvshare", "ntk", "full"]
PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
Tiny = Callable[[str], Config]


def official(**changes: Any) -> dict[str, Any]:
    """The 1.5B in miniature, as a released config.json has it; None takes a key out."""
    keys = json.loads((GOLDEN / "full" / "config.json").read_text()) | changes
    return {key: value for key, value in keys.items() if value is not ...}


# Reading


def test_the_15b_in_miniature() -> None:
    config = Config.from_dict(official())
    assert (config.hidden_size, config.num_heads, config.num_kv_heads) == (60, 10, 2)
    assert (config.head_dim, config.inner_size, config.value_dim(config.layers[0])) == (6, 120, 12)
    assert [layer.window for layer in config.layers] == [None, 12, 12, None, 12, 12, 12, None]
    assert [layer.kv_from for layer in config.layers] == [None, None, 1, None, None, 4, 4, None]
    assert config.kv_owners == [0, 1, 3, 4, 7]
    assert (config.meta_tokens, config.ssm_state, config.ssm_dt_rank, config.ssm_conv) == (
        8,
        16,
        4,
        4,
    )
    assert config.rope_base == pytest.approx(10000 * (2 * 128 / 32 - 1) ** (6 / 4))
    assert config.tie_embeddings and config.norm_eps == 1e-6


def test_no_window_and_no_global_layers() -> None:
    """Three ways to say which layers see everything; [] is a model of windows alone."""

    def windows(**changes: Any) -> list[int | None]:
        keys = official(kv_reuse_group=None, **changes)
        return [layer.window for layer in Config.from_dict(keys).layers]

    assert windows(global_attn_idx=[]) == [12] * 8
    assert windows(sliding_window=None, global_attn_idx=None) == [None] * 8
    assert windows(sliding_window=None) == [None] * 8
    assert windows(global_attn_idx=[2]) == [12, 12, None, 12, 12, 12, 12, 12]


def test_kv_of_every_ith_layer() -> None:
    """Layer i reads its predecessor's unless i % n is 0; groups, where given, say it instead."""
    every = official(kv_reuse_group=None, kv_reuse_every_i_layer=3, global_attn_idx=[])
    found = [layer.kv_from for layer in Config.from_dict(every).layers]
    assert found == [None, 0, 0, None, 3, 3, None, 6]
    for nothing in (1, 0, -1, None):
        every["kv_reuse_every_i_layer"] = nothing
        assert Config.from_dict(every).kv_owners == list(range(8))
    both = official(kv_reuse_every_i_layer=2)
    assert Config.from_dict(both).kv_owners == [0, 1, 3, 4, 7]


def test_defaults_of_absent_keys() -> None:
    """Sizes have none; these have, and they are not the released class's."""
    gone = ["rope_type", "tie_word_embeddings", "num_memory_tokens", "kq_head_dim", "kq_norm"]
    gone += ["rms_norm_eps", "mamba_conv_bias", "orig_max_position_embeddings", "mlp_hidden_act"]
    config = Config.from_dict(official(**dict.fromkeys(gone, ...)))
    assert (config.rope_type, config.meta_tokens, config.norm_eps) == ("default", 0, 1e-6)
    assert config.ssm_conv_bias and not config.tie_embeddings
    assert config.original_max_positions == config.max_positions == 128
    assert config.mlp_activation == "silu"


def test_dt_rank_auto() -> None:
    assert Config.from_dict(official(mamba_dt_rank="auto")).ssm_dt_rank == 4  # 60 / 16, upwards


def test_numbers_as_json_may_write_them() -> None:
    assert Config.from_dict(official(hidden_size=60.0)).hidden_size == 60
    assert Config.from_dict(official(rope_theta=10000)).rope_theta == 10000.0


# Writing


@pytest.mark.parametrize("case", CASES)
def test_official_keys_survive(case: str) -> None:
    """Every key and value, those that we do not use and the strings in `conv_dim` included."""
    keys = json.loads((GOLDEN / case / "config.json").read_text())
    config = Config.from_dict(keys)
    assert Config.from_folder(GOLDEN / case) == config
    written = config.to_dict()
    assert written == keys
    assert json.loads(json.dumps(written)) == keys
    assert set(written["conv_dim"]) == {str(i) for i in range(config.num_layers)}
    assert not {PLAN_KEY, FUSION_KEY} & set(written)


@pytest.mark.parametrize("case", CASES)
def test_own_writing_says_the_same(case: str) -> None:
    """Without the file it came from, a config writes the keys that it would have come from, down
    to the attention that the released code needs where there are no meta tokens."""
    keys = json.loads((GOLDEN / case / "config.json").read_text())
    written = Config.from_dict(keys).replace(source={}).to_dict()
    assert Config.from_dict(written) == Config.from_dict(keys)
    aside = {
        "use_cache",
        "torch_dtype",
        "transformers_version",
        "global_attn_idx",
        "sliding_window",
    }
    assert {k: written.get(k) for k in keys if k not in aside} == {
        k: keys[k] for k in keys if k not in aside
    }


def test_unknown_keys_survive_a_change() -> None:
    config = Config.from_dict(official(my_note={"a": [1]}, rope_theta=10000))
    assert config.to_dict()["my_note"] == {"a": [1]}
    changed = config.replace(rope_theta=500.0, layers=config.layers[:3])
    written = changed.to_dict()
    assert written["my_note"] == {"a": [1]} and written["rope_theta"] == 500.0
    assert written["num_hidden_layers"] == 3 and len(written["conv_dim"]) == 3
    assert Config.from_dict(written) == changed


@pytest.mark.parametrize("plan", PLANS)
def test_plans_survive(plan: str, tiny: Tiny) -> None:
    """A plan that the official keys cannot say is written in one more key, and only then."""
    config = tiny(plan)
    written = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(written) == config
    assert (PLAN_KEY in written) == (not plan.startswith("hymba"))


def test_a_plan_that_becomes_official_again() -> None:
    """The extra key must not outlive what it was for."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    config = Config.from_dict(llama(num_layers=2, intermediate_size=40, **sizes).to_dict())
    assert PLAN_KEY in config.to_dict()
    hybrid = config.replace(layers=(Layer(), Layer(window=8)))
    assert PLAN_KEY not in hybrid.to_dict()
    assert Config.from_dict(hybrid.to_dict()) == hybrid


LAYERS = st.builds(
    Layer,
    attention=st.just(True),
    ssm=st.booleans(),
    mlp=st.booleans(),
    window=st.sampled_from([None, 3, 9]),
) | st.builds(Layer, attention=st.just(False), mlp=st.booleans())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_survives(fusion: str, tiny: Tiny) -> None:
    """It has a key of its own, which a released model does not need, and which does not outlive
    what it was for. A plan without hybrid layers keeps it too."""
    for plan in PLANS:
        written = json.loads(json.dumps(tiny(plan).replace(fusion=fusion).to_dict()))
        assert written.pop(FUSION_KEY, "mean") == fusion
        assert written == tiny(plan).to_dict()
    config = Config.from_dict(official(**{FUSION_KEY: fusion}))
    assert config.fusion == fusion and config.to_dict()[FUSION_KEY] == fusion
    assert FUSION_KEY not in config.replace(fusion="mean", norm_eps=1e-5).to_dict()
    assert Config.from_dict(official(**{FUSION_KEY: None})).fusion == "mean"


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=5),
    shares=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.fixed_dictionaries(
        {},
        optional={
            "meta_tokens": st.integers(0, 4),
            "fusion": st.sampled_from(list(FUSIONS)),
            "rope_type": st.sampled_from(["default", "ntk"]),
            "mlp_activation": st.sampled_from(["silu", "relu2"]),
            "tie_embeddings": st.booleans(),
            "ssm_conv_bias": st.booleans(),
            "ssm_expand": st.integers(1, 3),
            "ssm_dt_rank": st.integers(1, 9),
            "norm_eps": st.sampled_from([1e-5, 1e-6]),
            "bos_token_id": st.none() | st.integers(0, 60),
            "max_positions": st.integers(2048, 9999),
        },
    ),
)
def test_any_config_survives(layers: list[Layer], shares: list[int], sizes: dict[str, Any]) -> None:
    """Whatever can be a model is the same model after a round through config.json."""
    for index, producer in enumerate(shares, start=1):
        if index < len(layers) and producer < index and layers[index].attention:
            layers[index] = Layer(**vars(layers[index]) | {"kv_from": producer})
    try:
        config = Config(
            vocab_size=61, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=40,
            layers=tuple(layers), **sizes,
        )  # fmt: skip
    except ConfigError:
        return
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Refusals

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type 'llama'"),
    "no model type": ({"model_type": ...}, "model_type None"),
    "no rope": ({"rope": False}, "rope: true"),
    "rope absent": ({"rope": ...}, "rope: true"),
    "heads do not divide": ({"num_attention_heads": 7}, "60 does not divide into 7 heads"),
    "odd heads": ({"num_attention_heads": 20, "num_key_value_heads": 2}, "head width 3 is odd"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "num_kv_heads"),
    "no heads": ({"num_attention_heads": 0}, "num_heads must be a positive"),
    "negative size": ({"hidden_size": -60}, "hidden_size must be a positive"),
    "half a layer": ({"num_hidden_layers": 7.5}, "num_hidden_layers must be a whole number"),
    "a word for a number": ({"hidden_size": "60"}, "hidden_size must be a whole number"),
    "truth for a number": ({"hidden_size": True}, "hidden_size must be a whole number"),
    "not a number": ({"hidden_size": float("nan")}, "hidden_size must be a whole number"),
    "infinity": ({"vocab_size": float("inf")}, "vocab_size must be a whole number"),
    "no layers": ({"num_hidden_layers": 0, "kv_reuse_group": None}, "at least one layer"),
    "size absent": ({"mamba_d_state": ...}, "no 'mamba_d_state'"),
    "rank absent": ({"mamba_dt_rank": None}, "no 'mamba_dt_rank'"),
    "window without list": ({"global_attn_idx": None}, "global_attn_idx"),
    "window without list key": ({"global_attn_idx": ...}, "global_attn_idx"),
    "window of nothing": ({"sliding_window": 0}, "window of 0"),
    "window that is a word": ({"sliding_window": "wide"}, "sliding_window"),
    "global layers that are a number": ({"global_attn_idx": 3}, "global_attn_idx"),
    "global layer that is not there": ({"global_attn_idx": [0, 3, 70]}, "global_attn_idx"),
    "meta tokens negative": ({"num_memory_tokens": -1}, "meta_tokens"),
    "meta tokens a word": ({"num_memory_tokens": "eight"}, "num_memory_tokens"),
    "producer after consumer": ({"kv_reuse_group": [[2, 1]]}, "must start with its producer"),
    "producer of itself": ({"kv_reuse_group": [[1, 1]]}, "must start with its producer"),
    "window and global": ({"kv_reuse_group": [[1, 2, 3]]}, "must not mix window and global"),
    "global and window": ({"kv_reuse_group": [[0, 1]]}, "must not mix window and global"),
    "layer in two groups": ({"kv_reuse_group": [[1, 2], [4, 2]]}, "in two groups"),
    "consumer as producer": ({"kv_reuse_group": [[4, 5], [5, 6]]}, "has none of its own"),
    "layer not there": ({"kv_reuse_group": [[1, 8]]}, "layer 8, which does not exist"),
    "producer not there": ({"kv_reuse_group": [[-1, 2]]}, "layer -1, which does not exist"),
    "groups that are a number": ({"kv_reuse_group": 3}, "kv_reuse_group"),
    "a group that is a number": ({"kv_reuse_group": [1, 2]}, "kv_reuse_group"),
    "a group of words": ({"kv_reuse_group": [["a", "b"]]}, "kv_reuse_group"),
    "every i-th over a mix": (
        {"kv_reuse_group": None, "kv_reuse_every_i_layer": 2},
        "must not mix window and global",
    ),
    "every word-th": (
        {"kv_reuse_group": None, "kv_reuse_every_i_layer": "two"},
        "kv_reuse_every_i_layer",
    ),
    "query norms": ({"kq_norm": "perhead-rms"}, "kq_norm='perhead-rms' is not supported"),
    "experts": ({"num_experts": 16}, "num_experts=16 is not supported"),
    "interspersed": ({"memory_tokens_interspersed_every": 512}, "memory_tokens_interspersed_every"),
    "dynamic rope": ({"rope_type": "dynamic_ntk"}, "rope_type 'dynamic_ntk' is not supported"),
    "activation": ({"mlp_hidden_act": "gelu"}, "mlp activation 'gelu'"),
    "shared weights": ({"kv_weight_reuse": True}, "kv_weight_reuse"),
    "projection bias": ({"mamba_proj_bias": True}, "mamba_proj_bias"),
    "no inner norms": ({"mamba_inner_layernorms": False}, "mamba_inner_layernorms"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "head width": ({"kq_head_dim": 8}, "kq_head_dim 8"),
    "theta that is a word": ({"rope_theta": "big"}, "rope_theta must be a number"),
    "plan of another length": ({PLAN_KEY: [{}]}, "lists 1 layers, num_hidden_layers is 8"),
    "plan with a strange key": ({PLAN_KEY: [{"wings": 2}]}, PLAN_KEY),
    "plan that is no list": ({PLAN_KEY: 5}, PLAN_KEY),
    "fusion": ({FUSION_KEY: "sum"}, "fusion 'sum' is not one of mean, subtract, scalars, concat"),
    "fusion that is a list": ({FUSION_KEY: ["mean"]}, "fusion ['mean'] is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_model(name: str) -> None:
    """One line, for the user, with the key in it."""
    changes, said = BAD[name]
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Config.from_dict(official(**changes))
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


PLAIN: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 40,
}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([Layer(attention=False, ssm=False)], "layer 0 has neither"),
        ([Layer(), Layer(attention=False, window=4)], "layer 1 has no attention"),
        ([Layer(), Layer(attention=False, kv_from=0)], "layer 1 has no attention"),
        ([Layer(attention=False), Layer(kv_from=0)], "which has none of its own"),
        ([Layer(), Layer(kv_from=0, window=3)], "their windows differ"),
        ([Layer(window=4), Layer(kv_from=0, window=3)], "their windows differ"),
        ([Layer(), Layer(ssm=False, kv_from=0)], "value widths differ"),
        ([Layer(), Layer(kv_from=2), Layer()], "which comes after it"),
    ],
)
def test_plans_that_cannot_be(layers: list[Layer], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(layers=tuple(layers), **PLAIN)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        Config.from_folder(tmp_path)
    for content, said in (("{", "not valid JSON"), ("[1]", "one JSON object"), ("", "not valid")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=said) as caught:
            Config.from_folder(tmp_path)
        assert str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Config.from_folder(tmp_path)


def test_a_config_is_a_value() -> None:
    """Equal by content, not by where it was read; it cannot be changed in place."""
    config = Config.from_dict(official())
    assert config == Config.from_dict(official(my_note=1)) == config.replace()
    assert config != config.replace(norm_eps=1e-5)
    with pytest.raises(AttributeError):
        config.hidden_size = 3  # type: ignore[misc]
    assert isinstance(config.replace(layers=list(config.layers)).layers, tuple)


def test_room_for_keys() -> None:
    """By blocks of 256, and never more than a window needs."""
    whole, window = Layer(), Layer(window=1024)
    assert [whole.kv_places(n) for n in (0, 1, 256, 257, 8192)] == [0, 256, 256, 512, 8192]
    assert [window.kv_places(n) for n in (0, 1, 1024, 1025, 8192)] == [0, 256, 1024, 1025, 1025]
    assert Layer(window=5).kv_places(1) == 6


def test_reading_needs_no_torch() -> None:
    """Tools that look at a config answer at once."""
    code = (
        "import sys, hymba.presets as p; p.preset('hymba-1.5b'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
