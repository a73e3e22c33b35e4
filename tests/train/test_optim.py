"""Groups, Muon, schedules, clipping and unit weights, against values worked out by hand, against
torch.optim.Muon, and against one process where the weights are spread over two."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hymba import presets
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.train.config import OptimConfig, OptimError, Schedule
from hymba.train.muon import Muon, orthogonal
from hymba.train.optim import clip, decays, normalize_weights, optimizers, parts, set_lr

NewModel = Callable[[], LanguageModel]
MUONS = {
    "mixer.in_proj.weight",
    "mixer.out_proj.weight",
    "mixer.ssm.x_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
}


def in_block(name: str) -> str:
    """mlp.up_proj.weight, of decoder.layers.3.mlp.up_proj.weight."""
    return name.split("layers.")[-1][2:]


# ---- who moves what


def test_only_matrices_and_kernels_decay(new_model: NewModel) -> None:
    named = dict(new_model().named_parameters())
    decayed = {in_block(name) for name, p in named.items() if decays(name, p)}
    assert decayed == MUONS | {"mixer.ssm.conv.weight", "mixer.ssm.dt_proj.weight"}
    assert decays("lm_head.weight", torch.zeros(4, 4))  # where it is not the embedding


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trainable_parameter_is_in_one_group(new_model: NewModel, kind: Any) -> None:
    model = new_model()
    model.decoder.final_norm.weight.requires_grad_(False)
    made = optimizers(model, OptimConfig(kind=kind))
    grouped = [p for each in made for group in each.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    with pytest.raises(OptimError, match="no trainable"):
        optimizers(model.requires_grad_(False), OptimConfig(kind=kind))


def test_muon_moves_the_blocks_matrices_alone(new_model: NewModel) -> None:
    model = new_model()
    muon, adamw = optimizers(model, OptimConfig(kind="muon"))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {p: name for name, p in model.named_parameters()}
    mine = [names[p] for group in muon.param_groups for p in group["params"]]
    assert {in_block(name) for name in mine} == MUONS and len(mine) == 4 * len(MUONS)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in mine)
    assert [type(x) for x in optimizers(model, OptimConfig(kind="muon"))] == [torch.optim.AdamW]
    for p in model.parameters():
        p.requires_grad_(names[p] in mine)
    assert [type(x) for x in optimizers(model, OptimConfig(kind="muon"))] == [Muon]


def test_an_adapter_in_a_projection_is_adamws() -> None:
    """Its two matrices are factors of one; unit vectors in them would mean nothing either."""
    block = nn.ModuleDict({"in_proj": nn.ModuleDict({"lora_A": nn.Linear(5, 3, bias=False)})})
    before = block["in_proj"]["lora_A"].weight.detach().clone()  # type: ignore[index]
    assert [type(x) for x in optimizers(block, OptimConfig(kind="muon"))] == [torch.optim.AdamW]
    normalize_weights(block)
    assert torch.equal(block["in_proj"]["lora_A"].weight, before)  # type: ignore[index]


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_a_step_is_adamws(new_model: NewModel, weight_decay: float) -> None:
    """First step: mean/root = the gradient's sign; decay shrinks matrices alone, by lr * decay."""
    model, before = new_model(), dict(new_model().named_parameters())
    (optimizer,) = optimizers(model, OptimConfig(weight_decay=weight_decay))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -2.0)
    set_lr([optimizer], 0.01)
    optimizer.step()
    for name, after in model.named_parameters():
        kept = 1 - 0.01 * weight_decay if decays(name, after) else 1.0
        torch.testing.assert_close(after, before[name] * kept + 0.01, msg=name)


def test_each_optimiser_has_its_rate(new_model: NewModel) -> None:
    made = optimizers(new_model(), OptimConfig(kind="muon", muon_lr=3.0))
    set_lr(made, 0.01)
    rates = [[group["lr"] for group in each.param_groups] for each in made]
    assert rates == [[pytest.approx(0.03)], [0.01, 0.01]]


