"""Is there a hub? Asked once and quickly: libraries that do not know try for half a minute."""

from __future__ import annotations

import os
import sys
from functools import cache

WAIT = 4.0  # seconds


def offline() -> bool:
    """Whether somebody said that there is no network: the user, or `offline_without_network`."""
    return any(os.environ.get(name) in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def offline_without_network() -> None:
    """Tell datasets and huggingface_hub that there is no network, if there is none: then they take
    what they have in their caches, and say at once what they have not."""
    if offline() or _reached():
        return
    for name in OFFLINE:
        os.environ[name] = "1"
    # Both read the environment when they are imported, which may have been before.
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), *_OF_DATASETS):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


_OF_DATASETS = (("datasets.config", "HF_HUB_OFFLINE"), ("datasets.config", "HF_DATASETS_OFFLINE"))


@cache
def _reached() -> bool:
    import httpx  # huggingface_hub's own; it knows of proxies

    try:
        httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=WAIT)
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return False
    return True
