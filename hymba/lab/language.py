"""Language: bits per byte of text that was held out, in all and by position.

The corpus is what a user names; without a name the Python sources of the installed packages, which
every machine has, split by package. All variants of a size read the same rows in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hymba.lab.sizes import Size
from hymba.lab.training import Device, Trained
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.train import metrics
from hymba.train.data import Data, DataConfig, open_data
from hymba.train.rows import HeldOut, Packed
from hymba.train.store import TokenStore

LONGER = 4  # held-out text is also read in pieces so many times as long as training's
LOGITS = 1 << 24  # made at a time


@dataclass(frozen=True)
class Buckets:
    """Nats and labels by position, in buckets that double: 0-15, 16-31, 32-63, ..."""

    edges: tuple[int, ...]
    nats: torch.Tensor  # (buckets,)
    labels: torch.Tensor

    @staticmethod
    def empty(length: int) -> Buckets:
        edges = [0, 16]
        while edges[-1] < length:
            edges.append(min(2 * edges[-1], length))
        count = len(edges) - 1
        zeros = torch.zeros(count, dtype=torch.float64)
        return Buckets(tuple(edges), zeros, zeros.clone())

    def add(self, nats: torch.Tensor, positions: torch.Tensor) -> None:
        """nats, positions: (N,)"""
        bucket = torch.bucketize(positions, torch.tensor(self.edges[1:-1]), right=True)
        self.nats.index_add_(0, bucket, nats.double())
        self.labels.index_add_(0, bucket, torch.ones_like(nats, dtype=torch.float64))

    def bits(self, bytes_per_label: float) -> list[float | None]:
        """Bits per byte of each bucket, at the text's mean bytes a token; None where none is."""
        each = self.nats / self.labels.clamp(min=1) / math.log(2) / bytes_per_label
        pairs = zip(each.tolist(), self.labels.tolist(), strict=True)
        return [value if count else None for value, count in pairs]


@torch.no_grad()
def read(
    model: LanguageModel, store: TokenStore, length: int, rows: int, most: int, device: Device
) -> dict[str, Any]:
    """Held-out text in pieces of at most `length` tokens, `rows` at once."""
    held_out = HeldOut(store, length, rows, most)
    found = Buckets.empty(length)
    for number in range(len(held_out)):
        packed = held_out[number]
        found.add(_nats(model, packed, device), Batch.of(packed.lengths).positions)
    nats = float(found.nats.sum())
    return {
        "length": length,
        "tokens": held_out.labels,
        "bytes": held_out.bytes,
        "held_out_loss": nats / held_out.labels,
        "bits_per_byte": nats / math.log(2) / held_out.bytes,
        "edges": list(found.edges),
        "bits_by_position": found.bits(held_out.bytes / held_out.labels),
    }


def _nats(model: LanguageModel, packed: Packed, device: Device) -> torch.Tensor:
    """(N,) of each label."""
    labels = packed.labels.to(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.is_gpu):
        hidden = model(packed.tokens.to(device.type), Batch.of(packed.lengths, device=device.type))
        rows = max(1, LOGITS // model.config.vocab_size)
        parts = zip(hidden.split(rows), labels.split(rows), strict=True)
        each = [F.cross_entropy(model.logits(h).float(), y, reduction="none") for h, y in parts]
    return torch.cat(each).cpu()


def measure(trained: Trained, store: TokenStore, size: Size, device: Device) -> dict[str, Any]:
    """All that is said of one language model."""
    run, most = size.language, size.held_out_tokens
    rows = min(run.rows, 16)
    length = run.sequence_length
    usual = read(trained.model, store, length, rows, most, device)
    longer = read(trained.model, store, LONGER * length, max(1, rows // LONGER), most // 2, device)
    steps, bits = metrics.series(metrics.read(trained.metrics), "bits_per_byte")
    return {
        "bits_per_byte": usual["bits_per_byte"],
        "held_out": usual,
        "longer": longer,
        "curve": [list(pair) for pair in zip(steps, bits, strict=True)],
    }


def corpus(
    size: Size, sources: tuple[str, ...], folder: Path, progress: Callable[..., None]
) -> Data:
    """Tokenizer, rows and held-out text; made once, kept in `folder`."""
    config = DataConfig(sources=sources, vocab_size=size.vocab_size, folder=folder)
    return open_data(config, progress)
