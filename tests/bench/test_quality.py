"""What bench/quality.py takes for a rounded model is what is loaded; it decodes as the forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.quality import (
    KINDS,
    MARKS,
    STATES,
    decoded,
    in_int8,
    main,
    nearest,
    widened,
    with_rounded,
)
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.schemes import SCHEMES
from hymba.weights import load, save
from tests.plans import plans

ROWS = torch.arange(60).view(3, 20)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(plans()["hymba"]).init_weights(seed=0).eval()


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ROWS.flatten(), Batch.of([20] * 3))).view(3, 20, -1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_widened_model_is_the_loaded_one(
    model: LanguageModel, scheme: str, tmp_path: Path
) -> None:
    save(model, tmp_path)
    packed, ours = load(tmp_path, quantize=scheme), nearest(model, scheme)
    assert all(torch.equal(x, ours.state_dict()[k]) for k, x in packed.state_dict().items())
    wide, full = logits(widened(ours)), logits(model)
    gap = (logits(packed) - wide).abs().max()  # kernels may round inputs
    assert 0 < (full - wide).abs().max() and gap < 0.1 * full.abs().max()


def test_one_kind_is_rounded_alone(model: LanguageModel) -> None:
    for kind, endings in KINDS.items():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if with_rounded(model, endings, SCHEMES["int4"]) is not None:
            after = model.state_dict()
            changed = {k for k in before if not torch.equal(before[k], after[k])}
            assert all(k.endswith(endings) for k in changed), kind
            assert changed or kind == "D"  # all ones: nothing to round


def test_decoding_is_the_forward_and_states_are_rounded(model: LanguageModel) -> None:
    found = {k: torch.stack(list(decoded(model, ROWS, x)), 1) for k, x in STATES.items()}
    full = logits(model)
    torch.testing.assert_close(found.pop("as trained"), full, rtol=1e-3, atol=1e-4)
    assert all(not torch.equal(x, full) for x in found.values())
    gaps = {k: (x - full).abs().max() for k, x in found.items()}
    assert gaps["SSM states zero"] > 2 * gaps["SSM states int8"]


def test_int8_has_255_steps() -> None:
    x = torch.randn(5, 32)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((in_int8(x) - x).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(in_int8(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_the_page_has_the_tables_of_the_file(tmp_path: Path) -> None:
    """docs/quantisation.md is written from results/, by nobody's hand."""
    root = Path(__file__).resolve().parent.parent.parent
    page = (root / "docs/quantisation.md").read_text(encoding="utf-8")
    copy = tmp_path / "page.md"
    before, rest = page.split(MARKS[0])
    copy.write_text(f"{before}{MARKS[0]}{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    (file,) = (root / "results").glob("quality-*.json")
    main(["--table", "--out", str(file), "--document", str(copy)])
    assert copy.read_text(encoding="utf-8") == page
