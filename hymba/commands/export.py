"""`hymba export MODEL --onnx FOLDER`: a model for devices without Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.errors import UserError
from hymba.files import check_place
from hymba.schemes import scheme_named

EXAMPLES = (
    "runs/demo/hymba --onnx runs/demo/onnx",
    "nvidia/Hymba-1.5B-Base --onnx hymba-int4 --quantize int4",
    "runs/hymba-int4 --onnx hymba-int4    # a folder that `hymba quantize` wrote",
    "runs/demo/hymba --onnx runs/demo/onnx --check --force",
)


@dataclass(frozen=True)
class Options:
    """Write a model as ONNX graphs with the whole cache as inputs and outputs, for onnxruntime on
    any device: one graph for chunks of a prompt and for single tokens, one that gives the cache to
    begin with, weights, tokenizer, and a JSON of names and sizes. examples/onnx_loop.py runs the
    folder with onnxruntime, numpy and tokenizers alone; docs/onnx.md tells the rest."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id: any plan of ours (llama, mamba, hymba...), or one in few bits."""
    onnx: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where it goes: a new folder, or with --force one of this command's."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME")] = None
    """int8 or int4: the matrices in so many bits. Without it weights are float32, unless the
    model's are in few bits already."""
    chunk: int = 128
    """The most tokens of one run. Rings of window layers have room for so many more."""
    activations: Literal["int8", "float32"] = "int8"
    """What matrices in few bits are multiplied with: int8 is faster, float32 exact."""
    check: bool = False
    """Run the folder beside the model and compare; needs memory for both, and onnxruntime."""
    force: bool = False
    """Replace a folder that this command wrote."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "export", EXAMPLES)
    if options.onnx is None:
        raise UserError("name the folder that it goes to: --onnx FOLDER")
    if options.chunk < 1:
        raise UserError(f"--chunk is {options.chunk}, but must be 1 or more")
    scheme = None if options.quantize is None else scheme_named(options.quantize)
    from hymba.export import Choices, export
    from hymba.export.linear import check_scheme
    from hymba.export.run import check_folder
    from hymba.weights import load

    if options.check:
        import hymba.export.session  # noqa: F401  (a missing onnxruntime is told before the work)
    if scheme is not None:
        check_scheme(scheme)
    check_folder(options.onnx, options.force)
    check_place(options.onnx)
    choose_threads(options.threads)
    with bar() as progress:
        dtype = "float32" if options.check else None
        model = load(options.model, dtype=dtype, quantize=options.quantize, progress=progress)
        choices = Choices(options.chunk, {"int8": 4, "float32": 1}[options.activations])
        export(model, options.onnx, choices, options.force, progress)
    print("\n".join(told(options.onnx, model)))
    if options.check:
        print(agreement(model, options.onnx))
    return 0


def told(folder: Path, model: Any) -> Iterator[str]:
    """The files, and what they hold."""
    from hymba.export.run import read_told

    said = read_told(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    yield f"{folder}: {', '.join(said['weights'])}, {size / 1e6:,.1f} MB"
    if not (folder / "tokenizer.json").is_file():
        yield "the model has no tokenizer.json, so the folder has none"


def agreement(model: Any, folder: Path) -> str:
    from hymba.export.session import compare
    from hymba.model.packed import schemes_of

    if schemes_of(model):
        model = model.double()  # which no kernel rounds activations for
    found = compare(model, folder)
    return (
        f"beside the model: {found.same} of {found.tokens} greedy tokens are the same,"
        f" logits differ by {found.off:.1e} of their spread at most"
    )
