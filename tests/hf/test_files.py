"""Checkpoint folders through transformers: lossless, and strict where transformers only warns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hymba import weights
from hymba.config import Config
from hymba.hf import HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.model.decoder import LanguageModel
from tests.plans import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["plain", "swa_meta", "kvshare", "ntk", "full"]
Tensors = dict[str, Tensor]


def tensors(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {
        name: x
        for file in files
        if file.name != "io.safetensors"
        for name, x in load_file(file).items()
    }


def assert_same(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_loading_and_saving_is_lossless(case: str, size: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / case)
    model.save_pretrained(tmp_path / "one", max_shard_size=size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert {"README.md", "config.json", "generation_config.json"} <= files
    assert ("model.safetensors.index.json" in files) == (size == "200KB")
    assert_same(tensors(tmp_path / "one"), tensors(GOLDEN / case))
    assert_same(tensors(tmp_path / "two"), tensors(GOLDEN / case))


def test_the_backbone_alone(tmp_path: Path) -> None:
    backbone = AutoModel.from_pretrained(GOLDEN / "full")
    assert isinstance(backbone, HymbaModel)
    backbone.save_pretrained(tmp_path)
    assert_same(tensors(tmp_path), tensors(GOLDEN / "full"))
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("plan", ["hymba", "hymba-no-meta", "llama", "mamba", "samba", *VARIANTS])
def test_our_folders_and_theirs_are_one_format(
    plan: str,
    tiny: Callable[[str], Config],
    lively: Callable[..., LanguageModel],
    text: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    """weights.save, then transformers, then weights.load: the same logits, for every plan."""
    ours = lively(tiny(plan))
    weights.save(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = weights.load(tmp_path / "theirs")
    assert_same(back.state_dict(), ours.state_dict())
    assert back.config == ours.config == theirs.config.to_hymba()
    twin = HymbaForCausalLM.from_pretrained(tmp_path / "theirs")
    ids = text(9)[None]
    torch.testing.assert_close(twin(ids).logits, theirs(ids).logits, rtol=0, atol=0)


def test_dtype_and_tokenizer(letters: object, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "full", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path)("a cat").input_ids


def test_released_folders_name_code_that_is_not_run(folder: Path) -> None:
    """config.json of the hub points to modelling code beside it; ours is used, the key is kept."""
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM"}}
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | named))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is HymbaForCausalLM
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == named["auto_map"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN / "swa_meta", copy)
    (copy / "io.safetensors").unlink()
    return copy


A_LOG = "model.layers.1.mamba.A_log.0"
UP = "model.layers.2.moe.experts.0.up_proj.weight"
EMBED = "model.embed_tokens.weight"
CHANGES: dict[str, Callable[[Tensors], object]] = {
    f"missing {A_LOG}, model.memory_tokens": lambda t: [t.pop(A_LOG), t.pop("model.memory_tokens")],
    f"missing .*{EMBED}": lambda t: t.pop(EMBED),
    "not expected model.layers.9.x": lambda t: t.update({"model.layers.9.x": torch.ones(1)}),
    f"misshaped {UP} \\(3, 4\\), not": lambda t: t.update({UP: torch.ones(3, 4)}),
}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("message", CHANGES)
def test_tensors_that_do_not_fit_are_named(message: str, auto: type, folder: Path) -> None:
    """transformers warns and goes on with random values; here it is an error."""
    found = load_file(folder / "model.safetensors")
    CHANGES[message](found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(weights.WeightsError, match=message) as caught:
        auto.from_pretrained(folder)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(weights.WeightsError, match="damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tied_head_that_differs_is_an_error(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["lm_head.weight"] = found[EMBED].clone()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder)  # the same values: written twice, no harm
    found["lm_head.weight"] += 1
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(weights.WeightsError, match="differs from the embedding"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_ignore_mismatched_sizes_keeps_its_meaning(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found[UP] = torch.ones(3, 4)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, *_ in report["mismatched_keys"]] == [
        "model.decoder.layers.2.mlp.up_proj.weight"
    ]
    assert 0.01 < model.model.decoder.layers[2].mlp.up_proj.weight.std() < 0.03  # initialised


def test_load_state_dict_takes_official_names() -> None:
    """The Trainer resumes with `load_state_dict(file, strict=False)`: names that do not match
    would be dropped, and training would go on from weights that were never loaded."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "full")
    twin = HymbaForCausalLM(model.config)
    result = twin.load_state_dict(tensors(GOLDEN / "full"), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    assert_same(twin.state_dict(), model.state_dict())
    backbone = HymbaModel(model.config)
    backbone.load_state_dict(tensors(GOLDEN / "full"))
    assert_same(backbone.state_dict(), model.model.state_dict())


def test_a_larger_vocabulary(build: Callable[..., HymbaForCausalLM], tmp_path: Path) -> None:
    model = build()
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 70
    assert weights.load(tmp_path).config.vocab_size == 70


@pytest.mark.parametrize("plan", ["hymba", "scalars"])
def test_initial_values_are_those_of_the_language_model(
    plan: str, tiny: Callable[[str], Config]
) -> None:
    """Constants are equal, random tensors have the same spread."""
    theirs = HymbaForCausalLM(HymbaConfig.from_hymba(tiny(plan)))
    for parameter in theirs.parameters():  # as memory is that nobody wrote
        torch.nn.init.constant_(parameter, float("nan"))
    theirs.model.apply(theirs._init_weights)
    ours = LanguageModel(tiny(plan)).init_weights(seed=0)
    mine = dict(theirs.model.named_parameters())
    for name, want in ours.named_parameters():
        got = mine[name]
        if name.endswith("weight") and "norm" not in name and "scales" not in name:
            assert got.std().item() == pytest.approx(want.std().item(), rel=0.5), name
        else:
            torch.testing.assert_close(got, want, msg=name)
    assert not theirs.get_input_embeddings().weight[0].any()
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
