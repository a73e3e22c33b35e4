"""What the fusions are to each other. That each is what it is defined to be, gradients too, is in
test_decoder.py; that each is trained, served and saved, in ../test_plans.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hymba.config import FUSIONS, Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
Text = Callable[..., Tensor]


def with_fusion(model: LanguageModel, fusion: str) -> LanguageModel:
    """The same weights under another fusion."""
    twin = LanguageModel(model.config.replace(fusion=fusion)).to(model.dtype)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


@torch.no_grad()
def mirror(model: LanguageModel) -> None:
    """Turn the signs of all values and of what every mixer gives back."""
    for block in model.decoder.layers:
        sizes = block.mixer.sizes
        if "v" in sizes:
            start = sizes["q"] + sizes["k"]
            block.mixer.in_proj.weight[start : start + sizes["v"]] *= -1
        block.mixer.out_proj.weight *= -1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_subtract_is_mean_in_a_mirror(tiny: Tiny, text: Text, decay: float) -> None:
    """To the last bit and through training: (a - s) / 2 is -(-a + s) / 2, values are linear in
    their weights, and optimisers do not mind signs. As first weights are as likely as their
    mirror's, a difference between runs of the two is one of seeds."""
    subtract = LanguageModel(tiny("hymba").replace(fusion="subtract")).init_weights(seed=0)
    mean = with_fusion(subtract, "mean")
    mirror(mean)
    tokens, losses = text(30), {}
    for name, model in (("subtract", subtract), ("mean", mean)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        losses[name] = []
        for _ in range(4):
            loss = model.loss(model(tokens, Batch.of([30])), tokens.roll(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["subtract"] == losses["mean"]
    assert losses["mean"][-1] < losses["mean"][0]


def test_scalars_begin_as_the_mean_and_are_one_with_other_norms(
    tiny: Tiny, lively: Lively, text: Text
) -> None:
    """From one seed the first weights are the same; later a scalar is a factor of its norm."""
    tokens, batch = text(20), Batch.of([20])
    with torch.no_grad():
        mean = LanguageModel(tiny("hymba")).init_weights(seed=3)
        first = LanguageModel(tiny("hymba").replace(fusion="scalars")).init_weights(seed=3)
        assert torch.equal(first(tokens, batch), mean(tokens, batch))
        scalars = lively(tiny("scalars"), dtype=torch.float64)
        mean = with_fusion(scalars, "mean")
        for block in mean.decoder.layers:
            factors = scalars.get_submodule(name_of(mean, block)).mixer.scales.weight
            block.mixer.attention_norm.weight *= factors[0]
            block.mixer.ssm_norm.weight *= factors[1]
        assert torch.equal(mean(tokens, batch), scalars(tokens, batch))


def name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_takes_the_short_way(fusion: str, tiny: Tiny) -> None:
    """No module of a fusion is taken for an adapter."""
    model = LanguageModel(tiny("hymba").replace(fusion=fusion))
    assert all(block.is_bare("cpu") for block in model.decoder.layers)


@pytest.mark.parametrize("plan", ["llama", "mamba", "samba"])
def test_without_hybrid_layers_there_is_nothing_to_join(
    plan: str, tiny: Tiny, lively: Lively, text: Text
) -> None:
    tokens, batch, want = text(9), Batch.of([9]), lively(tiny(plan))
    for fusion in ("subtract", "scalars", "concat"):
        model = lively(tiny(plan).replace(fusion=fusion))
        assert torch.equal(model(tokens, batch), want(tokens, batch))
