"""What the meta tokens leave behind is a constant of the weights: computed once, never stale, and
never in the way of a gradient.

A stale constant is the worst kind of bug: nothing fails, generation is just a little wrong after
training. So each way in which weights change has its test here, and each asks two things: that
the result is that of a fresh model with the same weights, and that it is not the one from before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hymba import weights
from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.layers import MetaTokens

Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
TOKENS = torch.tensor([5, 17, 3, 60, 8, 8, 21, 40, 2])
IN_PROJ = "decoder.layers.0.mixer.in_proj"


@pytest.fixture
def model(tiny: Tiny, lively: Lively) -> LanguageModel:
    return lively(tiny("hymba"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the meta tokens enter the layers. The class is patched, not the
    module: a replaced forward of a module is one of the things that the memo looks for."""
    calls: list[int] = []
    forward = MetaTokens.forward

    def counted(self: MetaTokens) -> Tensor:
        calls.append(1)
        return forward(self)

    monkeypatch.setattr(MetaTokens, "forward", counted)
    return calls


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    return model.logits(model(TOKENS, Batch.of([len(TOKENS)])))


def fresh(model: LanguageModel) -> LanguageModel:
    """The same weights in a model that remembers nothing."""
    other = LanguageModel(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return other


def assert_follows(model: LanguageModel, before: Tensor, want: LanguageModel | None = None) -> None:
    """Both users of the memo, the plain forward and a new cache, see the change."""
    new = logits(want or fresh(model))
    assert not torch.allclose(new.double(), before.double(), atol=1e-3)
    cached = model(TOKENS, Batch.of([len(TOKENS)]), model.new_cache(1))
    torch.testing.assert_close(logits(model), new, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(cached).detach(), new, atol=1e-4, rtol=0)


def test_computed_once(model: LanguageModel, computed: list[int]) -> None:
    """By forwards, caches, lengths and batch sizes of any kind; train() and eval() change
    nothing."""
    logits(model)
    for slots in (1, 3):
        cache = model.new_cache(slots)
        for past in range(3):
            model(TOKENS[:slots], Batch.of([1] * slots, [past] * slots), cache)
        logits(model.train(slots == 1))
    assert len(computed) == 1


def test_meta_tokens_change_what_is_computed(model: LanguageModel) -> None:
    """Else all of the above would be true of a model that ignores them."""
    before = logits(model)
    with torch.no_grad():
        model.decoder.meta_tokens.weight[0] += 1
    assert_follows(model, before)


# Never stale


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
def test_after_an_optimiser_step(model: LanguageModel, kind: str) -> None:
    before = logits(model)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    }[kind]
    optimiser = make(model.parameters())
    hidden = model(TOKENS, Batch.of([len(TOKENS)]))
    model.loss(hidden, TOKENS).backward()
    optimiser.step()
    assert_follows(model, before)


@pytest.mark.parametrize("assign", [True, False])
def test_after_load_state_dict(
    model: LanguageModel, assign: bool, tiny: Tiny, lively: Lively
) -> None:
    before, other = logits(model), lively(tiny("hymba"), seed=1)
    model.load_state_dict(other.state_dict(), assign=assign)
    if assign:
        model.lm_head.weight = model.decoder.embed_tokens.weight
    assert_follows(model, before, want=other)


def test_after_a_cast(model: LanguageModel) -> None:
    """To bfloat16 the weights are rounded; and back again they are the same values, but what was
    computed from them in bfloat16 must not stay."""
    before = logits(model)

    def kinds() -> set[torch.dtype]:
        states = model.decoder.meta_states()
        return {x.dtype for state in states for x in state if x is not None}

    assert kinds() == {torch.float32}
    model.bfloat16()
    assert torch.bfloat16 in kinds()
    model.float()
    assert kinds() == {torch.float32}
    assert_follows(model, before)
    model.double()
    assert kinds() == {torch.float64}


EDITS: dict[str, Callable[[Tensor], object]] = {
    "whole": lambda p: p.mul_(1.5),
    "one row": lambda p: p[5].mul_(3),
    "one column": lambda p: p[:, 5].mul_(3),
    "one element": lambda p: p[5, 3].add_(4),
}


# The same numbers in another order: only autograd's version counter tells.
COUNTED = EDITS | {
    "two rows swapped": lambda p: p.copy_(p[[*range(5), 7, 6, 5, *range(8, len(p))]])
}


@pytest.mark.parametrize("edit", COUNTED)
def test_after_an_edit_in_place(model: LanguageModel, edit: str) -> None:
    before = logits(model)
    with torch.no_grad():
        COUNTED[edit](model.get_parameter(f"{IN_PROJ}.weight"))
    assert_follows(model, before)


@pytest.mark.parametrize("edit", COUNTED)
def test_after_an_edit_in_inference_mode(model: LanguageModel, edit: str) -> None:
    before = logits(model)
    with torch.inference_mode():
        COUNTED[edit](model.get_parameter(f"{IN_PROJ}.weight"))
    assert_follows(model, before)


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit_behind_autograds_back(model: LanguageModel, edit: str) -> None:
    """Adapter libraries merge through `.data`, where no version counter moves: all values must
    be looked at."""
    before = logits(model)
    EDITS[edit](model.get_parameter(f"{IN_PROJ}.weight").data)
    assert_follows(model, before)


@pytest.mark.parametrize("name", ["decoder.meta_tokens.weight", "decoder.layers.0.mixer.ssm.D"])
def test_after_new_data(model: LanguageModel, name: str) -> None:
    before, parameter = logits(model), model.get_parameter(name)
    parameter.data = parameter.data * 1.5
    assert_follows(model, before)


