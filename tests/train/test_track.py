"""A run's figures in other people's viewers."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.train import TokenStore, TrainConfig, Trainer, track
from hymba.train.track import numbers, trackers


def test_tensorboard_has_the_figures_of_a_run_that_went_on(
    new_model: Callable[[], LanguageModel], store: TokenStore, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrainConfig(tmp_path, 6, rows=2, sequence_length=16, held_out_every=3, save_every=2)
    run = replace(run, track=("tensorboard",), held_out_tokens=200)

    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(new_model(), run, store, store, stop).run()
    time.sleep(1.1)  # files of one process and second are read in the order of "10" and "9"
    Trainer(new_model(), run, store, store, lambda _: None).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "bits_per_byte"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("bits_per_byte")] == [3, 6]


def test_unknown_and_absent_trackers_are_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no tracker 'neptune': use tensorboard, wandb, trackio"):
        trackers(["neptune"], tmp_path, {}, 0)
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        trackers(["wandb"], tmp_path, {}, 0)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_others_take_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    [tracker] = trackers([name], tmp_path, {"steps": 2}, 0)
    tracker.write({"loss": 2.0}, 1)
    tracker.close()


def test_only_numbers_are_drawn() -> None:
    assert numbers({"step": 3, "loss": 1.5, "mfu": None, "name": "x", "epoch": 1}) == {
        "loss": 1.5,
        "epoch": 1.0,
    }
