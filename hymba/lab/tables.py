"""The tables of docs/lab.md, from what is kept in results/."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hymba.lab.jobs import TASKS
from hymba.lab.variants import GROUPS, VARIANTS
from hymba.lab.verdict import FINDINGS, METRICS, Finding, judge

Record = dict[str, Any]
Reasons = Mapping[str, Mapping[str, str]]
SMOKE = "**Machinery smoke test: decides nothing.** "


def document(found: Sequence[Record], reasons: Reasons) -> str:
    """All sizes, largest first. A smoke test is shown only until something real has been run."""
    real = [data for data in found if data["decides"]]
    parts = [section(data, reasons.get(data["size"], {})) for data in real or found]
    if real:
        parts += [smoke_line(data) for data in found if not data["decides"]]
    return "\n\n".join(parts) if parts else "No results are kept here."


def section(data: Record, reasons: Mapping[str, str]) -> str:
    parts = [heading(data), variants_table(data)]
    if data["figure"]:
        parts.insert(1, f"![{data['size']}: text and recall](../results/{data['figure']})")
    if any(row["recall"] for row in data["rows"]):
        parts += ["Recall by task, lengths and numbers as trained:", tasks_table(data)]
    if any("language" in row for row in data["rows"]):
        parts += ["Held-out bits per byte by position in a piece of text:", positions_table(data)]
    return "\n\n".join([*parts, "What was found elsewhere:", findings_table(data, reasons)])


def heading(data: Record) -> str:
    device = f"{data['device']}, {data['precision']}, torch {data['torch']}, {data['date']}"
    lines = [f"### {data['size']}", "", "" if data["decides"] else SMOKE]
    about = data["about"]
    lines[-1] += f"{about[0].upper()}{about[1:]}. Measured on {device}"
    lines[-1] += f" ([results/{data['file']}](../results/{data['file']}))."
    corpus, tokens = data["corpus"], data["tokens"]
    if corpus:
        lines[-1] += (
            f" Language models read {tokens['language']:,} tokens of"
            f" {corpus['distinct_tokens']:,} different ones, {corpus['epochs']:.2f} times each"
            f" ({'; '.join(corpus['facts'])})."
        )
    if tokens["recall"]:
        lines[-1] += f" Recall models read {tokens['recall']:,} tokens of a task."
    lines[-1] += f" One row again: `{data['command']} --only NAME`; all: `{data['command']}`."
    return "\n".join(lines)


def smoke_line(data: Record) -> str:
    return (
        f"### {data['size']}\n\n{SMOKE}{len(data['rows'])} variants went through all parts on"
        f" {data['device']} ({data['date']}): `{data['command']}`"
        f" ([results/{data['file']}](../results/{data['file']}))."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def variants_table(data: Record) -> str:
    head = ["", "what", "M parameters (without embedding)", "bits per byte", "recall",
            "beyond training", "decode tok/s", "training tok/s", "cache MB"]  # fmt: skip
    rows, group = [], ""
    for row in data["rows"]:
        variant, figures = VARIANTS[row["variant"]], _figures(row)
        if not any(figures):  # one task of recall is in the next table
            continue
        if variant.group != group:
            group = variant.group
            rows.append([f"**{group}**", f"**{GROUPS[group]}**", *[""] * (len(head) - 2)])
        rows.append([variant.name, variant.about, *figures])
    return f"{table(head, rows)}\n\n{_note(data)}"


def _figures(row: Record) -> list[str]:
    cost, language = row.get("cost"), row.get("language")
    counts = (cost or language or {}).get("parameters")
    recall, beyond = (list(values(row, key)) for key in ("recall", "beyond"))
    return [
        f"{counts['total'] / 1e6:.2f} ({(counts['total'] - counts['embedding']) / 1e6:.2f})"
        if counts
        else "",
        spread(language["bits_per_byte"], ".4f") if language else "",
        spread(recall, ".3f"),
        spread(beyond, ".3f"),
        speed(longest(cost)["tokens_per_s"]) if cost else "",
        speed(cost["training"]["tokens_per_s"]) if cost else "",
        f"{longest(cost)['cache_bytes']['at_context'] / 1e6:.3g}" if cost else "",
    ]


def _note(data: Record) -> str:
    costs = [row["cost"] for row in data["rows"] if "cost" in row]
    note = "± is the standard deviation over seeds; recall is token accuracy, the mean over tasks."
    if not costs:
        return note
    at, training = longest(costs[0]), costs[0]["training"]
    return (
        f"{note} Decoding: {at['batch']} sequence{'s' * (at['batch'] > 1)} behind"
        f" {at['context']:,} tokens each, through the engine; cache: what one of them holds there;"
        f" training: {training['rows']} rows of {training['length']:,}, with the optimiser."
    )


def longest(cost: Record) -> Record:
    """Of the decoding figures those of the longest context and the largest batch."""
    found: Record = max(cost["decoding"], key=lambda row: (row["context"], row["batch"]))
    return found


def speed(values: Sequence[float]) -> str:
    """The geometric mean, as the verdict takes it; from where to where if that is far."""
    middle = f"{statistics.geometric_mean(values):,.0f}"
    far = max(values) > 1.1 * min(values)
    return f"{middle} ({min(values):,.0f} to {max(values):,.0f})" if far else middle


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle = format(statistics.fmean(values), form)
    return f"{middle} ± {statistics.stdev(values):{form}}" if len(values) > 1 else middle


def tasks_table(data: Record) -> str:
    rows = []
    for row in data["rows"]:
        cells = [row["recall"].get(task, {}).get("recall", []) for task in TASKS]
        if any(cells):
            rows.append([row["variant"], *(spread(cell, ".3f") for cell in cells)])
    chances = ["a guess from what the row holds", *(_chance(data, task) for task in TASKS)]
    return table(["", *TASKS], [*rows, chances])


def _chance(data: Record, task: str) -> str:
    for row in data["rows"]:
        if task in row["recall"]:
            points = [p["chance"] for p in row["recall"][task]["points"] if not p["beyond"]]
            return f"{statistics.fmean(points):.3f}"
    return ""


def positions_table(data: Record) -> str:
    """Up to training's length as trained, behind it from the longer pieces."""
    rows, edges = [], []
    for row in data["rows"]:
        if "language" in row:
            part = row["language"]
            edges, trained = part["edges"], len(part["by_position"])
            bits = [*part["by_position"], *part["by_position_longer"][trained:]]
            rows.append([row["variant"], *("" if b is None else f"{b:.3f}" for b in bits)])
    ranges = [f"{a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    return table(["", *ranges], rows)


# ---- findings


def values(row: Record, metric: str, tasks: Sequence[str] = TASKS) -> list[float]:
    """A row's figures of a metric, one for each seed (or timing); recall over these tasks."""
    cost, language = row.get("cost"), row.get("language")
    if metric in ("recall", "beyond"):
        return _over_tasks(row["recall"], metric, tasks)
    if metric == "bits_per_byte":
        return list(language["bits_per_byte"]) if language else []
    if cost is None:
        return []
    at = longest(cost)
    return [at["cache_bytes"]["at_context"]] if metric == "cache" else list(at["tokens_per_s"])


def _over_tasks(recall: Mapping[str, Record], metric: str, tasks: Sequence[str]) -> list[float]:
    """For each seed that all tasks have, the mean over them; none unless all were run."""
    parts = [recall[task] for task in tasks if task in recall]
    if not parts or len(parts) < len(tasks):
        return []
    seeds = set.intersection(*(set(part["seeds"]) for part in parts))
    return [
        statistics.fmean(part[metric][part["seeds"].index(seed)] for part in parts)
        for seed in sorted(seeds)
    ]


def findings_table(data: Record, reasons: Mapping[str, str]) -> str:
    head = ["finding", "metric", "there", "here", "difference (margin)", "verdict", "reason"]
    rows = (_finding(finding, data, reasons) for finding in FINDINGS)
    return table(head, [row for row in rows if row])


def _finding(finding: Finding, data: Record, reasons: Mapping[str, str]) -> list[str] | None:
    """Recall is compared over the tasks that both have."""
    both = [row for row in data["rows"] if row["variant"] in (finding.this, finding.than)]
    tasks = [task for task in TASKS if all(task in row["recall"] for row in both)]
    found = {row["variant"]: values(row, finding.metric, tasks) for row in data["rows"]}
    verdict = judge(finding, found, data["decides"])
    if verdict is None:
        return None
    metric = METRICS[finding.metric]
    mean = statistics.geometric_mean if metric.ratio else statistics.fmean
    this, than = (mean(found[name]) for name in (finding.this, finding.than))
    of = "" if finding.metric not in ("recall", "beyond") or len(tasks) == len(TASKS) else (
        f" ({', '.join(tasks)})"
    )  # fmt: skip
    default = "" if data["decides"] else "a smoke test"
    return [
        finding.name,
        metric.about,
        f"{finding.figures} ({finding.source})",
        f"{finding.this} {this:{metric.form}}, {finding.than} {than:{metric.form}}{of}",
        _difference(verdict.difference, verdict.margin, metric.ratio),
        verdict.word,
        reasons.get(finding.key, default),
    ]


def _difference(difference: float, margin: float | None, ratio: bool) -> str:
    """Positive is what was found elsewhere."""
    if ratio:
        said = f"×{math.exp(difference):.2f}"
        return said if margin is None else f"{said} (×{math.exp(margin):.2f})"
    return f"{difference:+.4f}" + ("" if margin is None else f" ({margin:.4f})")
