"""Checkpoints: exact, whole whatever happens, and refused in one line where they do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hymba.train import resume
from hymba.train.resume import CheckpointError, Checkpoints, step_of

Optimizers = list[torch.optim.Optimizer]


def new_run(width: int = 4) -> tuple[nn.Linear, Optimizers]:
    """A model and two optimisers, the second of which keeps no count of steps."""
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    adamw = torch.optim.AdamW([model.bias], lr=0.1, weight_decay=0.2)
    return model, [adamw, torch.optim.SGD([model.weight], lr=0.01, momentum=0.9)]


def advance(model: nn.Linear, optimizers: Optimizers, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(3, model.in_features)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_loaded_run_goes_on_exactly(tmp_path: Path) -> None:
    """Weights, the optimisers' means and counts, and the random numbers that come next."""
    model, optimizers = new_run()
    advance(model, optimizers, 3)
    checkpoints = Checkpoints(tmp_path)
    place = checkpoints.save(3, model, optimizers, {"data": {"row": 12}, "seconds": 0.1})
    advance(model, optimizers, 3)

    again, fresh = new_run()
    checkpoints.load(place, again, fresh)
    assert checkpoints.state(place) == {"step": 3, "data": {"row": 12}, "seconds": 0.1}
    advance(again, fresh, 3)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


def test_loading_keeps_the_settings_of_now(tmp_path: Path) -> None:
    run = new_run()
    advance(*run, 1)
    place = Checkpoints(tmp_path).save(1, *run, {})
    again, other = new_run()
    other[0].param_groups[0]["weight_decay"] = 0.7
    other[1].param_groups[0]["momentum"] = 0.5
    Checkpoints(tmp_path).load(place, again, other)
    settings = [optimizer.param_groups[0] for optimizer in other]
    assert (settings[0]["weight_decay"], settings[1]["momentum"]) == (0.7, 0.5)
    assert other[0].state[again.bias]["step"] == 1
    assert "momentum_buffer" in other[1].state[again.weight]


def test_saving_changes_nothing_in_the_run(tmp_path: Path) -> None:
    quiet, saved = new_run(), new_run()
    Checkpoints(tmp_path).save(0, *saved, {})  # before any step: there are no means yet
    torch.manual_seed(1)
    advance(*quiet, 2)
    torch.manual_seed(1)
    advance(*saved, 1)
    Checkpoints(tmp_path).save(1, *saved, {})
    advance(*saved, 1)
    assert torch.equal(quiet[0].weight, saved[0].weight)


def test_saving_in_the_background_saves_what_was_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on at once and changes every tensor; what fails there is raised later."""
    model, optimizers = new_run(width=600)
    advance(model, optimizers, 1)
    then = model.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path)
    place = checkpoints.save(1, model, optimizers, {}, wait=False)
    advance(model, optimizers, 3)
    checkpoints.finish()
    assert checkpoints.latest() == place and os.listdir(tmp_path) == [place.name]
    again = new_run(width=600)
    checkpoints.load(place, *again)
    assert torch.equal(again[0].weight, then)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resume.os, "rename", full)
        checkpoints.save(2, model, optimizers, {}, wait=False)
        with pytest.raises(CheckpointError, match="cannot be written: make room.*No space"):
            checkpoints.finish()
    assert checkpoints.latest() == place
    checkpoints.save(3, model, optimizers, {})
    assert checkpoints.latest() == tmp_path / "step_000003"


def test_the_newest_stay(tmp_path: Path) -> None:
    run = new_run()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 999_999, 1_000_000):
        checkpoints.save(step, *run, {})
    assert [step_of(place) for place in checkpoints.all()] == [999_999, 1_000_000]
    assert checkpoints.latest() == tmp_path / "step_1000000"
    checkpoints.save(1_000_000, *run, {"again": True})
    assert checkpoints.state(tmp_path / "step_1000000")["again"]
    with pytest.raises(CheckpointError, match="at least one"):
        Checkpoints(tmp_path, keep=0)


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    run = new_run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *run, {})
    for name in ("step_000002.unfinished", "step_000000.deleted", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints.latest() == tmp_path / "step_000001"
    checkpoints.save(2, *run, {})
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_000001", "step_000002"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, optimizers = new_run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizers, {})
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match="bias has non-finite values after step 2"):
        checkpoints.save(2, model, optimizers, {})
    assert checkpoints.latest() == tmp_path / "step_000001"


@pytest.mark.parametrize("damage", ["state.json", ".metadata", "__0_0.distcp", "shape"])
def test_what_cannot_be_resumed_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    place = Checkpoints(tmp_path).save(1, *new_run(), {})
    if damage == "shape":
        run = new_run(width=5)
    else:
        run = new_run()
        with open(place / damage, "r+b") as file:
            file.truncate(20)
    before = [p.detach().clone() for p in run[0].parameters()]
    with pytest.raises(CheckpointError, match="cannot be resumed") as error:
        Checkpoints(tmp_path).state(place)
        Checkpoints(tmp_path).load(place, *run)
    assert "\n" not in str(error.value)
    if damage != "__0_0.distcp":  # torch reads into the weights in place
        assert all(map(torch.equal, before, run[0].parameters()))


# Children that save with every weight set to the step's number and die in the middle of it:
# at given moments (sent by the save itself) or at any moment (sent from outside).
KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from hymba.train import resume

torch.set_num_threads(1)

def saves(folder, count, wait=True):
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    checkpoints = resume.Checkpoints(Path(folder), keep=1)
    for step in range(1, count + 1):
        for parameter in model.parameters():
            parameter.data.fill_(step)
        checkpoints.save(step, model, [optimizer], {"said": step}, wait)
        print(step, flush=True)

def die_in_second(target, name):
    real, calls = getattr(target, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(target, name, wrapped)

moments = {
    "before_tensors": (resume.dcp, "async_save"),
    "before_state": (resume, "_write_through"),
    "before_flush": (resume, "_flush_folder"),
    "before_removal": (resume.shutil, "rmtree"),
}
root = Path(sys.argv[1])
saves(root / "warm", 1)  # so that the children need not import what a first save imports
for moment, target in moments.items():
    if (child := os.fork()) == 0:
        if moment == "before_removal":
            target[0].rmtree = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        else:
            die_in_second(*target)
        saves(root / moment, 5)
        os._exit(0)
    os.waitpid(child, 0)
for attempt in range(8):
    folder = root / f"any_{attempt}"
    if (child := os.fork()) == 0:
        saves(folder, 10_000, wait=attempt % 2 == 0)
    while not list(folder.glob("step_??????")):
        time.sleep(0.001)
    time.sleep(0.011 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("all killed")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_kill_at_any_moment_of_a_save_leaves_a_usable_checkpoint(
    tmp_path: Path, root: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=root,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # its context would not survive a fork
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("all killed\n"), done.stderr
    expected = {"before_tensors": 1, "before_state": 1, "before_flush": 2, "before_removal": 2}
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == len(expected) + 1 + 8
    for folder in folders:
        model = nn.Linear(64, 64)
        run = model, [torch.optim.AdamW(model.parameters())]
        checkpoints = Checkpoints(folder, keep=1)
        latest = checkpoints.latest()
        assert latest is not None
        state = checkpoints.state(latest)
        checkpoints.load(latest, *run)
        assert state["said"] == state["step"] == step_of(latest)
        assert state["step"] == expected.get(folder.name, state["step"])
        assert all(bool((p == state["step"]).all()) for p in model.parameters())
        checkpoints.save(20_000, *run, {})  # and the run goes on: leftovers are in nobody's way
        assert os.listdir(folder) == ["step_020000"]
