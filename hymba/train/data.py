"""Text -> tokens on disk -> packed rows, every step deterministic and resumable.

    sources   which documents there are            python_library(), split(), Files
    store     their tokens, once, memory-mapped    prepare(), TokenStore
    rows      an endless shuffled stream of rows   Packer, Loader, Packed, HeldOut

Here: what to train on, as a user says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    sources: tuple[str, ...] = ("python-library",)
    """What to train on, each SOURCE or SOURCE=WEIGHT. A source is a text, .jsonl(.gz) or .parquet
    file, a folder of such files, `python` (the installed packages' sources), `python-library`, or
    `hf:NAME[:CONFIG[:SPLIT]]`."""
    held_out: tuple[str, ...] = ()
    """Sources that are never trained on; without any, a share of each source is held out."""
    held_out_percent: float = 2.0
    """The share held out, in percent, by a hash of each document's name or content."""
    tokenizer: str = "train"
    """A folder with a tokenizer or a model, a hub id, or `train`: learn one from the sources."""
    vocab_size: int = 16384
    """Tokens of a tokenizer that is learnt here."""
    text_key: str = "text"
    """Where a JSON line, a parquet row or a dataset's row has its text."""
    folder: Path = Path("runs/data")
    """Where tokens and a learnt tokenizer are kept, shared by runs."""
    most_tokens: int | None = None
    """Tokens to take of each source at most; needed for streams that never end."""
