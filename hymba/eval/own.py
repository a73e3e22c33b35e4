"""The suites that need no download, recall and perplexity, as `hymba eval` runs them.

    folder = check(plan)                      # before the work: all that can be known
    result, finished = measure(plan, folder)  # kept in --out part by part, where there are parts
    tell(plan, result, finished)              # a table, --out, --plot

The parts of recall are a task at a length each; perplexity is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hymba.errors import UserError
from hymba.eval import figures, perplexity, recall_suite
from hymba.eval.results import (
    Finished,
    check_folder_of,
    check_place,
    check_same,
    head,
    made_of,
    say,
    say_written,
    write_json,
)
from hymba.eval.subject import FILES, Subject, open_subject
from hymba.hub import find

Progress = Callable[[str, int, int | None], None]
# A file of perplexity is one measurement: another one would take its place.
DECIDES = ("weights", "through_transformers", "dtype", "lengths", "samples", "text")


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    model: str
    suite: str  # recall or perplexity
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 4
    text: tuple[str, ...] = ()
    batch: int = 8
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    through_transformers: bool = False
    out: Path | None = None
    plot: Path | None = None
    fresh: bool = False


def check(plan: Plan) -> Path:
    """The model's folder. UserError where a file could not be written, or would be lost."""
    if plan.out is not None:
        check_place(plan.out, plan.suite)
    if plan.plot is not None:
        if plan.plot.is_dir():
            raise UserError(f"{plan.plot} is a folder: --plot names a file, like recall.png")
        figures.check_ending(plan.plot)
        check_folder_of(plan.plot)
    folder = find(plan.model, FILES)
    if plan.out is not None and not plan.fresh:
        names = DECIDES if plan.suite == "perplexity" else DECIDES[:1]
        check_same(plan.out, _of(plan, folder), names)
    return folder


def measure(
    plan: Plan, folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Any], Finished]:
    through = "transformers" if plan.through_transformers else ""
    device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = open_subject(folder, device, plan.dtype, through, plan.quantize)
    subject.name = plan.model
    finished = Finished(
        plan.out if plan.suite == "recall" else None,
        head(asdict(plan), device, plan.suite),
        plan.fresh,
        _of(plan, folder),
    )
    if plan.suite == "recall":
        return _recall(plan, subject, finished, progress), finished
    length, rows = (*plan.lengths, 0)[0], 4 * plan.samples
    result = perplexity.run_perplexity(
        subject, length, rows, plan.text, progress=progress, batch=plan.batch
    )
    return result, finished


def _recall(
    plan: Plan, subject: Subject, finished: Finished, progress: Progress | None
) -> dict[str, Any]:
    try:
        return recall_suite.run_suite(
            subject,
            plan.names,
            plan.lengths,
            samples=plan.samples,
            progress=progress,
            batch=plan.batch,
            finished=finished,
        )
    except KeyboardInterrupt:
        if plan.out is not None and finished.tasks:
            done = ", ".join(finished.tasks)
            say(f"stopped: {done} are in {plan.out}, the same command goes on from there")
        raise


def tell(plan: Plan, result: dict[str, Any], finished: Finished) -> None:
    if finished.taken:
        say(
            f"{len(finished.taken)} of {len(finished.tasks)} parts were done already, taken from"
            f" {plan.out} (--fresh would do them again)"
        )
    if finished.replaced:
        names = ", ".join(finished.replaced)
        say(f"{names}: {plan.out} had them with other settings, they were done again")
    print((recall_suite if plan.suite == "recall" else perplexity).table(result))
    if plan.out is not None:
        if plan.suite == "recall":
            finished.write({"result": result})
            say_written(finished)
        else:
            write_json(plan.out, {**finished.head, "of": finished.of, "result": result})
            say(f"written to {plan.out}")
    if plan.plot is not None:
        if plan.suite == "recall":
            figures.draw_recall(result, plan.plot)
        else:
            figures.draw_perplexity([result], plan.plot)


def _of(plan: Plan, folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": plan.dtype, "samples": plan.samples}
    if plan.suite == "perplexity":
        settings |= {"lengths": plan.lengths, "text": plan.text}
    return made_of(plan.model, folder, plan.through_transformers, plan.quantize, **settings)
