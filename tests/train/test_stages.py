"""Longer rows with another rotary base at the end of a run."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.train import Extension, TokenStore, TrainConfig, Trainer, TrainError, metrics
from hymba.train.rows import Packer
from hymba.train.stages import stages

NewModel = Callable[[], LanguageModel]


def config(folder: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(folder, steps=8, rows=4, sequence_length=16, held_out_every=0, save_every=0)
    extension = Extension(share=0.4, sequence_length=32)
    return replace(base, extension=extension, held_out_tokens=300, **changes)


def losses(folder: Path) -> list[float]:
    return metrics.series(metrics.read(folder / "metrics.jsonl"), "loss")[1]


def silent(_: str) -> None:
    pass


def test_the_last_steps_have_longer_rows_and_as_many_tokens(
    hybrid: Config, store: TokenStore, tmp_path: Path
) -> None:
    first, last = stages(config(tmp_path, micro_rows=2), hybrid, store, store)
    assert (first.start, first.rows, first.micro_rows) == (0, 4, 2)
    assert (last.start, last.rows, last.micro_rows) == (5, 2, 1)  # 40 % of 8 steps: 3
    for stage, length in ((first, 16), (last, 32)):
        [packed, *_] = stage.loader.take(stage.rows)
        assert len(packed.tokens) == 64 and max(packed.lengths) <= length
        assert stage.held_out is not None
        assert max(length for batch in stage.held_out for length in batch.lengths) <= length
    assert first.loader.rows.identity != last.loader.rows.identity


def test_the_rotary_base_is_the_released_ones(hybrid: Config, store: TokenStore) -> None:
    """2k rows with the plain base, then 8k with the base of NVIDIA's checkpoint."""
    released = Config.preset("hymba-1.5b")
    run = TrainConfig(Path("x"), 10, rows=8, sequence_length=2048, extension=Extension(0.2, 8192))
    many = lambda length, seed: _Length(length)  # noqa: E731
    first, last = stages(run, released, many, None)
    assert first.model.rope_base == 10_000
    assert last.model.rope_base == released.rope_base and last.model == released


class _Length:
    """Rows that are never read."""

    bytes_per_label = None

    def __init__(self, length: int) -> None:
        self.sequence_length = length


def test_a_run_extends_and_goes_on_within_the_extension(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    model = new_model()
    Trainer(model, config(tmp_path / "whole"), store, store, silent).run()
    assert model.config.rope_type == "ntk" and model.config.max_positions == 32
    assert model.config.original_max_positions == 16

    def stop(line: str) -> None:
        if line.startswith("step 7/"):
            raise KeyboardInterrupt

    stopped = config(tmp_path / "stopped", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        Trainer(new_model(), stopped, store, store, stop).run()
    said: list[str] = []
    again = new_model()
    Trainer(again, stopped, store, store, said.append).run()
    assert "after step 6 from" in said[0] and again.config == model.config
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


def test_a_run_goes_on_from_the_step_before_the_longer_rows(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """Such a checkpoint once named the shorter rows' place, and no run could go on from it."""
    Trainer(new_model(), config(tmp_path / "whole"), store, store, silent).run()

    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            os.kill(os.getpid(), signal.SIGINT)

    assert Trainer(new_model(), config(tmp_path / "stopped"), store, store, stop).run().stopped
    said: list[str] = []
    Trainer(new_model(), config(tmp_path / "stopped"), store, store, said.append).run()
    assert "after step 5 from" in said[0]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_the_base_matters(new_model: NewModel, store: TokenStore, tmp_path: Path) -> None:
    """What a model says changes with its positions, the meta tokens' constants too."""
    from hymba.model.batch import Batch

    model = new_model().eval()
    ids, batch = torch.arange(20), Batch.of((20,))
    with torch.no_grad():
        before = model(ids, batch)
        model.set_config(replace(model.config, rope_theta=50.0))
        after = model(ids, batch)
        assert not torch.allclose(before, after)
        fresh = new_model().eval()
        fresh.set_config(model.config)
        assert torch.equal(fresh(ids, batch), after)
    with pytest.raises(UserError, match="only positions"):
        model.set_config(replace(model.config, meta_tokens=4))


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        (Extension(0.5, 16), "longer than the others"),
        (Extension(0.5, 48), "divide a step of 64"),
        (Extension(0.5, 128), "divide a step of 64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, extension: Extension, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        replace(config(tmp_path), extension=extension)
    with pytest.raises(TrainError, match="share"):
        Extension(1.0)


def test_rows_of_another_length_are_refused(
    hybrid: Config, store: TokenStore, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="rows of 8 tokens were given, the run has 16"):
        stages(config(tmp_path), hybrid, Packer(store, 8, 0), None)
