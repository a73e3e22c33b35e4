"""Where a model lives: a folder here, or a repository on the hub. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hymba.errors import UserError

ALL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICENSE*")


class HubError(UserError):
    """A model that is neither a folder here nor to be had from the hub."""


def looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def find(model: str | Path, files: Sequence[str] = ALL_FILES) -> Path:
    """The folder of a model: as named, or with `files` downloaded from the hub.

    Raises HubError, one line, where there is none or no network."""
    if Path(model).is_dir():
        return Path(model)
    name = str(model)
    if not looks_like_hub_id(name):
        raise HubError(f"there is no model folder {name}")
    import huggingface_hub

    print(f"hymba: {name} is no folder here, asking the hub", file=sys.stderr)
    huggingface_hub.logging.set_verbosity_error()  # its retries are many lines
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of many kinds: no network, no such repository, not allowed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"{name} is no folder here and not to be had: {reason}") from None
