"""Two processes train as one does: the same losses, and runs that go on in another number."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hymba.config import Config
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.train import OptimConfig, TokenStore, TrainConfig, Trainer, TrainError, metrics
from hymba.train.parallel import PATIENCE, World, gathered, spread

NewModel = Callable[[], LanguageModel]
STEPS, STOP = 8, 3

# What each of two processes does. Only the first is told to stop; both do, after the same step.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_parallel import RUNS, STOP, run, said_by
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.train import TokenStore, Trainer
from hymba.train.parallel import gathered, join
from hymba.weights import save

torch.set_num_threads(1)
root, model_config = Path(sys.argv[2]), Config.from_folder(sys.argv[3])
store = TokenStore.open(Path(sys.argv[4]))

with join("cpu") as (world, device):
    for name in ("stopped", *RUNS):
        model = LanguageModel(model_config).init_weights(seed=0)
        model.folder = root  # where it would come from; its files go with it
        say = said_by(os.getpid()) if name == "stopped" else print
        trainer = Trainer(model, run(root, name), store, store, say, world)
        result = trainer.run()
        assert result.stopped == (name == "stopped"), (name, result)
        whole = gathered(trainer.model, world)
        if world.first:
            assert whole.folder == root
            torch.save(whole.state_dict(), root / f"{name}.pt")
        else:
            assert whole is None
"""
MUON = OptimConfig(kind="muon")
# Not weight normalisation: so small a model, with weights of length 1, makes 0.001 of a change of
# 1e-7 within 8 steps, in one process too. That the shares are scaled right is in test_optim.py.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "continued": {"optimizer": MUON},  # one process began it
    "all": {"optimizer": MUON, "recompute": True, "micro_rows": 1, "z_loss": 1e-3},
}


def run(root: Path, name: str) -> TrainConfig:
    base = TrainConfig(root / name, steps=STEPS, rows=4, sequence_length=16, held_out_every=4)
    return replace(base, held_out_tokens=500, **RUNS.get(name, {"optimizer": MUON}))


def said_by(process: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if line.startswith(f"step {STOP}/"):
            os.kill(process, 2)

    return say


def silent(_: str) -> None:
    pass


def figures(folder: Path) -> dict[str, torch.Tensor]:
    records = metrics.read(folder / "metrics.jsonl")
    keys = ("loss", "grad_norm", "bits_per_byte", "epoch", "bits_per_byte_train")
    return {key: torch.tensor(metrics.series(records, key)[1]) for key in keys}


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory,
    store: TokenStore,
    store_folder: Path,
    root: Path,
    hybrid: Config,
) -> Path:
    """A folder in which two processes have done all of RUNS, and "stopped" in the middle."""
    folder = tmp_path_factory.mktemp("together")
    model = LanguageModel(hybrid)
    Trainer(
        model.init_weights(seed=0),
        run(folder, "continued"),
        store,
        store,
        said_by(os.getpid()),
    ).run()
    (folder / "config.json").write_text(json.dumps(hybrid.to_dict()))
    (folder / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    given = [str(Path(__file__).parent), str(folder), str(folder), str(store_folder)]
    done = subprocess.run(
        [*launch, str(folder / "script.py"), *given],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(
    name: str, together: Path, tmp_path: Path, store: TokenStore, new_model: NewModel
) -> None:
    """The same losses, gradient norms and held-out bits, and the same weights in the end."""
    alone = Trainer(new_model(), run(tmp_path, name), store, store, silent)
    alone.run()
    ours, theirs = figures(tmp_path / name), figures(together / name)
    for key, values in ours.items():
        assert len(values) == (2 if key == "bits_per_byte" else STEPS)
        print(key, ((theirs[key] - values) / values).tolist())
        torch.testing.assert_close(theirs[key], values, rtol=2e-5, atol=0, msg=key)
    weights = torch.load(together / f"{name}.pt")
    for key, p in alone.model.state_dict().items():
        torch.testing.assert_close(weights[key], p, rtol=1e-3, atol=3e-5, msg=key)


def test_a_run_of_two_goes_on_in_one(
    together: Path, tmp_path: Path, store: TokenStore, new_model: NewModel
) -> None:
    said: list[str] = []
    Trainer(new_model(), run(together, "stopped"), store, store, said.append).run()
    assert said[0].startswith(f"going on after step {STOP} ")
    Trainer(new_model(), run(tmp_path, "whole"), store, store, silent).run()
    ours, theirs = figures(tmp_path / "whole"), figures(together / "stopped")
    for key, values in ours.items():
        torch.testing.assert_close(theirs[key], values, rtol=2e-5, atol=0, msg=key)


def test_alone_nothing_is_spread(new_model: NewModel) -> None:
    model, world = new_model(), World()
    assert spread(model, world) is model and gathered(model, world) is model
    assert type(model) is LanguageModel and world.first and not world.joined


class Done:
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_wait_for_the_first_however_long_it_takes(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own patience is 10 minutes (NCCL) or 30 (gloo); tokenising a corpus takes hours."""
    done: list[object] = []
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: (backend, timeout))
    monkeypatch.setattr(dist, "barrier", lambda group, async_op: done.append(group) or Done())
    with World(rank, 2).in_turn():
        done.append("work")
    wait = ("gloo", PATIENCE)
    assert done == (["work", wait] if rank == 0 else [wait, "work"])
    assert PATIENCE > timedelta(days=7)


def test_what_cannot_be_shared_is_refused(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    three = World(rank=0, size=3)
    with pytest.raises(TrainError, match="4 rows .* 3 processes"):
        Trainer(new_model(), run(tmp_path, "plain"), store, None, silent, three)
    with pytest.raises(UserError, match="3 processes cannot hold 2 copies"):
        spread(new_model(), three, copies=2)
