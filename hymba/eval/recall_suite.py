"""The recall suite: text tasks (text_tasks.py) at several lengths and depths, on any subject.

    result = run_suite(open_subject("folder"), lengths=(512, 1024), samples=8)
    print(table(result))                # figures.draw_recall(result, Path("recall.png")) too

Figures of each cell, from the coarse to the fine:

    generated    share of answers that a greedy continuation of the row contains
    exact        share of answers whose every token is the likeliest after the true ones before it
    first        share of answers whose first token is
    forced       share of answer tokens that are; small models begin to score here, and some of it
                 is spelling: the end of a word follows from its beginning, found or not

and "nats", the mean of answer tokens' negative log-probabilities.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hymba import __version__
from hymba.eval.hay import Hay
from hymba.eval.results import Finished, fingerprint
from hymba.eval.subject import Scored, Subject, rows_fit
from hymba.eval.text_tasks import TASKS, Ask, Sample, TaskError, TextTask, TooShort

Progress = Callable[[str, int, int | None], None]  # what, how much of it is done, of how much
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # as far as the subject's positions go
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SLACK = 8  # tokens that a continuation may say around its answer
END = ("\n",)
IN_A_ROW = 8  # lengths that must have room, for "or more": names differ from length to length
FIGURES = ("generated", "exact", "first", "forced", "nats")


@dataclass(frozen=True)
class _Cell:
    task: TextTask
    length: int
    depth: float | None
    samples: list[Sample]


@dataclass(frozen=True)
class _Rows:
    """What decides the rows of a task at a length."""

    subject: Subject
    hay: Hay
    depths: Sequence[float]
    samples: int
    seed: int

    def cells(self, task: TextTask, length: int) -> list[_Cell]:
        """Without a depth of its own a task has as many rows in its one cell as others in all."""
        places: Sequence[float | None] = self.depths if task.has_depth else (None,)
        count = self.samples if task.has_depth else self.samples * len(self.depths)
        found = []
        for depth in places:
            where = self.hay, self.subject.begin, length, depth, self.seed
            found.append(_Cell(task, length, depth, [task.sample(*where, i) for i in range(count)]))
        return found

    def mark(self, key: str, generate: bool, of: dict[str, Any]) -> str:
        """Equal where the result must be, with a subject that `of` tells from others."""
        settings = {name: value for name, value in of.items() if name != "command"}
        ours = self.hay.digest, list(self.depths), self.samples, self.seed
        return fingerprint(key, generate, settings, *ours, __version__)


def run_suite(
    subject: Subject,
    names: Sequence[str] = (),
    lengths: Sequence[int] = (),
    depths: Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    batch: int = 8,
    generate: bool = True,
    text: str | None = None,
    finished: Finished | None = None,
) -> dict[str, Any]:
    """Every task of `names` (all) at every length (doublings from 256 to what the subject was made
    for) and, where it has one, depth; `samples` rows of each.

    Beyond `subject.most_tokens` answers are forced but not generated. `text` is laid around the
    needles in place of the Python library's sources. A task at a length is taken from `finished`
    where it is there, and kept there. UserError where a length is too short."""
    chosen = [_task(name) for name in names or TASKS]
    lengths = tuple(lengths) or default_lengths(subject)
    _need(samples >= 1, f"samples is {samples}, but must be 1 or more")
    _need(bool(depths), "there are no depths: give some between 0 and 1")
    hay = Hay.of(subject, max(lengths), seed, text)
    rows = _Rows(subject, hay, depths, samples, seed)
    _check_room(rows, chosen, min(lengths))
    finished = finished or Finished(None, {})
    found: dict[str, Any] = {}
    for task in chosen:
        cells: list[dict[str, Any]] = []
        for length in lengths:
            also = generate and length <= subject.most_tokens
            some = _part(rows, task, length, batch, also, finished)
            cells += some
            if progress is not None:
                progress(task.name, len(cells), len(lengths) * len(some))
        found[task.name] = {"about": task.about, "chance": task.chance, **mean(cells)}
        found[task.name]["cells"] = cells
    return {
        "suite": "recall",
        "model": subject.name,
        "made_for": subject.most_tokens,
        "lengths": list(lengths),
        "depths": list(depths),
        "samples": samples,
        "seed": seed,
        "text_around": hay.digest,
        "tasks": found,
    }


def default_lengths(subject: Subject) -> tuple[int, ...]:
    return tuple(n for n in LENGTHS if n <= subject.most_tokens) or (subject.most_tokens,)


def _task(name: str) -> TextTask:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(TASKS)}"
        raise TaskError(f"there is no recall task {name!r}; {hint}")
    return TASKS[name]


def _need(good: bool, message: str) -> None:
    if not good:
        raise TaskError(message)


def _check_room(rows: _Rows, tasks: Sequence[TextTask], length: int) -> None:
    """Before the work, with a length that has room for all that is asked."""
    for task in tasks:
        try:
            rows.cells(task, length)
        except TooShort as error:
            raise TooShort(task.name, length, _least(rows, tasks, error.least)) from None


def _least(rows: _Rows, tasks: Sequence[TextTask], least: int) -> int:
    tried = 0
    while tried < IN_A_ROW:
        try:
            for task in tasks:
                rows.cells(task, least + tried)
            tried += 1
        except TooShort as error:
            least, tried = error.least, 0
    return least


def _part(
    rows: _Rows, task: TextTask, length: int, batch: int, generate: bool, finished: Finished
) -> list[dict[str, Any]]:
    """Cells of a task at a length, from the file where it has them."""
    key = f"{task.name}@{length}"
    mark = rows.mark(key, generate, finished.of)
    found = finished.look(key, mark)
    if found is not None:
        finished.take(key, found)
        return list(found["cells"])
    with rows_fit(length):
        cells = _measure(rows.subject, rows.cells(task, length), batch, generate)
    finished.add(key, {"fingerprint": mark, "cells": cells})
    return cells


def _measure(
    subject: Subject, cells: Sequence[_Cell], batch: int, generate: bool
) -> list[dict[str, Any]]:
    """Cells of one length together, so that batches are full."""
    rows = [sample for cell in cells for sample in cell.samples]
    firsts = [min(a for ask in sample.asks for a, _ in ask.spans) for sample in rows]
    tails = [len(sample.ids) - first for sample, first in zip(rows, firsts, strict=True)]
    scores = iter(subject.score([sample.ids for sample in rows], batch, tails))
    texts = iter(_said(subject, rows) if generate else [])
    found = []
    for cell in cells:
        answers = []
        for sample in cell.samples:
            scored = next(scores)
            for ask in sample.asks:
                said = next(texts) if generate else None
                first = len(sample.ids) - len(scored.ranks)
                answers.append(_forced(ask, scored, first) | {"generated": contained(ask, said)})
        found.append(_summary(cell, answers))
    return found


def _said(subject: Subject, rows: Sequence[Sample]) -> list[str]:
    asks = [(sample, ask) for sample in rows for ask in sample.asks]
    prompts = [sample.ids[: ask.at] for sample, ask in asks]
    most = SLACK + max(b - ask.at for _, ask in asks for _, b in ask.spans)
    return subject.generate(prompts, most, END)


def _forced(ask: Ask, scored: Scored, first: int) -> dict[str, float | None]:
    """`scored` begins with token `first` of the row."""
    parts = [slice(a - first, b - first) for a, b in ask.spans]
    right = [(scored.ranks[part] == 0).tolist() for part in parts]
    nats = [-nat for part in parts for nat in scored.logprobs[part].tolist()]
    return {
        "exact": fmean(all(part) for part in right),
        "first": fmean(part[0] for part in right),
        "forced": fmean(token for part in right for token in part),
        "nats": fmean(nats),
    }


def contained(ask: Ask, said: str | None) -> float | None:
    """Share of the answers that stand in a text as whole words."""
    if said is None:
        return None
    return fmean(bool(re.search(rf"(?<!\w){re.escape(x)}(?!\w)", said)) for x in ask.answers)


def _summary(cell: _Cell, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    depths = [sample.depth for sample in cell.samples if sample.depth is not None]
    return {
        "length": cell.length,
        "depth": cell.depth,
        "depth_found": fmean(depths) if depths else None,
        "rows": len(cell.samples),
        "answers": len(answers),
        "blind": fmean(sample.blind for sample in cell.samples),
        **mean(answers),
    }


def mean(parts: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Of every figure; None where it was not taken."""
    found: dict[str, float | None] = {}
    for figure in FIGURES:
        values = [part[figure] for part in parts if part[figure] is not None]
        found[figure] = fmean(values) if values else None
    return found


# ---- for people


def table(result: dict[str, Any]) -> str:
    """A line for each task and length: means over depths."""
    rows = [["task", "tokens", "generated", "exact", "first", "forced", "nats", "chance", "blind"]]
    for name, task in result["tasks"].items():
        for length in result["lengths"]:
            cells = [cell for cell in task["cells"] if cell["length"] == length]
            figures = mean(cells)
            shown = [_percent(figures[figure]) for figure in FIGURES[:4]]
            shown.append(f"{figures['nats']:.2f}")
            blind = fmean(cell["blind"] for cell in cells)
            rows.append([name, f"{length:,}", *shown, _percent(task["chance"]), _percent(blind)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{x:>{width}}" for x, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(
        [
            *lines,
            "",
            "generated: a greedy continuation contains the answer; exact: all its tokens are the",
            "likeliest after the true ones; first: its first token is; forced: share of its tokens",
            "that are (some of it is spelling); in percent. nats: of an answer's token. chance:",
            "a guess that knows the task alone; blind: one that has read all but the question.",
        ]
    )


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if share >= 0.0005 or share == 0 else "<0.1"
