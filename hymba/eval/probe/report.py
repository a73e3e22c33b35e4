"""The report: one page that needs nothing else, the figures, and every number as JSON.

    out/index.html     the page; opens from the disk, asks nobody for anything
    out/probe.json     every number of it, and how it was made
    out/maps.json      the attention maps' weights
    out/NAME.svg       each figure

The files are whole before any of them takes its place in `out`: an interruption leaves what was.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from hymba.errors import UserError
from hymba.eval.probe.against import cell, note, pairs
from hymba.eval.probe.figures import EVERY, Figure, figures, left_out
from hymba.eval.probe.findings import Finding, findings

Record = dict[str, Any]
PAGE = Path(__file__).parent / "page"
UNFINISHED = (
    ".unfinished-"  # a folder that is filled first; one left by a killed process is nothing
)
MADE = "probe.json"  # says that a folder is a report, which may be written anew
VERDICTS = {True: "agrees", False: "does not agree", None: "cannot say"}
FINE = 255  # steps of a weight's square root in the page's maps


def check_folder(out: Path) -> None:
    """Before the work: UserError where a report cannot go."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name another --out")
    held = [path.name for path in out.iterdir()] if out.is_dir() else []
    if MADE not in held and not all(name.startswith(UNFINISHED) for name in held):
        raise UserError(f"{out} holds something that is no report: name another --out")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file: name another --out")
    try:
        tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=above).cleanup()
    except OSError as error:
        raise UserError(f"{above} cannot be written to: {error.strerror}") from None


def write(out: Path, result: Record, maps: Record) -> list[str]:
    """-> names of the files."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out))
    try:
        drawn = list(figures(result))
        found = [finding._asdict() for finding in findings(result)]
        result = {**result, "paper": found, "left_out": left_out(result)}
        if "against" in result:
            result["pairs"] = [pair._asdict() for pair in pairs(result)]
        texts = {
            "index.html": page(result, maps, drawn),
            MADE: json.dumps(result, indent=1) + "\n",
            "maps.json": json.dumps(plain(maps)) + "\n",
            **{f"{figure.name}.svg": figure.svg + "\n" for figure in drawn},
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name in EVERY:  # another model may have had figures that this one lacks
            if f"{name}.svg" not in texts:
                (out / f"{name}.svg").unlink(missing_ok=True)
        for name in texts:
            os.replace(temporary / name, out / name)
        return list(texts)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new and not any(out.iterdir()):
            out.rmdir()


def page(result: Record, maps: Record, drawn: Sequence[Figure]) -> str:
    """The whole page as HTML. Its script is allowed by its hash, and nothing else is."""
    script = (PAGE / "probe.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    pieces = {
        "hash": allowed,
        "title": escape(f"hymba probe: {result['model']}"),
        "style": (PAGE / "probe.css").read_text(encoding="utf-8"),
        "script": script,
        "facts": _facts(result),
        "findings": _findings([Finding(**finding) for finding in result["paper"]]),
        "against": _against(result) if "against" in result else "",
        "figures": "\n".join(map(_figure, drawn)),
        "left": "".join(f"<li>{escape(said)}</li>" for said in result["left_out"]),
        # "<" could end the script element early, whatever a text says.
        "data": json.dumps(packed(maps, result)).replace("<", "\\u003c"),
    }
    parts = template.split("{{")
    made = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition("}}")
        made += [pieces[name], rest]
    return "".join(made)


def _facts(result: Record) -> str:
    rows = [
        ("Model", result["model"]),
        ("Parameters", f"{result['parameters']:,}"),
        ("Layers", str(len(result["magnitudes"]))),
        ("Meta tokens", str(result["meta_tokens"])),
        ("Made", f"{result['date']}, hymba {result['versions']['hymba']}, {result['device']}"),
        ("Command", result["command"]),
    ]
    for text in result["texts"]:
        rows.append((f"Text: {text['name']}", f"{text['tokens']} tokens{text['note']}"))
    rows.append(("Loss", f"{result['importance']['loss']:.3f} nats a token over these texts"))
    rows.append(("SSM channels looked at", result["channels"]))
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in rows)


def _findings(found: Sequence[Finding]) -> str:
    rows = [
        f"<tr><td>{escape(one.statement)}</td><td>{escape(one.here)}</td>"
        f'<td class="v{str(one.agrees).lower()}">{VERDICTS[one.agrees]}</td></tr>'
        for one in found
    ]
    return "".join(rows)


def _against(result: Record) -> str:
    names = "".join(
        f'<th scope="col">{escape(x["model"])}</th>' for x in (result, result["against"])
    )
    rows = "".join(
        f"<tr><td>{escape(pair.what)}</td><td>{cell(pair.here)}</td>"
        f"<td>{cell(pair.there)}</td></tr>"
        for pair in pairs(result)
    )
    said = f"<p>{escape(sentence)}</p>" if (sentence := note(result)) else ""
    return (
        '<section id="against"><h2>Beside a second model</h2><p>Both have read the same texts. They'
        " may differ in more than a statement is about. Each number is of all the model's layers; a"
        " verdict on entropy compares the layers where both have the branch.</p>"
        '<div class="scroll" tabindex="0" role="group" aria-label="Beside a second model: table">'
        f'<table><thead><tr><th scope="col">Mean over layers and texts</th>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{said}</section>"
    )


def _figure(figure: Figure) -> str:
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in figure.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>"
        for row in figure.rows
    )
    return (
        f'<section id="{figure.name}"><h2>{escape(figure.title)}</h2>'
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="'
        f'{escape(figure.title)}: figure">{figure.svg}</div>'
        f"<figcaption>{escape(figure.says)}</figcaption></figure>"
        f"<details><summary>Numbers: {escape(figure.title)}</summary>"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(figure.title)}:'
        f' numbers"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details></section>"
    )


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def plain(maps: Record) -> Record:
    """Maps as lists of numbers, for JSON."""

    def numbers(x: Any) -> Any:
        if isinstance(x, Tensor):
            meta = x.shape[1] - x.shape[0]
            rows = enumerate(x.tolist())
            return [[round(value, 4) for value in row[: meta + i + 1]] for i, row in rows]
        if isinstance(x, dict):
            return {key: numbers(value) for key, value in x.items()}
        return [numbers(value) for value in x] if isinstance(x, list) else x

    about = "a row a token, up to itself: weights of the meta tokens, then of the text's tokens"
    return {**numbers(maps), "rows": about}


def packed(maps: Record, result: Record) -> Record:
    """Maps for the page: a byte a weight, its square root in steps of 1/255, in base64."""
    texts = []
    for name, text in maps["texts"].items():
        branches = {
            branch: [None if layer is None else list(_pictures(layer)) for layer in text[branch]]
            for branch in ("attention", "ssm")
            if branch in text
        }
        texts.append({"name": name, "tokens": text["tokens"], "branches": branches})
    windows = result["windows"]
    return {"meta": result["meta_tokens"], "texts": texts, "windows": windows}


def _pictures(layer: Record) -> Iterator[str]:
    """The mean of the heads, then each, as far as they are there."""
    for weights in (layer["mean"], *(layer["heads"] or ())):
        fine = (weights.clamp(0, 1).sqrt() * FINE).round().byte()
        yield base64.b64encode(fine.contiguous().numpy().tobytes()).decode()
