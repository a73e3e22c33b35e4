"""lm-eval's results as a few figures, and as tables to be read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hymba.eval.suites import Entry, Suite, mean


def summary(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of one task or group: metrics ("acc,none": 0.5), their errors, shots, how many questions."""
    own = result.get("groups", {}).get(name) or result["results"].get(name)
    every = {key: _metrics(found) for key, found in result["results"].items()}
    counts = result.get("n-samples", {})
    asked = {key: int(count["effective"]) for key, count in counts.items()}
    shots = sorted({int(n) for n in result.get("n-shot", {}).values() if n is not None})
    return {
        "metrics": _metrics(own) if own else _only(every),
        "parts": every if len(every) > 1 else {},
        "questions": sum(asked.values()),
        "shots": shots[0] if len(shots) == 1 else shots,
        "cut": result.get("cut", 0),
        "higher_is_better": next(iter(result.get("higher_is_better", {}).values()), {}),
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(x) for key, x in found.items() if isinstance(x, int | float) and "," in key}


def _only(every: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Of a tag, which is many tasks and has no figure of its own: nothing but a single one's."""
    return next(iter(every.values())) if len(every) == 1 else {}


def figure(entry: Entry, found: Mapping[str, Any]) -> float | None:
    """The figure of a column, in percent where the paper has it so."""
    metric = entry.metric if "," in entry.metric else f"{entry.metric},none"
    value = found["metrics"].get(metric)
    return None if value is None else float(value) * (100 if entry.percent else 1)


def plain(tasks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """task, metric, value, error: a line for each metric of each task and each part of it."""
    lines = [("task", "metric", "value", "+-", "shots", "questions")]
    for key, found in tasks:
        many = found["parts"] or {key: found["metrics"]}
        for part, metrics in many.items():
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{kind}")
                shown = metric if kind == "none" else f"{metric} ({kind})"
                count = found["questions"] if part == key or len(many) == 1 else ""
                extra = "" if error is None else f"{error:.4f}"
                shown_value = f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
                lines.append((part, shown, shown_value, extra, f"{found['shots']}", f"{count}"))
    return _aligned(lines, left=2)


def beside_the_paper(
    model: str,
    suite: Suite,
    figures: Mapping[Entry, float | None],
    limit: int | None = None,
    local: bool = False,
) -> str:
    """Our figures as a row above the paper's; `local`: some tasks may be others of that name."""
    labels = [entry.label for entry in suite.tasks]
    ours = tuple(figures.get(entry) for entry in suite.tasks)
    rows = [("", *labels, "Avg"), _row(model, ours, suite.averaged)]
    rows += [_row(f"paper: {name}", row, suite.averaged) for name, row in suite.paper.items()]
    notes = _notes(suite)
    if suite.left_out:
        notes.append(suite.left_out)
    if any(entry.lower for entry in suite.tasks):
        notes.append("ppl: less is better; Avg is of the last eight columns")
    if limit is not None:
        notes.append(f"only {limit} questions a task (--limit): not to be compared with the paper")
    if local:
        notes.append("tasks of --include-path go before lm-eval's: the paper's are maybe others")
    return "\n".join([suite.about, "", _aligned(rows, left=1), *(f"  {note}" for note in notes)])


def _notes(suite: Suite) -> list[str]:
    """Each remark once, with the columns that it is of."""
    labels: dict[str, list[str]] = {}
    for entry in suite.tasks:
        if entry.note:
            labels.setdefault(entry.note, []).append(entry.label)
    return [f"{', '.join(some)}: {note}" for note, some in labels.items()]


def suite_json(name: str, suite: Suite, figures: Mapping[Entry, float | None]) -> dict[str, Any]:
    labels = [entry.label for entry in suite.tasks]
    ours = tuple(figures.get(entry) for entry in suite.tasks)
    paper = {row: dict(zip(labels, values, strict=True)) for row, values in suite.paper.items()}
    found = {"ours": dict(zip(labels, ours, strict=True)), "average": mean(ours, suite.averaged)}
    return {"name": name, **found, "paper": paper, "left_out": suite.left_out}


def _row(name: str, figures: tuple[float | None, ...], averaged: int) -> tuple[str, ...]:
    shown = [*figures, mean(figures, averaged)]
    return (name, *("-" if figure is None else f"{figure:.2f}" for figure in shown))


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns side by side; the first `left` of them flush left, the rest right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
