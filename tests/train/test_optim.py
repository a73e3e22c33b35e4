"""Groups, schedules and clipping, against values worked out by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from hymba.model.decoder import LanguageModel
from hymba.train.optim import AdamWConfig, OptimError, Schedule, adamw, clip, decays, set_lr

NewModel = Callable[[], LanguageModel]


def test_only_matrices_and_kernels_decay(new_model: NewModel) -> None:
    named = dict(new_model().named_parameters())
    decayed = {name.split("layers.")[-1][2:] for name, p in named.items() if decays(name, p)}
    assert decayed == {
        "mixer.in_proj.weight",
        "mixer.out_proj.weight",
        "mixer.ssm.conv.weight",
        "mixer.ssm.x_proj.weight",
        "mixer.ssm.dt_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert decays("lm_head.weight", torch.zeros(4, 4))  # where it is not the embedding


def test_every_trainable_parameter_is_in_one_group(new_model: NewModel) -> None:
    model = new_model()
    model.decoder.final_norm.weight.requires_grad_(False)
    grouped = [p for group in adamw(model, AdamWConfig()).param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    with pytest.raises(OptimError, match="no trainable"):
        adamw(model.requires_grad_(False), AdamWConfig())


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_a_step_is_adamws(new_model: NewModel, weight_decay: float) -> None:
    """First step: mean/root = the gradient's sign; decay shrinks matrices alone, by lr * decay."""
    model, before = new_model(), dict(new_model().named_parameters())
    optimizer = adamw(model, AdamWConfig(weight_decay=weight_decay))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -2.0)
    set_lr(optimizer, 0.01)
    optimizer.step()
    for name, after in model.named_parameters():
        kept = 1 - 0.01 * weight_decay if decays(name, after) else 1.0
        torch.testing.assert_close(after, before[name] * kept + 0.01, msg=name)


def test_the_papers_schedule() -> None:
    """3e-3 to 1e-5; 1 % rising, 20 % falling."""
    schedule = Schedule()
    rates = [schedule.at(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-4) and rates[9] == pytest.approx(3e-3)
    assert rates[10:800] == [3e-3] * 790
    assert rates[800] < 3e-3
    assert rates[899] == pytest.approx((3e-3 + 1e-5) / 2)
    assert rates[999] == pytest.approx(1e-5)
    steps_down = {round(a - b, 12) for a, b in zip(rates[800:], rates[801:], strict=False)}
    assert len(steps_down) == 1  # a line


def test_cosine() -> None:
    schedule = Schedule(kind="cosine", peak=1.0, warmup=0.1, floor=0.1)
    rates = [schedule.at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    at_32 = 0.1 + 0.9 * (1 + math.cos(math.pi * 23 / 90)) / 2
    assert rates[32] == pytest.approx(at_32)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_have_sane_rates(kind, steps: int) -> None:
    schedule = Schedule(kind=kind, peak=1.0, warmup=0.3, decay=0.4)
    assert all(0 < schedule.at(step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize("wrong", [{"kind": "linear"}, {"warmup": 0.9, "decay": 0.2}])
def test_wrong_schedules_are_refused(wrong) -> None:
    with pytest.raises(OptimError):
        Schedule(**wrong)


def test_clip_scales_the_joint_norm_and_tells_the_old_one() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip(parameters, 10.0) == pytest.approx(5.0)
    assert parameters[1].grad.item() == 4.0  # short enough: untouched
    assert clip(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[1].grad.item() == pytest.approx(0.8, rel=1e-5)
    parameters[0].grad[1] = math.inf
    assert not math.isfinite(clip(parameters, 1.0))
