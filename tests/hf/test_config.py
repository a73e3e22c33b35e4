"""config.json through transformers: nothing lost, nothing added, nothing misread."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hymba.config import Config, ConfigError
from hymba.hf import HymbaConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["plain", "swa_meta", "kvshare", "ntk", "full"]


def official(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_loading_and_saving_keeps_every_key(case: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(GOLDEN / case)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved | {"transformers_version": "4.44.0"} == official(case)
    assert config.to_hymba() == Config.from_dict(official(case))


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    keys = official("full") | {"somebody": {"wrote": ["this", 1, None]}}
    HymbaConfig(**keys).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["somebody"] == keys["somebody"]


@pytest.mark.parametrize("name", ["hymba-1.5b", "hymba-tiny", "llama-tiny", "samba-tiny"])
def test_presets_go_both_ways(name: str) -> None:
    config = HymbaConfig.from_hymba(Config.preset(name))
    assert config.to_hymba() == Config.preset(name)
    assert HymbaConfig.from_dict(config.to_dict()).to_hymba() == Config.preset(name)
    assert copy.deepcopy(config).to_hymba() == Config.preset(name)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_dtype_is_read_by_either_name(key: str) -> None:
    keys = {k: v for k, v in official("full").items() if k != "torch_dtype"}
    config = HymbaConfig(**keys, **{key: "bfloat16"})
    assert config.dtype is torch.bfloat16
    assert config.to_diff_dict()["torch_dtype"] == "bfloat16"


def test_no_router_shows() -> None:
    """Released files say `router_aux_loss_coef: 0.001`; trl would ask for a router's logits."""
    config = HymbaConfig(**official("full"))
    assert not hasattr(config, "output_router_logits")
    assert not hasattr(config, "num_experts_per_tok")
    assert config.to_dict()["router_aux_loss_coef"] == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
        ({"kv_reuse_group": [[2, 1]]}, "comes after it"),
        ({"kq_norm": "rms"}, "kq_norm='rms'"),
        ({"global_attn_idx": None}, "no global_attn_idx"),
        ({"vocab_size": None}, "no 'vocab_size'"),
    ],
)
def test_impossible_configs_say_so_in_one_line(changes: dict[str, Any], message: str) -> None:
    config = HymbaConfig(**(official("full") | changes))
    with pytest.raises(ConfigError, match=message) as caught:
        config.to_hymba()
    assert "\n" not in str(caught.value)
