"""`hymba quantize MODEL FOLDER`: a model folder whose matrices are kept in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.errors import UserError
from hymba.files import check_place, filled, is_empty
from hymba.schemes import SCHEMES, scheme_named

if TYPE_CHECKING:
    from hymba.model.decoder import LanguageModel

EXAMPLES = (
    "nvidia/Hymba-1.5B-Base runs/hymba-int4",
    "runs/demo/hymba runs/demo/hymba-int8 --scheme int8",
    "runs/demo/hymba runs/demo/hymba-int4 --text python",
)


@dataclass(frozen=True)
class Options:
    """Round a model's matrices to 4 or 8 bits, with a scale for each 32 or 64 numbers, and write
    them as a model folder that other commands take. Norms, convolutions and the states' rates
    stay as they are. docs/quantisation.md says what it costs."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id, with the weights as they were trained."""
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the quantised model goes; it must be new or empty."""
    scheme: str = "int4"
    """int8, int4, or fp8: floats of 8 bits (e4m3), slow on a CPU."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")] = ()
    """Choose the roundings with this text in front of the model (GPTQ): files, folders or names, as
    `hymba train` takes them. Without it each number goes to the nearest code."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "quantize", EXAMPLES)
    scheme = scheme_named(options.scheme)
    if options.folder.exists() and not (options.folder.is_dir() and is_empty(options.folder)):
        raise UserError(f"{options.folder} exists: name a new folder")
    choose_threads(options.threads)
    from hymba.weights import load, save

    check_place(options.folder)
    with bar() as progress:
        if options.text:
            model = _calibrated(options, scheme.name, progress)
        else:
            model = load(options.model, quantize=scheme.name, progress=progress)
    with filled(options.folder) as unfinished:
        save(model, unfinished)
    print(_told(model, options.folder))
    return 0


def _calibrated(options: Options, scheme: str, progress: Any) -> LanguageModel:
    from hymba.hub import find
    from hymba.quant import calibrate, text_rows
    from hymba.quant.calibrate import LENGTH, ROWS
    from hymba.tokenizer import Tokenizer
    from hymba.train import data

    folder, enough = find(options.model), 16 * ROWS * LENGTH  # characters of each source
    texts: list[str] = []
    for source in map(data.find, options.text):
        size = 0
        for document in source.documents():
            texts.append(document.text)
            size += len(document.text)
            if size > enough:
                break
    rows = text_rows(Tokenizer.from_folder(folder), texts)
    return calibrate(folder, scheme, rows, progress)


def _told(model: LanguageModel, folder: Path) -> str:
    """What was made of how many numbers, by scheme."""
    from hymba.model.accounting import parameters
    from hymba.model.packed import schemes_of

    schemes = schemes_of(model)
    counts = {name: sum(s.name == name for s in schemes.values()) for name in SCHEMES}
    total = parameters(model.config)["total"]
    size = sum(x.nbytes for x in model.parameters())
    parts = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    share = f"{size / 1e6:,.1f} MB, {size / 4 / total:.3f} of float32's {4 * total / 1e6:,.1f}"
    return f"{folder}: {parts} of {len(schemes)} matrices; {share}"
