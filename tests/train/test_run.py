"""Runs: gradients add up, held-out numbers are right, and stopping anywhere costs nothing."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.train import OptimConfig, metrics
from hymba.train.rows import Loader, Packer
from hymba.train.run import TrainConfig, Trainer, TrainError
from hymba.train.sources import DataError
from hymba.train.store import TokenStore

NewModel = Callable[[], LanguageModel]
LENGTH = 16


def config(folder: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        folder,
        steps=12,
        rows=4,
        sequence_length=LENGTH,
        save_every=4,
        held_out_every=6,
        held_out_tokens=400,
    )
    return replace(base, **changes)


def silent(_: str) -> None:
    pass


def losses(folder: Path) -> list[float]:
    return metrics.series(metrics.read(folder / "metrics.jsonl"), "loss")[1]


# ---- steps


def test_loss_falls(new_model: NewModel, store: TokenStore, tmp_path: Path) -> None:
    result = Trainer(new_model(), config(tmp_path, steps=30), store, store, silent).run()
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 31))
    assert records[0]["loss"] == pytest.approx(math.log(280), abs=0.2)  # knows nothing yet
    assert result.loss == records[-1]["loss"] < 4.0
    assert result.step == 30 and not result.stopped
    bits = metrics.series(records, "bits_per_byte")
    assert bits[0] == [6, 12, 18, 24, 30]
    assert result.bits_per_byte == bits[1][-1] < bits[1][0]
    assert records[-1]["tokens"] == 30 * 4 * LENGTH


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_accumulated_gradients_are_those_of_one_big_batch(
    new_model: NewModel, store: TokenStore, tmp_path: Path, micro_rows: int
) -> None:
    """Five rows in micro-batches of 2, 2, 1: a mean of means would weigh the last one double."""
    gradients, steps = [], []
    for micro in (None, micro_rows):
        model = new_model()
        trainer = Trainer(model, config(tmp_path, rows=5, micro_rows=micro), store, None, silent)
        steps.append(float(trainer._gradients(trainer._micro_batches())))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)
    for name, whole in gradients[0].items():
        assert whole is not None and whole.norm() > 0, name
        scale = whole.abs().max().item()
        torch.testing.assert_close(
            gradients[1][name], whole, rtol=1e-4, atol=1e-5 * scale, msg=name
        )


def test_packed_pieces_train_as_if_each_were_alone(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    model = new_model()
    trainer = Trainer(model, config(tmp_path), store, None, silent)
    [packed] = Loader(Packer(store, LENGTH, seed=0)).take(8)
    assert len(packed.lengths) > 8
    together = trainer._gradients([packed])
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = 0.0
    tokens, labels = packed.tokens.split(packed.lengths), packed.labels.split(packed.lengths)
    for piece, goal in zip(tokens, labels, strict=True):
        hidden = model(piece, Batch.of((len(piece),)))
        nats = torch.nn.functional.cross_entropy(model.logits(hidden), goal, reduction="sum")
        (nats / packed.labels.numel()).backward()
        alone += nats.item() / packed.labels.numel()
    assert together == pytest.approx(alone, rel=1e-5)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(packed_gradients[name], p.grad, rtol=1e-3, atol=1e-4 * scale)


def test_bits_per_byte_of_a_model_that_knows_nothing(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """Equal logits cost ln(vocabulary) nats a label; every byte and every end counts."""
    model = new_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    held = config(tmp_path, held_out_tokens=None)
    found = Trainer(model, held, store, store, silent).evaluate()
    labels, size = int(store.pairs.sum()), store.manifest["bytes"]
    assert found["held_out_loss"] == pytest.approx(math.log(280), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(labels * math.log2(280) / size, rel=1e-6)


def test_evaluation_does_not_change_the_run(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    for name, every in (("often", 1), ("never", 0)):
        run = config(tmp_path / name, steps=5, held_out_every=every, held_out_tokens=100)
        Trainer(new_model(), run, store, store, silent).run()
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_bfloat16_trains_float32_weights(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """The same path as float32 within bfloat16's 3 digits, and not the very same numbers."""
    model, wide = new_model(), config(tmp_path / "wide", steps=6)
    Trainer(new_model(), wide, store, store, silent).run()
    narrow = replace(wide, folder=tmp_path / "narrow", precision="bfloat16")
    Trainer(model, narrow, store, store, silent).run()
    assert losses(narrow.folder) == pytest.approx(losses(wide.folder), rel=1e-2)
    assert losses(narrow.folder) != losses(wide.folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---- gradients that are not finite


def poison(model: LanguageModel, steps: set[int]) -> None:
    """Make one gradient infinite at these steps (1 is the first)."""
    calls = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.inf if len(calls) in steps else gradient

    model.decoder.layers[1].mlp.up_proj.weight.register_hook(hook)


def test_a_bad_step_is_skipped_and_counted(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    model, said = new_model(), []
    poison(model, {3, 5})
    trainer = Trainer(model, config(tmp_path), store, None, said.append)
    result = trainer.run()
    assert result.step == 12 and trainer.skipped == 2
    assert [r["skipped_steps"] for r in metrics.read(tmp_path / "metrics.jsonl")][1:6] == [
        0, 1, 1, 2, 2,
    ]  # fmt: skip
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert said[-1].endswith("skipped 2")


def test_a_skipped_step_moves_nothing(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    model = new_model()
    poison(model, {1})
    trainer = Trainer(model, config(tmp_path), store, None, silent)
    record = trainer._one_step()
    assert (
        record["skipped_steps"] == 1
        and trainer.step == 1
        and not any(o.state for o in trainer.optimizers)
    )
    fresh = new_model().state_dict()
    assert all(torch.equal(p, fresh[name]) for name, p in model.state_dict().items())


def test_a_run_of_bad_steps_stops_with_a_good_checkpoint(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    model = new_model()
    poison(model, set(range(6, 99)))
    run = config(tmp_path, most_skips=3, steps=20)
    with pytest.raises(TrainError, match=r"3 steps in a row up to step 8.*step_000004"):
        Trainer(model, run, store, None, silent).run()  # step 8 was due, but not a good one
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]
    mended = Trainer(new_model(), run, store, None, silent)
    assert mended.run().step == 20  # a healthy model goes on from there
    assert mended.skipped == 0
    assert all(torch.isfinite(p).all() for p in mended.model.parameters())


def test_bad_steps_before_any_checkpoint_leave_one(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """The skipped steps moved no weight: what is saved is the state before them."""
    model = new_model()
    poison(model, set(range(3, 99)))
    run = config(tmp_path, most_skips=3, save_every=0)
    with pytest.raises(TrainError, match=r"up to step 5.*step_000005"):
        Trainer(model, run, store, None, silent).run()


def test_of_two_runs_in_one_folder_the_second_is_refused(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """It would delete what the first is writing."""
    first = Trainer(new_model(), config(tmp_path), store, None, silent)

    def say(line: str) -> None:
        if line.startswith("step  4/"):
            with pytest.raises(TrainError, match="another run is going on in"):
                Trainer(new_model(), config(tmp_path), store, None, silent).run()

    first.say = say
    assert first.run().step == 12 and len(losses(tmp_path)) == 12


# ---- going on


def test_a_finished_run_is_not_run_again(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    first = Trainer(new_model(), config(tmp_path), store, store, silent).run()
    said: list[str] = []
    model = new_model()
    again = Trainer(model, config(tmp_path), store, store, said.append).run()
    assert again.step == 12 and len(losses(tmp_path)) == 12
    assert (again.checkpoint, again.bits_per_byte) == (first.checkpoint, first.bits_per_byte)
    assert said == [f"going on after step 12 from {first.checkpoint}"]
    assert not torch.equal(model.lm_head.weight, new_model().lm_head.weight)  # it was loaded


def test_never_refuses_a_folder_with_a_run(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    Trainer(new_model(), config(tmp_path), store, None, silent).run()
    with pytest.raises(TrainError, match="holds a run"):
        Trainer(new_model(), config(tmp_path, resume="never"), store, None, silent).run()


def test_more_steps_than_asked_for_are_refused(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """It would look as if the run were done, in so many steps as were asked for."""
    Trainer(new_model(), config(tmp_path, steps=4), store, None, silent).run()
    with pytest.raises(TrainError, match="has done 4 steps, the run has 3"):
        Trainer(new_model(), config(tmp_path, steps=3), store, None, silent).run()


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused(
    kinds: tuple[Any, Any], new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """Not in torch's words for means that are not there, with the advice to delete a checkpoint."""
    made = (OptimConfig(kind=kind) for kind in kinds)
    first, second = (config(tmp_path, steps=2, optimizer=each) for each in made)
    Trainer(new_model(), first, store, None, silent).run()
    with pytest.raises(TrainError, match=f"made with optimizer.kind {kinds[0]}, now it is"):
        Trainer(new_model(), second, store, None, silent).run()


def test_tokens_are_counted_as_they_were_taken(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    """Not steps times the tokens of a step, which a run that goes on may change."""
    first = config(tmp_path, steps=2)
    Trainer(new_model(), first, store, None, silent).run()
    Trainer(new_model(), replace(first, steps=3, rows=2 * first.rows), store, None, silent).run()
    tokens = [record["tokens"] for record in metrics.read(tmp_path / "metrics.jsonl")]
    assert tokens == [first.tokens, 2 * first.tokens, 4 * first.tokens]


def test_another_order_of_the_data_is_refused(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    Trainer(new_model(), config(tmp_path), store, None, silent).run()
    with pytest.raises(DataError, match="made with seed 0, now it is 1"):
        Trainer(new_model(), config(tmp_path, seed=1), store, None, silent).run()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 500.0}, "rope_theta"),
        ({"layers": 3}, "num_hidden_layers"),  # its tensors are all there, and one layer's more
    ],
)
def test_another_model_is_refused(
    new_model: NewModel, store: TokenStore, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    Trainer(new_model(), config(tmp_path, steps=1), store, None, silent).run()
    before = new_model().config
    if "layers" in change:
        change = {"layers": before.layers[: change["layers"]]}
    other = LanguageModel(replace(before, **change)).init_weights(seed=0)
    weights = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(TrainError, match=f"made by a model with another .*{named}"):
        Trainer(other, config(tmp_path, steps=2), store, None, silent).run()
    assert all(torch.equal(p, weights[name]) for name, p in other.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"held_out_tokens": 0},
        {"micro_rows": 0},
        {"keep": 0},
        {"precision": "int8"},
        {"resume": "maybe"},
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=next(iter(wrong))):
        config(tmp_path, **wrong)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_same_call_goes_on(
    new_model: NewModel, store: TokenStore, tmp_path: Path, number: signal.Signals, capfd
) -> None:
    """Step 5 is no step that saves: stopping does. All losses are those of an undisturbed run."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("step  5/"):
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = config(tmp_path / "stopped")
    result = Trainer(new_model(), run, store, store, say).run()
    assert (result.step, result.stopped, result.bits_per_byte) == (5, True, None)
    assert result.checkpoint.name == "step_000005"
    assert "stopped after step 5 of 12" in said[-2] and "goes on" in said[-1]
    assert "once more stops at once" in capfd.readouterr().err
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    assert Trainer(new_model(), run, store, store, silent).run().step == 12
    Trainer(new_model(), config(tmp_path / "whole"), store, store, silent).run()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(
    new_model: NewModel, store: TokenStore, tmp_path: Path
) -> None:
    def say(line: str) -> None:
        if line.startswith("step  5/"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(new_model(), config(tmp_path), store, None, say).run()
    whole = Trainer(new_model(), config(tmp_path / "whole"), store, None, silent)
    whole.run()
    again = Trainer(new_model(), config(tmp_path), store, None, silent)
    assert again.run().step == 12
    assert losses(tmp_path) == losses(tmp_path / "whole")


# Another process, so that it can really be killed. Same threads as here: floating-point sums
# depend on how they are split.
SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.train import TokenStore, TrainConfig, Trainer

folder, data, sizes, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = LanguageModel(Config.from_dict(json.loads(sizes))).init_weights(seed=0)
config = TrainConfig(
    Path(folder), steps=30, rows=4, sequence_length=16, save_every=5, held_out_every=0
)
store = TokenStore.open(Path(data))

def say(line):
    print(line, flush=True)
    time.sleep(line.startswith("step 17/"))  # the signal comes in the middle of the run

result = Trainer(model, config, store, None, say).run()
sys.exit(3 if result.stopped else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_gives_the_same_losses_bit_for_bit(
    new_model: NewModel,
    store: TokenStore,
    store_folder: Path,
    tmp_path: Path,
    root: Path,
    number: signal.Signals,
) -> None:
    sizes = json.dumps(new_model().config.to_dict())
    stopped, threads = tmp_path / "stopped", str(torch.get_num_threads())
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(stopped), str(store_folder), sizes, threads],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 17/"):
            child.send_signal(number)
            break
    rest = child.stdout.read()
    assert child.wait(timeout=60) == (-9 if number == signal.SIGKILL else 3)
    before = losses(stopped)
    assert 16 <= len(before) < 30  # it was in the middle

    run = config(stopped, steps=30, save_every=5)
    said: list[str] = []
    assert Trainer(new_model(), run, store, None, said.append).run().step == 30
    if number == signal.SIGKILL:
        assert "after step 15 from" in said[0] or "after step 20 from" in said[0]
    else:
        assert "the same command goes on" in rest
        assert f"after step {len(before)} from" in said[0]
    whole = Trainer(new_model(), replace(run, folder=tmp_path / "whole"), store, None, silent)
    whole.run()
    assert losses(stopped) == losses(tmp_path / "whole")
    assert losses(stopped)[: len(before)] == before
    records = [metrics.read(path / "metrics.jsonl") for path in (stopped, tmp_path / "whole")]
    for key in ("lr", "grad_norm", "tokens", "epoch"):
        assert metrics.series(records[0], key) == metrics.series(records[1], key)


def test_training_imports_with_the_core_packages_alone(root: Path) -> None:
    absent = ["tyro", "rich", "datasets", "matplotlib", "peft", "trl", "jinja2", "pandas"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import hymba.train"
    code += "; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
