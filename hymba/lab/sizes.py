"""How large a laboratory is: the base model's shape, its run, the recall models' shape and runs.

Each size is one set of numbers for all variants, so that within a size everything but the
architecture is equal: budget, data, order, seeds, optimiser, schedule. No torch here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from hymba.errors import UserError


class LabError(UserError):
    """A laboratory that cannot be run as asked; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """Of the base model: Hymba with all its parts. Every other variant is fitted to its size."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    window: int
    meta_tokens: int
    ssm_state: int = 16
    multiple: int = 32  # what fits the budget is a multiple of this
    max_positions: int = 8192


@dataclass(frozen=True)
class Run:
    """Training of one model."""

    steps: int
    rows: int
    sequence_length: int
    peak: float  # learning rate; warmup and cosine, as in the paper's appendix A.3
    micro_rows: int | None = None

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.sequence_length


@dataclass(frozen=True)
class Size:
    name: str
    about: str
    shape: Shape
    language: Run
    vocab_size: int
    held_out_tokens: int
    recall_shape: Shape
    recall: Run
    test_rows: int  # of each point of the recall grid
    contexts: tuple[int, ...]  # text tokens behind which decoding is timed
    batches: tuple[int, ...]
    sources: tuple[str, ...] = ("python",)
    seeds: tuple[int, ...] = (0, 1, 2)
    decides: bool = True  # a smoke test's figures are no findings


_TOY = Shape(32, 6, 2, 1, 64, window=8, meta_tokens=4, ssm_state=4, multiple=4, max_positions=512)
_SMALL = Shape(128, 7, 4, 2, 288, window=64, meta_tokens=16, ssm_state=8, multiple=8)
# Recall needs few parameters and many runs: 8 layers, 3 of which see everything, as in the paper a
# quarter of the layers; rows of 256 against a window of 32.
_RECALL = Shape(128, 8, 4, 2, 320, window=32, meta_tokens=16, multiple=16, max_positions=2048)
_RECALL_SMALL = Shape(64, 6, 2, 1, 160, window=8, meta_tokens=4, multiple=8, max_positions=512)

_20M = Size(
    "20m",
    "19 M parameters, 200 M tokens each, rows of 1k, window 256 as the paper's 300M runs",
    Shape(256, 12, 4, 2, 896, window=256, meta_tokens=128),
    Run(steps=3052, rows=64, sequence_length=1024, peak=2e-3),
    vocab_size=16384,
    held_out_tokens=2_000_000,
    recall_shape=_RECALL,
    recall=Run(steps=2000, rows=64, sequence_length=256, peak=1e-3),
    test_rows=256,
    contexts=(1024, 8000),
    batches=(1, 128),
)

SIZES = {
    size.name: size
    for size in (
        Size(
            "toy",
            "models of 0.1 M parameters that are hardly trained, minutes on a CPU",
            _TOY,
            Run(steps=12, rows=2, sequence_length=64, peak=3e-3),
            vocab_size=512,
            held_out_tokens=2048,
            recall_shape=_TOY,
            recall=Run(steps=8, rows=2, sequence_length=64, peak=3e-3),
            test_rows=4,
            contexts=(256,),
            batches=(1,),
            sources=("python-library",),
            seeds=(0,),
            decides=False,
        ),
        Size(
            "small",
            "2.3 M parameters, 2 M tokens each: what a CPU can do in hours",
            _SMALL,
            Run(steps=2000, rows=4, sequence_length=256, peak=3e-3),
            vocab_size=4096,
            held_out_tokens=131072,
            recall_shape=_RECALL_SMALL,
            recall=Run(steps=2000, rows=16, sequence_length=64, peak=2e-3),
            test_rows=128,
            contexts=(1024,),
            batches=(1, 4),
        ),
        replace(
            _20M,
            name="2m",
            about="2.3 M parameters, 200 M tokens each, else as 20m: small enough to be kept",
            shape=Shape(128, 7, 4, 2, 264, window=256, meta_tokens=128, multiple=8),
            language=replace(_20M.language, peak=3e-3),
            vocab_size=4096,
        ),
        _20M,
        replace(
            _20M,
            name="35m",
            about="37 M parameters, 200 M tokens each, else as 20m",
            shape=Shape(384, 12, 6, 2, 1152, window=256, meta_tokens=128),
            language=replace(_20M.language, peak=1.5e-3),
        ),
    )
}


def size_named(name: str) -> Size:
    """LabError with the nearest name where there is none."""
    return named("size", name, SIZES)


def named(kind: str, name: str, among: dict[str, Any]) -> Any:
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name, among, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(among)}"
    raise LabError(f"there is no {kind} {name!r}; {hint}")
