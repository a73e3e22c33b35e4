"""Rows of different lengths without padding: runs of rows in one flat tensor.

    rows     0 1 2 3 4 5 6 7 8          Segments((4, 2, 3))
    segment  0 0 0 0 1 1 2 2 2          starts (0, 4, 6), total 9

A padded batch, a packed row of documents and a mixed step of an engine are all this. Lengths are
host integers (whoever makes a batch knows them), so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from itertools import accumulate
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of rows; every length is at least 1."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.lengths, default=1) < 1:
            raise ValueError(f"segment lengths must be positive, got {self.lengths}")

    @property
    def count(self) -> int:
        return len(self.lengths)

    # Not cached: a compiler stops at the lock of a cached property (before Python 3.12).
    @property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Last row of each segment."""
        return tuple(start + length - 1 for start, length in self)

    @property
    def uniform(self) -> int | None:
        """The common length, where there is one: the rows are then a view (S, T, ...)."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(start, length) of each segment."""
        return iter(zip(self.starts, self.lengths, strict=True))

    def offsets(self, device: torch.device | str) -> Tensor:
        """(S + 1,) int32 row offsets, as kernels read them; kept, so not to be written to."""
        return _offsets(self.lengths, torch.device(device))

    def owners(self, device: torch.device | str) -> Tensor:
        """(N,) int32 segment of each row; kept, so not to be written to."""
        return _owners(self.lengths, torch.device(device))


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on its way to a device, in stream order: the host does not wait for it, nor for
    what the device still has to do."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


P = ParamSpec("P")
R = TypeVar("R")
_captured: dict[int, object] = {}


def table(build: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions (..., device) that make tables for kernels: every layer of every step
    with the same segments asks for the same ones, so they cross to the device once.

    They are no inference tensors, which autograd would refuse to keep; and what a CUDA graph was
    captured with is kept for good, since the graph has its address."""
    kept = lru_cache(maxsize=64)(torch.inference_mode(False)(build))

    @wraps(build)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        found = kept(*args, **kwargs)  # type: ignore[arg-type]
        device = args[-1]
        assert isinstance(device, torch.device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[id(found)] = found
        return found

    ask.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return ask


@table
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = accumulate(lengths, initial=0)
    return torch.tensor(list(ends), dtype=torch.int32).to(device)


@table
def _owners(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    counts = torch.tensor(lengths, dtype=torch.int32)
    segments = torch.arange(len(lengths), dtype=torch.int32)
    return segments.repeat_interleave(counts).to(device)
