#!/usr/bin/env python3
"""How fast `hymba eval` scores, and how little the scores depend on the batch.

    python bench/eval.py MODEL [--out results/eval-<machine>.json]

Three local tasks (examples/local_tasks.py): multiple choice, whole texts, answers. Each at batch 1,
7 and auto, and by lm-eval's own class at 1 and 8. Samples a second are of the model's work alone
(requests made before, answers judged after); best of the repetitions, the ways taking turns. The
scores of each way are compared with those of auto before any speed is printed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.local_tasks import write_tasks
from hymba.commands import choose_threads
from hymba.eval.harness import OurLM, Shelf, evaluate, peer_lm, quiet
from hymba.eval.results import write_result
from hymba.weights import load

TASKS = ("next_line", "python_text", "recall_value")


class Way(NamedTuple):
    """How a model is asked."""

    name: str
    open: Callable[[], Any]


class Ran(NamedTuple):
    answers: list[Any]
    per_second: float
    score: float


class Clock:
    """Stands in front of a model and notes what its own work takes."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.seconds, self.asked = lm, 0.0, 0
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, self._timed(getattr(lm, name)))

    def _timed(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(requests: Sequence[Any]) -> Any:
            began = time.perf_counter()
            with quiet():
                found = verb(requests, disable_tqdm=True)
            self.seconds += time.perf_counter() - began
            self.asked = len({(request.task_name, request.doc_id) for request in requests})
            return found

        return run


def ways(folder: Path) -> list[Way]:
    model = load(folder, dtype=torch.float32)

    def ours(batch: int | None) -> Way:
        lm = partial(OurLM, model, folder, batch=batch, progress=False)
        return Way(f"batch {batch or 'auto'}", lm)

    def theirs(batch: int) -> Way:
        return Way(f"HFLM {batch}", partial(peer_lm, folder, "cpu", "float32", batch))

    return [ours(1), ours(7), ours(None), theirs(1), theirs(8)]


def measure(way: Way, shelf: Shelf, task: str) -> Ran:
    clock = Clock(way.open())
    found = evaluate(clock.lm, shelf, task)
    assert found is not None
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics = found["results"][task]
    score = next(metrics[name] for name in metrics if name.split(",")[0] in SCORES)
    answers = [sample["resps"] for sample in samples]
    return Ran(answers, clock.asked / clock.seconds, score)


SCORES = ("acc", "bits_per_byte", "contains")


def apart_by(some: Any, other: Any) -> float:
    """The largest difference of two nests of numbers, as a share of those over 1: a whole text's
    log-likelihood is some thousands. Texts are equal (0) or not (infinity)."""
    if isinstance(some, list | tuple):
        assert len(some) == len(other)
        return max((apart_by(x, y) for x, y in zip(some, other, strict=True)), default=0.0)
    if isinstance(some, str):
        return 0.0 if some == other else float("inf")
    return abs(float(some) - float(other)) / max(1.0, abs(float(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=42, help="questions of a task")
    parser.add_argument("--lines", type=int, default=12, help="lines in front of a question")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    choose_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), args.count, lines=args.lines)
        rows = table(args, Shelf.of(TASKS, Path(folder)))
    head = f"{'task':<14}{'way':<12}{'samples/s':>10}{'score':>9}{'apart from auto':>20}"
    print(head, *(line(row) for row in rows), sep="\n")
    if args.out is not None:
        config = {"count": args.count, "lines": args.lines, "repeats": args.repeats}
        config |= {"threads": torch.get_num_threads(), "machine": platform.processor()}
        write_result(args.out, {"rows": rows}, config, kind="bench-eval")


def table(args: argparse.Namespace, shelf: Shelf) -> list[dict[str, Any]]:
    rows = []
    every = ways(args.model)
    for task in TASKS:
        best: dict[str, Ran] = {}
        for _ in range(args.repeats):
            for way in every:
                ran = measure(way, shelf, task)
                before = best.get(way.name)
                if before is None or ran.per_second > before.per_second:
                    best[way.name] = ran
        auto = best["batch auto"]
        for name, ran in best.items():
            apart = apart_by(ran.answers, auto.answers)
            row = {"task": task, "way": name, "samples_per_second": ran.per_second}
            rows.append(row | {"score": ran.score, "apart_from_auto": apart})
    return rows


def line(row: dict[str, Any]) -> str:
    apart = row["apart_from_auto"]
    speed, score = f"{row['samples_per_second']:>10.2f}", f"{row['score']:>9.4f}"
    return f"{row['task']:<14}{row['way']:<12}{speed}{score}{apart:>20.1e}"


if __name__ == "__main__":
    main()
