"""Models of every plan and what the one-request loop says of them, made once a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.engine import Completion, Sampling
from hymba.model.decoder import LanguageModel
from tests.engine.playing import Prompt, Twin, alone


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> Any:
    models: dict[str, LanguageModel] = {}

    def of(plan: str) -> LanguageModel:
        if plan not in models:
            models[plan] = lively(tiny(plan))
        return models[plan]

    return of


@pytest.fixture(scope="module")
def twin(model: Callable[[str], LanguageModel]) -> Twin:
    """What the one-request loop says; asked once."""
    said: dict[Any, Completion] = {}

    def ask(plan: str, prompt: list[int], how: Sampling, tokenizer: Any = None) -> Completion:
        key = plan, tuple(prompt), repr(how)
        if key not in said:
            said[key] = alone(model(plan), prompt, how, tokenizer)
        return said[key]

    return ask


@pytest.fixture
def prompt(text: Callable[..., torch.Tensor]) -> Prompt:
    return lambda length, seed=0: text(length, seed).tolist()