WRONG = [
    ({"kind": "sgd"}, "'sgd' is unknown: use adamw or muon"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": (-0.1, 0.9)}, "betas"),
    ({"muon_momentum": 1.0}, "muon_momentum"),
    ({"muon_momentum": -0.1}, "muon_momentum"),
    ({"muon_lr": 0.0}, "muon_lr"),
    ({"clip": math.nan}, "clip"),
    ({"eps": 0.0}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(OptimError, match=said):
        OptimConfig(**wrong)


# ---- Muon


@pytest.mark.parametrize("shape", [(7, 5), (5, 13), (8, 8), (1, 3), (6, 1)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Against the singular values: directions kept, values all near 1, whatever the size was."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, len(s), dtype=torch.float64)
    found = orthogonal(1e3 * (u * s) @ v).double()
    values = torch.diagonal(u.T @ found @ v.T)
    assert 0.65 < values.min() and values.max() < 1.25
    torch.testing.assert_close(found, (u * values) @ v, atol=1e-5, rtol=1e-5)
    assert (orthogonal(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize("shape", [(7, 5), (5, 13), (40, 40)])
def test_torchs_muon_is_the_twin(shape: tuple[int, int]) -> None:
    """Up to its bfloat16, which keeps 8 bits in each of five iterations."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}
    twin = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    muon = Muon([{"params": [ours], **settings}])
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step(), twin.step()
    off = (ours - theirs).norm() / (ours - 1).norm()
    assert off < 0.03


def test_a_step_has_the_size_of_adamws() -> None:
    """Whatever the shape: 0.2 lr an element, which is what AdamW's steps were measured to have."""
    torch.manual_seed(0)
    for shape in ((64, 64), (16, 200), (300, 20)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], lr=0.5).step()
        assert 0.07 < p.square().mean().sqrt().item() < 0.12


def test_parts_move_as_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    rows = (5, 2, 9)
    fused, alone = nn.Parameter(torch.zeros(16, 7)), [nn.Parameter(torch.zeros(n, 7)) for n in rows]
    muon, muons = Muon([fused], {fused: rows}, lr=0.1), Muon(alone, lr=0.1)
    for _ in range(3):
        fused.grad = torch.randn(16, 7) * torch.arange(1, 17)[:, None]
        for p, grad in zip(alone, fused.grad.split(rows), strict=True):
            p.grad = grad.clone()
        muon.step(), muons.step()
    torch.testing.assert_close(fused, torch.cat([p.detach() for p in alone]))
    with pytest.raises(ValueError, match="16 rows"):
        Muon([fused], {fused: (5, 9)})
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(4))])


def test_the_models_parts(tiny: Callable[[str], Config]) -> None:
    """q, k, v, u, gate (no k and v where they are another layer's); dt, B, C."""
    model = LanguageModel(tiny("hymba"))
    found = {name: parts(model).get(p) for name, p in model.named_parameters()}
    assert sum(rows is not None for rows in found.values()) == 2 * 8
    for i, layer in enumerate(model.config.layers):
        keys = (16, 32) if layer.owns_kv else ()
        assert found[f"decoder.layers.{i}.mixer.in_proj.weight"] == (32, *keys, 64, 64)
        assert found[f"decoder.layers.{i}.mixer.ssm.x_proj.weight"] == (3, 4, 4)
    llama, mamba = (parts(LanguageModel(tiny(name))).values() for name in ("llama", "mamba"))
    assert set(llama) == {(32, 16, 16)} and set(mamba) == {(64, 64), (2, 4, 4)}


def test_without_a_gradient_nothing_moves() -> None:
    still, moved = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    muon = Muon([{"params": [still, moved], "lr": 0.1, "weight_decay": 0.1}])
    moved.grad = torch.zeros(3, 4)
    assert muon.step(lambda: 7.0) == 7.0
    assert torch.equal(still, torch.ones(3, 4))
    torch.testing.assert_close(moved, torch.full((3, 4), 0.99))  # decay alone


# ---- unit weights


def test_rows_that_read_and_columns_that_write_have_length_one(new_model: NewModel) -> None:
    model = new_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    normalize_weights(model)
    for name, p in model.named_parameters():
        along = {"in_proj": 1, "gate_proj": 1, "up_proj": 1, "out_proj": 0, "down_proj": 0}
        module = name.split(".")[-2]
        if module not in along:
            assert torch.equal(p, before[name]), name
            continue
        lengths = p.norm(dim=along[module])
        assert len(lengths) == p.shape[1 - along[module]]
        assert p.shape[along[module]] == 32  # the residual stream's width
        torch.testing.assert_close(lengths, torch.ones_like(lengths), msg=name)
        scale = before[name] / p  # one a vector
        assert (scale.std(dim=along[module]) < 1e-5 * scale.mean()).all()


def test_frozen_and_zero_vectors_stay(new_model: NewModel) -> None:
    model = new_model().to(torch.bfloat16)
    mixer = model.decoder.layers[0].mixer
    mixer.out_proj.requires_grad_(False)
    before = mixer.out_proj.weight.clone()
    with torch.no_grad():
        mixer.in_proj.weight[3] = 0
    normalize_weights(model)
    assert torch.equal(mixer.out_proj.weight, before)
    lengths = mixer.in_proj.weight.float().norm(dim=1)
    assert lengths[3] == 0 and (lengths[4:] - 1).abs().max() < 0.01


# ---- the same on two processes


def odd_model() -> LanguageModel:
    """Widths that two processes cannot share evenly, on the boundary of no part."""
    config = presets.hymba(
        hidden_size=30,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        intermediate_size=45,
        window=8,
        meta_tokens=3,
        ssm_state=3,
        vocab_size=61,
    )
    return LanguageModel(config).init_weights(seed=0)


def three_steps(model: LanguageModel, made: list[torch.optim.Optimizer], begin: int) -> list[float]:
    """Gradients are drawn whole, the same everywhere; each process takes its share."""
    norms = []
    for step in range(begin, begin + 3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            else:
                p.grad = grad
        norms.append(clip(model.parameters(), 1.0))
        set_lr(made, 0.01)
        for optimizer in made:
            optimizer.step()
        normalize_weights(model)
        model.zero_grad()
    return norms


def in_shares() -> LanguageModel:
    model = odd_model()
    for block in model.decoder.layers:
        fully_shard(block)
    return fully_shard(model)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    for kind in ("adamw", "muon"):
        config = OptimConfig(kind=kind, weight_decay=0.2)
        whole, model = odd_model(), in_shares()
        alone, spread = optimizers(whole, config), optimizers(model, config)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        want, got = three_steps(whole, alone, 0), three_steps(model, spread, 0)
        assert got == pytest.approx(want)
        compare(whole, model)
        means = [x for each in spread for state in each.state.values() for x in state.values()]
        assert all(isinstance(x, DTensor) for x in means if x.numel() > 1)  # kept in shares
        # What a checkpoint holds, put into a fresh run, goes on the same way.
        weights, states = get_state_dict(model, spread)
        again = in_shares()
        fresh = optimizers(again, config)
        set_state_dict(again, fresh, model_state_dict=weights, optim_state_dict=states)
        three_steps(whole, alone, 3), three_steps(again, fresh, 3)
        compare(whole, again)
    if rank == 0:
        Path(folder, "done").touch()
    dist.destroy_process_group()


def compare(whole: LanguageModel, model: LanguageModel) -> None:
    for (name, p), x in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), p, atol=1e-5, rtol=1e-4, msg=name)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done").exists()


# ---- the schedule


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


def test_shares_that_both_round_up_leave_the_whole_fall() -> None:
    """3.5 of 7 steps rise and 3.5 fall: four up, then three even steps down to the floor."""
    schedule = Schedule(peak=1.0, warmup=0.5, decay=0.5, floor=0.1)
    rates = [schedule.at(step, 7) for step in range(7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.7, 0.4, 0.1])


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_have_sane_rates(kind: Any, steps: int) -> None:
    """They rise, stay and fall, and end low if there is a fall at all, however shares round."""
    for warmup, decay in ((0.3, 0.4), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        schedule = Schedule(kind=kind, peak=1.0, warmup=warmup, decay=decay)
        rates = [schedule.at(step, steps) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        top = rates.index(max(rates))
        assert rates[:top] == sorted(rates[:top])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        falls = rates[-1] < 1 and steps > 1
        assert rates[-1] == pytest.approx(1 / 300) or not falls


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "linear"},
        {"warmup": 0.9, "decay": 0.2},
        {"peak": 0.0},
        {"floor": 1.5},
        {"floor": -0.1},
    ],
)
def test_wrong_schedules_are_refused(wrong: dict[str, Any]) -> None:
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