def test_after_swapped_weights(model: LanguageModel) -> None:
    """Two parameters of one shape change places: the same memory, another model."""
    before = logits(model)
    one, other = (model.decoder.layers[i].mixer for i in (1, 5))
    assert one.out_proj.weight.shape == other.out_proj.weight.shape
    one.out_proj.weight, other.out_proj.weight = other.out_proj.weight, one.out_proj.weight
    assert_follows(model, before)


def test_a_copy_has_its_own(model: LanguageModel) -> None:
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.meta_tokens.weight.mul_(2)
    assert_follows(other, before)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


# Modules that are not ours: what a weight means may change without the weight


class Doubled(nn.Module):
    """As an adapter stands in the place of a layer, and can be switched off."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.scale = base, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.base(x)


def test_with_a_foreign_module(model: LanguageModel) -> None:
    """Its switch is no weight: nothing moves when it is turned."""
    mixer = model.decoder.layers[0].mixer
    mixer.in_proj = Doubled(mixer.in_proj)
    before = logits(model)
    mixer.in_proj.scale = 2.0
    want = copy.deepcopy(model)
    want.decoder._memo = None
    assert_follows(model, before, want)
    mixer.in_proj.scale = 1.0
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_with_a_changed_module(model: LanguageModel, kind: str) -> None:
    before, module = logits(model), model.get_submodule(IN_PROJ)
    if kind == "hook":
        change = module.register_forward_hook(lambda m, args, out: 2 * out)
    elif kind == "pre-hook":
        change = module.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    else:
        forward, change = module.forward, None
        module.forward = lambda x: 2 * forward(x)
    want = fresh(model)
    want.get_submodule(IN_PROJ).weight.data *= 2
    assert_follows(model, before, want)
    if change is None:
        del module.forward
    else:
        change.remove()
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


def test_with_a_parametrised_weight(model: LanguageModel) -> None:
    before, module = logits(model), model.get_submodule(IN_PROJ)
    want = fresh(model)
    want.get_submodule(IN_PROJ).weight.data *= 2

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(module, "weight", Twice())
    assert_follows(model, before, want)


def test_a_memo_of_one_precision_does_not_serve_another(model: LanguageModel) -> None:
    """Autocast changes no weight, but what is computed from them."""
    want = logits(fresh(model))
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model)
    assert not torch.allclose(low.float(), want, atol=1e-3)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)


# Gradients


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_never_used_while_gradients_flow(
    model: LanguageModel, computed: list[int], when: str
) -> None:
    """A warm memo would cut the meta tokens, and every weight's way through them, out of the
    graph. Their rows run once a forward, whatever the number of sequences."""
    if when != "after":
        logits(model)
    del computed[:]
    model(TOKENS, Batch.of([4, 3, 2])).square().sum().backward()
    assert len(computed) == 1
    first = model.decoder.meta_tokens.weight.grad.clone()
    assert first.norm() > 0
    if when == "between":
        logits(model)
    model.zero_grad()
    model(TOKENS, Batch.of([4, 3, 2])).square().sum().backward()
    torch.testing.assert_close(model.decoder.meta_tokens.weight.grad, first)


@pytest.mark.parametrize("name", ["decoder.meta_tokens.weight", f"{IN_PROJ}.weight"])
def test_gradient_is_the_slope(name: str, tiny: Tiny, lively: Lively) -> None:
    """Finite differences of the forward without gradients, which goes through the memo: the two
    ways through the meta tokens are one function."""
    model = lively(tiny("hymba"), dtype=torch.float64)
    parameter = model.get_parameter(name)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return model.loss(model(TOKENS, Batch.of([5, 4])), TOKENS)

    loss().backward()
    slope, values = (parameter.grad * direction).sum().item(), []
    for step in (1e-5, -2e-5):  # one step to the right, two to the left
        with torch.no_grad():
            parameter += step * direction
            values.append(loss().item())
    assert abs(slope) > 1e-3
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_a_frozen_model_may_use_it(model: LanguageModel, computed: list[int]) -> None:
    """No weight has a gradient, so the constant stays one; a trained prompt still gets its own."""
    model.requires_grad_(False)
    prompt = model.decoder.embed_tokens(TOKENS).clone().requires_grad_()
    for _ in range(2):
        model(prompt, Batch.of([len(TOKENS)])).sum().backward()
    assert len(computed) == 1 and prompt.grad.norm() > 0


def test_made_in_inference_mode_used_in_training(model: LanguageModel) -> None:
    """Generate first, then train a prompt on the frozen model: the memo must not hold tensors
    that autograd refuses."""
    model.requires_grad_(False)
    with torch.inference_mode():
        logits(model)
    prompt = model.decoder.embed_tokens(TOKENS).clone().requires_grad_()
    model(prompt, Batch.of([len(TOKENS)])).sum().backward()
    assert prompt.grad.norm() > 0


def test_a_part_frozen_model_does_not(model: LanguageModel, computed: list[int]) -> None:
    """One trainable weight is enough: the meta tokens' states depend on it."""
    model.requires_grad_(False)
    weight = model.get_parameter("decoder.layers.0.mixer.out_proj.weight").requires_grad_()
    logits(model)
    model(TOKENS, Batch.of([len(TOKENS)])).sum().backward()
    assert len(computed) == 2 and weight.grad.norm() > 0


def test_without_meta_tokens_there_is_nothing(tiny: Tiny, lively: Lively) -> None:
    model = lively(tiny("llama"))
    assert all(x is None for state in model.decoder.meta_states() for x in state)


def test_a_saved_model_is_saved_without_it(model: LanguageModel, tmp_path: Path) -> None:
    logits(model)
    names = set(model.state_dict())
    weights.save(model, tmp_path)
    assert names == set(fresh(model).state_dict())
    torch.testing.assert_close(logits(weights.load(tmp_path)), logits(model), atol=1e-6, rtol=0)
