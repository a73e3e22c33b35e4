"""A decode step with packed weights, with its constants ready and without, is the forward's row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.packed import make_room, packed_tiles, plan, schemes_of
from hymba.ops import Packed
from hymba.ops.backend import forget
from hymba.schemes import SCHEMES

IDS = torch.tensor([5, 9, 30, 2, 60, 17, 44, 8, 21])


@pytest.fixture
def packed(
    tiny: Callable[[str], Config],
    lively: Callable[..., LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> LanguageModel:
    """Gate and up of whole tiles, on the reference."""
    monkeypatch.setenv("HYMBA_BACKEND", "reference")
    forget()
    model = lively(tiny("hymba").replace(intermediate_size=64))
    schemes = plan(model, SCHEMES["int4"])
    tiles = {
        name: packed_tiles(name, model.get_parameter(f"{name}.weight"), scheme)
        for name, scheme in schemes.items()
    }
    make_room(model, schemes, tied=True)
    for name, bytes_ in tiles.items():
        model.get_parameter(f"{name}.tiles").data.copy_(bytes_)
    assert schemes_of(model) == schemes
    return model


@torch.no_grad()
def step(model: LanguageModel, ready: bool) -> Tensor:
    """Logits of the last token, behind the others in a cache."""
    cache = model.new_cache(1)
    model(IDS[:-1], Batch.of([len(IDS) - 1]), cache)
    lengths, layers = cache.begin_step([0])
    if ready:
        constants = zip(model.decoder.pack(), model.decoder.wide_dts(), strict=True)
        both = list(constants)
        assert all(isinstance(gate_up, Packed) and dt is not None for gate_up, dt in both)
        layers = [
            now._replace(gate_up=gate_up, dt=dt)
            for now, (gate_up, dt) in zip(layers, both, strict=True)
        ]
    return model.step(IDS[-1:], lengths, layers)


@torch.no_grad()
def test_a_step_is_the_forward_s_last_row(packed: LanguageModel) -> None:
    want = packed.logits(packed(IDS, Batch.of([len(IDS)])))[-1:]
    for ready in (False, True):
        assert torch.allclose(step(packed, ready), want, rtol=1e-4, atol=1e-4)
    again = packed.logits(packed(IDS, Batch.of([len(IDS)])))[-1:]
    assert torch.equal(again, want)  # stacked tiles stay what they were
    forget()


def test_tiles_that_do_not_end_with_the_first_matrix_are_not_stacked(
    packed: LanguageModel, tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> None:
    other = lively(tiny("hymba"))  # 40 rows: a tile and a quarter
    make_room(other, plan(other, SCHEMES["int8"]), tied=True)
    assert other.decoder.pack() == [None] * len(other.config.layers)
    forget()
