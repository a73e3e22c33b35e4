"""Exported folders, and what the model itself says to the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="pip install 'hymba[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'hymba[onnx]'")

import torch  # noqa: E402

from hymba.export import Choices, export  # noqa: E402
from hymba.export.session import Session  # noqa: E402
from hymba.model.batch import Batch  # noqa: E402
from hymba.model.decoder import LanguageModel  # noqa: E402
from hymba.model.packed import make_room, packed_tiles, plan  # noqa: E402
from hymba.ops.packed import dequantize  # noqa: E402
from hymba.schemes import SCHEMES  # noqa: E402

Exported = Callable[..., Session]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """exported(model, room=64, **choices) -> a session of one thread."""

    def make(model: LanguageModel, room: int = 64, **choices: int) -> Session:
        export(model, tmp_path / "onnx", Choices(**{"chunk": 8} | choices))
        return Session(tmp_path / "onnx", room, threads=1)

    return make


@torch.no_grad()
def logits_of(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """(tokens, V): one forward over all."""
    return model.logits(model(torch.tensor(ids), Batch.of([len(ids)]))).numpy()


def greedy(session: Session, prompt: list[int], tokens: int) -> tuple[list[int], np.ndarray]:
    """Prompt in chunks, then one by one: all ids, and the logits behind the prompt (tokens, V)."""
    ids, rows = list(prompt), [session.feed(prompt)]
    for _ in range(tokens - 1):
        ids.append(int(rows[-1].argmax()))
        rows.append(session.feed(ids[-1:]))
    return [*ids, int(rows[-1].argmax())], np.stack(rows)


def assert_same_tokens(
    session: Session, model: LanguageModel, prompt: list[int], tokens: int, off: float
) -> None:
    """The session's greedy tokens are the model's, and logits differ by `off` of their spread at
    most. (If all of one forward's choices are the next tokens, a step-wise walk makes them too.)"""
    ids, rows = greedy(session, prompt, tokens)
    ours = logits_of(model, ids)[len(prompt) - 1 : -1]
    assert np.abs(rows - ours).max() <= off * ours.std()
    assert ids[len(prompt) :] == ours.argmax(-1).tolist()


@torch.no_grad()
def in_few_bits(model: LanguageModel, scheme: str) -> tuple[LanguageModel, LanguageModel]:
    """The model packed, and a float32 model of exactly the weights that its codes mean."""
    packed, meant = (LanguageModel(model.config) for _ in range(2))
    for copy in (packed, meant):
        copy.load_state_dict(model.state_dict())
    schemes = plan(packed, SCHEMES[scheme])
    make_room(packed, schemes, model.config.tie_embeddings)
    for name, kind in schemes.items():
        weight = model.get_parameter(f"{name}.weight")
        packed.get_submodule(name).tiles.copy_(packed_tiles(name, weight, kind))  # type: ignore
        meant.get_parameter(f"{name}.weight").copy_(dequantize(packed.get_submodule(name).packed))
    return packed, meant
