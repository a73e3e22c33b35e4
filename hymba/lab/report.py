"""From runs to what is published: results/lab-SIZE-DEVICE.json, figures, the tables of docs/lab.md.

    gather     one size's runs of one device as plain data; that is what is kept with the code
    publish    writes them, and everything that follows from all that are kept

Nobody types a figure: tests/lab/test_report.py keeps the document and results/ equal. The reasons
beside the verdicts are written by hand, in results/lab-reasons.json: {size: {finding: reason}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba.lab.jobs import TASKS, results
from hymba.lab.sizes import SIZES, LabError, Size
from hymba.lab.tables import document
from hymba.lab.variants import VARIANTS

Record = dict[str, Any]
BEGIN, END = "<!-- from results/, by hymba lab --report -->", "<!-- end of hymba lab --report -->"
REASONS = "lab-reasons.json"
FACTS = ("device", "threads", "precision", "hymba", "torch", "python")


def publish(folder: Path, size: Size, kept: Path, page: Path) -> None:
    """Gather a size's runs into `kept`, draw them, and write the page's tables if it exists."""
    from hymba.lab.figures import draw

    runs = list(results(folder, size.name))
    if not runs:
        raise LabError(f"{folder} holds no finished run of size {size.name}: run hymba lab first")
    for device in dict.fromkeys(run["device"] for run in runs):
        found = gather(size, [run for run in runs if run["device"] == device])
        path = kept / f"lab-{size.name}-{slug(device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_text(found), encoding="utf-8")
        print(f"{path}: {len(found['rows'])} variants")
        if drawn := draw(found, path.with_suffix(".png")):
            print(drawn)
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        page.write_text(placed(text, generate(kept), page), encoding="utf-8")
        print(f"{page}: tables written")


def as_text(found: Record) -> str:
    """JSON with a line for each variant."""
    head = json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {rows}\n ]\n}}\n'


def slug(device: str) -> str:
    """How a device is named in a file name: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def gather(size: Size, runs: Sequence[Record]) -> Record:
    """All runs of one size and device; of figures that several seeds have, a list."""
    first, last = runs[0], max(run["date"] for run in runs)
    rows = [row for name in VARIANTS if (row := _row(name, _of(runs, variant=name)))]
    corpora = [run["corpus"] for run in _of(runs, part="language")]
    return {
        "benchmark": "lab",
        "size": size.name,
        "about": size.about,
        "decides": size.decides,
        "command": f"hymba lab --size {size.name}",
        **{key: first[key] for key in FACTS},
        "date": last,
        "seconds": round(sum(run.get("seconds", 0.0) for run in runs)),
        "tokens": {part: _first(_of(runs, part=part), "tokens") for part in ("language", "recall")},
        "corpus": corpora[0] if corpora else None,
        "rows": rows,
    }


def _of(runs: Sequence[Record], **keys: str) -> list[Record]:
    found = [run for run in runs if all(run[key] == value for key, value in keys.items())]
    return sorted(found, key=lambda run: run["seed"])


def _first(runs: Sequence[Record], key: str) -> Any:
    return runs[0][key] if runs else None


def _row(name: str, runs: list[Record]) -> Record | None:
    if not runs:
        return None
    variant = VARIANTS[name]
    row: Record = {"variant": name, "group": variant.group}
    for part in ("cost", "language"):
        if some := _of(runs, part=part):
            row[part] = _cost(some[0]) if part == "cost" else _language(some)
    tasks = {task: _of(runs, part="recall", task=task) for task in TASKS}
    row["recall"] = {task: _recall(some) for task, some in tasks.items() if some}
    return row


def _cost(run: Record) -> Record:
    keys = ("parameters", "paper_cache_bytes", "training", "decoding")
    return {key: _rounded(run[key]) for key in keys}


def _language(runs: list[Record]) -> Record:
    """Bits by position are the mean over seeds."""
    return _rounded(
        {
            "parameters": runs[0]["parameters"],
            "seeds": [run["seed"] for run in runs],
            "bits_per_byte": [run["bits_per_byte"] for run in runs],
            "longer": [run["longer"]["bits_per_byte"] for run in runs],
            "tokens_per_s": [run["tokens_per_s"] for run in runs],
            "edges": runs[0]["longer"]["edges"],
            "by_position": _columns([run["held_out"]["bits_by_position"] for run in runs]),
            "by_position_longer": _columns([run["longer"]["bits_by_position"] for run in runs]),
            "curve": runs[0]["curve"],
        }
    )


def _columns(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [mean([x for x in column if x is not None]) for column in zip(*rows, strict=True)]


def _recall(runs: list[Record]) -> Record:
    points = [run["points"] for run in runs]
    return _rounded(
        {
            "parameters": runs[0]["parameters"]["total"],
            "seeds": [run["seed"] for run in runs],
            "recall": [run["recall"] for run in runs],
            "beyond": [run["beyond"] for run in runs],
            "points": [
                {key: same[0][key] for key in ("at", "beyond", "chance")}
                | {key: [p[f"{key}_accuracy"] for p in same] for key in ("token", "answer")}
                for same in zip(*points, strict=True)
            ],
        }
    )


def _rounded(value: Any) -> Any:
    """Five digits say all that such figures mean."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---- the page


def kept_results(kept: Path) -> Iterator[Record]:
    """Those in the folder, larger sizes first."""
    found = []
    for path in sorted(kept.glob("lab-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("benchmark") == "lab":
            drawn = path.with_suffix(".png")
            found.append(data | {"file": path.name, "figure": drawn.name if drawn.exists() else ""})
    order = list(SIZES)
    yield from sorted(found, key=lambda data: -order.index(data["size"]))


def reasons(kept: Path) -> Mapping[str, Mapping[str, str]]:
    path = kept / REASONS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def generate(kept: Path) -> str:
    """Everything between the markers."""
    return document(list(kept_results(kept)), reasons(kept))


def placed(text: str, tables: str, page: Path) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise LabError(f"{page} needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"
