"""Training on a CUDA device: the losses of the CPU, and several devices' as one's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.model.decoder import LanguageModel
from hymba.train import OptimConfig, TokenStore, TrainConfig, Trainer, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NewModel = Callable[[], LanguageModel]

TWO = """
import sys
from pathlib import Path
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.train import TokenStore, TrainConfig, Trainer
from hymba.train.parallel import join

folder, config, store = map(Path, sys.argv[1:])
with join("cuda") as (world, device):
    model = LanguageModel(Config.from_folder(config)).init_weights(seed=0).to(device)
    run = TrainConfig(folder, 6, rows=4, sequence_length=16, held_out_tokens=400)
    store = TokenStore.open(store)
    Trainer(model, run, store, store, lambda _: None, world).run()
"""


def losses(model: LanguageModel, store: TokenStore, folder: Path, **changes: Any) -> torch.Tensor:
    """Of six steps, and the last held-out loss."""
    run = TrainConfig(folder, 6, rows=4, sequence_length=16, held_out_tokens=400)
    Trainer(model, replace(run, **changes), store, store, lambda _: None).run()
    return figures(folder)


def figures(folder: Path) -> torch.Tensor:
    records = metrics.read(folder / "metrics.jsonl")
    return torch.tensor([*(r["loss"] for r in records), records[-1]["held_out_loss"]])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-4),
        ({"micro_rows": 1, "recompute": True, "z_loss": 1e-3}, 1e-4),
        ({"optimizer": OptimConfig(kind="muon")}, 2e-2),  # products in bfloat16
        ({"precision": "bfloat16", "compile": True}, 2e-2),
    ],
)
def test_a_gpu_learns_what_a_cpu_does(
    new_model: NewModel,
    store: TokenStore,
    tmp_path: Path,
    changes: dict[str, Any],
    tolerance: float,
) -> None:
    plain = {k: v for k, v in changes.items() if k in ("optimizer", "z_loss")}
    ours = losses(new_model().to("cuda"), store, tmp_path / "gpu", **changes)
    theirs = losses(new_model(), store, tmp_path / "cpu", **plain)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


def test_it_goes_on_from_a_checkpoint_of_a_cpu(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    run = TrainConfig(tmp_path / "run", 6, rows=4, sequence_length=16, held_out_tokens=400)
    with pytest.raises(KeyboardInterrupt):
        Trainer(new_model(), replace(run, save_every=2), store, store, stop).run()
    Trainer(new_model().to("cuda"), run, store, store, lambda _: None).run()
    theirs = losses(new_model(), store, tmp_path / "cpu")
    torch.testing.assert_close(figures(tmp_path / "run"), theirs, rtol=1e-4, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_train_as_one(
    new_model: NewModel, store: TokenStore, store_folder: Path, tmp_path: Path, root: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(new_model().config.to_dict()))
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    given = [str(tmp_path / "two"), str(tmp_path), str(store_folder)]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py"), *given],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one = losses(new_model().to("cuda"), store, tmp_path / "one")
    torch.testing.assert_close(figures(tmp_path / "two"), one, rtol=1e-4, atol=0)
