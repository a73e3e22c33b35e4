"""The parts of a run: rows of one length, and perhaps longer ones with another rotary base at the
end (`Extension`). Most runs have one part.

A stage's rows begin anew, in another order, so that any step's rows follow from its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from hymba.config import Config
from hymba.train.config import TrainConfig, TrainError
from hymba.train.rows import HeldOut, Loader, Packer, Rows
from hymba.train.store import TokenStore

Rowmaker = Rows | Callable[[int, int], Rows]  # the second: (sequence_length, seed) -> rows


@dataclass
class Stage:
    """Steps from number `start` on (0 is the first)."""

    start: int
    rows: int
    """Per step, of all processes."""
    micro_rows: int | None
    """Per forward and backward of one process."""
    model: Config
    loader: Loader
    held_out: HeldOut | None


def stages(
    config: TrainConfig,
    model: Config,
    train: TokenStore | Rowmaker,
    held_out: TokenStore | None,
    processes: int = 1,
) -> list[Stage]:
    """The stages of a run, first to last. TrainError where rows cannot be shared by `processes`."""

    def stage(start: int, length: int, seed: int, model: Config) -> Stage:
        rows = config.tokens // length
        if rows % processes:
            raise TrainError(
                f"{rows} rows of {length} tokens cannot be shared evenly by {processes} processes:"
                f" make rows a multiple"
            )
        micro = config.micro_rows and max(1, config.micro_rows * config.sequence_length // length)
        together = min(micro or rows // processes, rows // processes)
        return Stage(
            start,
            rows,
            micro,
            model,
            Loader(_rows(train, length, seed)),
            HeldOut(held_out, length, together, config.held_out_tokens) if held_out else None,
        )

    longer = config.extension
    if not longer.share:
        return [stage(0, config.sequence_length, config.seed, model)]
    before = dataclasses.replace(model, rope_type="default")
    after = dataclasses.replace(
        model,
        rope_type="ntk",
        original_max_positions=config.sequence_length,
        max_positions=longer.sequence_length,
    )
    turn = config.steps - max(1, round(longer.share * config.steps))
    return [
        stage(0, config.sequence_length, config.seed, before),
        stage(turn, longer.sequence_length, config.seed + 1, after),
    ]


def _rows(train: TokenStore | Rowmaker, length: int, seed: int) -> Rows:
    if isinstance(train, TokenStore):
        return Packer(train, length, seed)
    rows = train(length, seed) if callable(train) else train
    if rows.sequence_length != length:
        raise TrainError(f"rows of {rows.sequence_length} tokens were given, the run has {length}")
    return rows
