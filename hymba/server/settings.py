"""What whoever starts a server decides. The engine's own limits are `hymba.engine`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_CHOICES = 128  # completions one call may ask for, prompts x n


@dataclass(frozen=True)
class Settings:
    model: str = "hymba"  # the name clients ask for
    api_key: str | None = None  # None: everybody may ask
    cors_origins: tuple[str, ...] = ()  # of pages elsewhere that may ask; ("*",) for all
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None  # None: as many as the model has positions
    timeout: float = 600.0  # seconds for one call, waiting included
    body_timeout: float = 30.0  # seconds for its body to arrive
    eos_ids: tuple[int, ...] = ()  # stop ids beside the config's own
    # Sampling where the call says nothing; see `defaults_of`
    defaults: Mapping[str, Any] = field(default_factory=dict)


def defaults_of(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's generation_config.json decides for calls that leave it open."""
    names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
    found = {name: generation_config.get(name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def eos_of(generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The folder's own list of ids that end an answer; chat models may have several."""
    found = generation_config.get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return tuple(token for token in listed if isinstance(token, int))
