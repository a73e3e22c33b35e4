"""What one forward computes: new tokens of some sequences, flat, without padding.

Training, prefill, a chunk of a prefill and a decode step differ only in this. Training gives whole
documents, each its own segment; a decode step gives segments of length 1 with a past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.ops import Segments, send


@dataclass(frozen=True)
class Batch:
    """N new rows in S segments; segment i continues the sequence in cache slot `slots[i]`."""

    segments: Segments
    past: tuple[int, ...]  # text tokens of each sequence before its new rows
    slots: tuple[int, ...]
    positions: Tensor  # (N,) text positions: past, past + 1, ... of each segment
    meta: int = 0  # meta-token rows in front of the N rows; the decoder puts them there

    @staticmethod
    def of(
        lengths: Sequence[int],
        past: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """New rows of each sequence, how many each had before (0), and its slot (0, 1, ...)."""
        segments = Segments(tuple(lengths))
        before = tuple(past) if past is not None else (0,) * segments.count
        places = tuple(slots) if slots is not None else tuple(range(segments.count))
        if not len(before) == len(places) == segments.count:
            raise ValueError(f"{segments.count} segments, {len(before)} pasts, {len(places)} slots")
        if len(set(places)) < len(places):
            raise ValueError(f"a slot may be in a batch once, got {places}")
        # Position p of segment i is its row, less where the segment starts, plus its past.
        counts = torch.tensor([segments.lengths, segments.starts, before], dtype=torch.long)
        shifts = (counts[2] - counts[1]).repeat_interleave(counts[0])
        positions = torch.arange(segments.total) + shifts
        return Batch(segments, before, places, send(positions, device))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows (meta + N, ...) -> those of the meta tokens, those of the text.

        Not two slices: in backward each would make a gradient of all rows, to be added up."""
        first, rest = rows.split([self.meta, rows.shape[0] - self.meta])
        return first, rest

    def with_meta(self, count: int) -> Batch:
        return dataclasses.replace(self, meta=count)
