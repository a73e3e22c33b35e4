"""One figure a size: bits per byte by position, and accuracy along each task's axis."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hymba.lab.jobs import TASKS

Record = dict[str, Any]
# The axis of each task, and what else must hold for a point to be on it ("most": the largest).
AXES = {"mqar": "pairs", "phonebook": "entries", "needle": "length", "copy": "length",
        "induction": "length"}  # fmt: skip
SHOWN = ("hymba", "llama", "mamba", "mamba-mlp", "samba")


def draw(data: Record, path: Path) -> Path | None:
    """None without matplotlib, which nothing else here needs."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: pip install matplotlib")
        return None
    figure, places = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    rows = [row for row in data["rows"] if row["variant"] in SHOWN]
    for row in rows:
        if "language" in row:
            _positions(places[0, 0], row)
    places[0, 0].set(title="held-out text", xlabel="position", ylabel="bits per byte")
    places[0, 0].set_xscale("log", base=2)
    for axes, task in zip(places.flat[1:], TASKS, strict=True):
        for row in rows:
            if task in row["recall"]:
                _accuracy(axes, row, task)
        axes.set(title=task, xlabel=AXES[task], ylabel="token accuracy", ylim=(-0.03, 1.03))
        axes.set_xscale("log", base=2)
    handles, labels = places[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SHOWN))
    note = "" if data["decides"] else ": machinery smoke test, decides nothing"
    figure.suptitle(f"{data['size']}{note}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70, metadata={"Software": None})
    plt.close(figure)
    return path


def _positions(axes: Any, row: Record) -> None:
    part = row["language"]
    bits = part["by_position_longer"]
    pairs = [(edge, b) for edge, b in zip(part["edges"][1:], bits, strict=True) if b is not None]
    axes.plot(*zip(*pairs, strict=True), marker=".", label=row["variant"])


def _accuracy(axes: Any, row: Record, task: str) -> None:
    """Mean over seeds, and a band from the worst to the best of them."""
    lines = series(row["recall"][task]["points"], AXES[task])
    places = sorted(lines)
    middle = [statistics.fmean(lines[place]) for place in places]
    (line,) = axes.plot(places, middle, marker=".", label=row["variant"])
    low, high = ([pick(lines[place]) for place in places] for pick in (min, max))
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15)


def series(points: list[Record], axis: str) -> dict[float, list[float]]:
    """{place on the axis: accuracy of each seed}, over the points that differ in nothing else but
    a needle's depth, whose mean is taken. Pairs are compared at one length, without a gap."""
    chosen = [p for p in points if axis in p["at"] and "gap" not in p["at"]]
    for other in ("length", "items"):
        held = [p["at"][other] for p in chosen if other in p["at"]]
        if other != axis and held and axis != "entries":
            most = statistics.mode(held)
            chosen = [p for p in chosen if p["at"].get(other) == most]
    found: dict[float, list[list[float]]] = {}
    for point in chosen:
        found.setdefault(point["at"][axis], []).append(point["token"])
    return {
        place: [statistics.fmean(seed) for seed in zip(*several, strict=True)]
        for place, several in found.items()
    }
