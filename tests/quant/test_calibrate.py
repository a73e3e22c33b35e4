"""Calibration of whole models: every plan, the same modules and files as rounding to nearest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hymba.config import Config
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.packed import make_room, plan, schemes_of
from hymba.ops.packed import dequantize
from hymba.quant import calibrate, text_rows
from hymba.quant.calibrate import CalibrationError, _inputs, _Walk
from hymba.schemes import SCHEMES, SchemeError
from hymba.tokenizer import Tokenizer
from hymba.weights import load, save
from tests.plans import plans

PLANS = plans()
each_plan = pytest.mark.parametrize("name", PLANS)


def model_of(name: str, **changes: object) -> LanguageModel:
    model = LanguageModel(PLANS[name].replace(**changes)).init_weights(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # not the start's: norms of 1 hide mistakes
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return model.eval()


def rows_of(model: LanguageModel, count: int = 12, length: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (count, length), generator=draw)


def hidden(model: LanguageModel, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(rows.flatten(), Batch.of([rows.shape[1]] * len(rows)))


@each_plan
def test_the_walk_is_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    rows = rows_of(model)
    monkeypatch.setattr(sys.modules[_Walk.__module__], "AT_ONCE", 5 * rows.shape[1])
    with torch.no_grad():
        walk = _Walk(model, rows)
        assert len(walk.hidden) == 3
        for number in range(len(model.config.layers)):
            walk.look(number)
            walk.go(number)
        parts = zip(walk.hidden, walk.batches, strict=True)
        found = torch.cat([model.decoder.final_norm(x[batch.meta :]) for x, batch in parts])
    torch.testing.assert_close(found, hidden(model, rows), rtol=1e-4, atol=1e-4)
    assert not any(walk.lefts)  # nothing is kept that no layer will look at


@each_plan
@pytest.mark.parametrize("scheme", SCHEMES)
def test_modules_and_files_are_those_of_load(name: str, scheme: str, tmp_path: Path) -> None:
    model = model_of(name)
    save(model, tmp_path / "full")
    rows, told = rows_of(model), []
    better = calibrate(tmp_path / "full", scheme, rows, lambda *said: told.append(said))
    assert told[-1] == ("layers", len(model.config.layers), len(model.config.layers))
    nearest = load(tmp_path / "full", quantize=scheme)
    assert schemes_of(better) == schemes_of(nearest)
    ours, theirs = better.state_dict(), nearest.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert not all(torch.equal(ours[k], theirs[k]) for k in ours)
    save(better, tmp_path / "few")
    again = load(tmp_path / "few")
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in better.state_dict().items())
    if model.config.tie_embeddings:
        assert better.lm_head.tiles is better.decoder.embed_tokens.tiles


@each_plan
def test_outputs_are_nearer(name: str, tmp_path: Path) -> None:
    """Of the first layer's projections, which both ways read the same inputs."""
    model = model_of(name, vocab_size=96)
    save(model, tmp_path)
    rows = rows_of(model, count=64)
    names = [x for x in plan(model, SCHEMES["int4"]) if x.startswith("decoder.layers.0.")]
    with torch.no_grad(), _inputs(model, names) as seen:
        _Walk(model, rows).look(0)
    better, nearest = calibrate(tmp_path, "int4", rows), load(tmp_path, quantize="int4")
    errors = []
    for packed in (better, nearest):
        total = 0.0
        for name_ in names:
            weight = model.get_submodule(name_).weight.detach()
            gap = dequantize(packed.get_submodule(name_).packed) - weight
            total += float((gap @ seen[name_] * gap).sum() / (weight @ seen[name_] * weight).sum())
        errors.append(total)
    assert errors[0] < 0.95 * errors[1]


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model = model_of("hymba")
    save(model, tmp_path / "full")
    save(load(tmp_path / "full", quantize="int8"), tmp_path / "few")
    with pytest.raises(SchemeError, match="quantised already"):
        calibrate(tmp_path / "few", "int8", rows_of(model))
    with pytest.raises(UserError, match="int8, int4"):
        calibrate(tmp_path / "full", "int5", rows_of(model))


@pytest.mark.parametrize("scale", [torch.nan, 1e25])
def test_inputs_that_are_not_finite_are_told_with_the_weight_they_reach(scale: float) -> None:
    model = model_of("llama")
    model.get_parameter("decoder.layers.1.input_norm.weight").data.fill_(scale)
    with pytest.raises(SchemeError, match=r"layers.1.mamba.in_proj.weight .* not finite"):
        calibrate(model, "int4", rows_of(model))


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(9, dtype=torch.long), torch.zeros(0, 9, dtype=torch.long), torch.ones(2, 9)],
)
def test_rows_that_are_none_are_refused(rows: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"rows are token ids \(R, T\), not .* of"):
        calibrate(model_of("llama"), "int4", rows)


def test_a_weight_that_cannot_be_held_is_named() -> None:
    model = model_of("hymba")
    with torch.no_grad():
        model.decoder.layers[0].mixer.out_proj.weight[0, 0] = torch.nan
    with pytest.raises(SchemeError, match=r"layers\.0\.mamba\.out_proj\.weight .* int4"):
        calibrate(model, "int4", rows_of(model))


TEXTS = ["def one(x):\n    return x + 1\n" * 20, "a short one", "class Two:\n    pass\n" * 50]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_rows_of_text(tokenizer: Tokenizer) -> None:
    rows = text_rows(tokenizer, TEXTS, count=6, length=16)
    assert rows.shape == (6, 16) and rows.dtype == torch.long
    assert torch.equal(rows, text_rows(tokenizer, TEXTS, count=6, length=16))
    assert not torch.equal(rows, text_rows(tokenizer, TEXTS, count=6, length=16, seed=1))
    assert bool((rows[:, 0] == tokenizer.bos_id).all())
    texts = [tokenizer.decode(row[1:].tolist()) for row in rows]
    assert any("Two" in text for text in texts) and any("one" in text for text in texts)
    assert len(text_rows(tokenizer, TEXTS, count=10**6, length=16)) < 10**3


def test_too_little_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="a row of calibration 512"):
        text_rows(tokenizer, ["a short one"])
    with pytest.raises(CalibrationError):
        text_rows(tokenizer, [])


@pytest.mark.parametrize(("scheme", "share"), [("int8", 0.28), ("int4", 0.17)])
def test_the_released_shape_is_small_enough(scheme: str, share: float) -> None:
    """Bytes of all tensors, of float32's."""
    config = Config.preset("hymba-1.5b")
    with torch.device("meta"):
        model = LanguageModel(config)
    full = 4 * sum(x.numel() for x in model.parameters())
    make_room(model, plan(model, SCHEMES[scheme]), config.tie_embeddings)
    assert sum(x.nbytes for x in model.parameters()) <= share * full
