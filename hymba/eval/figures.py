"""Figures of the recall suite and of perplexity by position. With the extra "plot" alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hymba.errors import UserError


def draw_recall(result: dict[str, Any], path: Path, figure: str = "forced") -> Path:
    """A heat map of depth and length for each task that has depths, a line over lengths for each
    that has none. `figure`: "generated", "exact", "first" or "forced"."""
    plt = pyplot()
    tasks = result["tasks"]
    deep = [name for name, task in tasks.items() if task["cells"][0]["depth"] is not None]
    flat = [name for name in tasks if name not in deep]
    count = len(deep) + bool(flat)
    page, places = plt.subplots(1, count, figsize=(3.6 * count + 0.6, 3.4), layout="constrained")
    places = [places] if count == 1 else list(places)
    for axes, name in zip(places, deep, strict=False):
        grid = heat(tasks[name]["cells"], result["lengths"], result["depths"], figure)
        image = _map(axes, grid, result["lengths"], result["depths"])
        axes.set_title(name)
    if deep:
        page.colorbar(image, ax=places[: len(deep)], shrink=0.8, label=f"{figure}, percent")
        places[0].set_ylabel("depth (0: at the beginning)")
    if flat:
        _lines(places[-1], {name: tasks[name]["cells"] for name in flat}, figure)
    page.suptitle(f"recall of {Path(result['model']).name}, by tokens of the row")
    return _save(plt, page, path)


def heat(
    cells: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    depths: Sequence[float],
    figure: str,
) -> list[list[float | None]]:
    """[depth][length] of one figure."""
    found = {(cell["length"], cell["depth"]): cell[figure] for cell in cells}
    return [[found.get((length, depth)) for length in lengths] for depth in depths]


def _map(
    axes: Any, grid: list[list[float | None]], lengths: Sequence[int], depths: Sequence[float]
) -> Any:
    numbers = [[float("nan") if x is None else 100 * x for x in line] for line in grid]
    image = axes.imshow(numbers, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    for y, line in enumerate(numbers):
        for x, number in enumerate(line):
            shade = "black" if number > 60 else "white"
            if number == number:  # not NaN
                axes.text(x, y, f"{number:.0f}", ha="center", va="center", color=shade, fontsize=8)
    return image


def _lines(axes: Any, tasks: dict[str, Sequence[dict[str, Any]]], figure: str) -> None:
    for name, cells in tasks.items():
        pairs = [(c["length"], 100 * c[figure]) for c in cells if c[figure] is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), marker=".", label=name)
    lengths = sorted({cell["length"] for cells in tasks.values() for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
    axes.set(ylim=(-3, 103), xlabel="tokens", ylabel=f"{figure}, percent", title="without a depth")
    axes.legend()


def draw_perplexity(results: Sequence[dict[str, Any]], path: Path) -> Path:
    """Bits per byte over positions, a line for each result; dashed behind what a model was made
    for."""
    plt = pyplot()
    page, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for result in results:
        middles = [(max(a, 1) * b) ** 0.5 for a, b in pairwise(result["edges"])]
        bits = [part["bits_per_byte"] for part in result["by_position"]]
        (line,) = axes.plot(middles, bits, marker=".", label=Path(result["model"]).name)
        if result["made_for"] < result["length"]:
            axes.axvline(result["made_for"], color=line.get_color(), linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="position, in tokens", ylabel="bits per byte", title="held-out text")
    axes.legend()
    return _save(plt, page, path)


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install 'hymba[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_ending(path: Path) -> None:
    """Before the work: UserError where matplotlib would refuse the file afterwards."""
    kinds = pyplot().Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise UserError(
            f"{path}: matplotlib writes no {path.suffix} files, name it like recall.png"
            f" ({', '.join(sorted(kinds))})"
        )


def _save(plt: Any, page: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        page.savefig(path, dpi=90)
    except ValueError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    finally:
        plt.close(page)
    return path
