"""`hymba probe MODEL --out folder`: what the heads of a trained model do, as one page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hymba.commands import choose_threads, parse
from hymba.errors import UserError

EXAMPLES = (
    "runs/demo/hymba --out runs/demo/probe",
    "runs/demo/hymba --out probe --text letters.txt main.py --tokens 512",
    "runs/demo/hymba --out probe --against runs/demo/llama",
    "nvidia/Hymba-1.5B-Base --out probe --device cuda",
)


@dataclass(frozen=True)
class Options:
    """What the heads of a trained model do: where attention goes, with meta tokens and without, and
    the SSM's seen as attention; what each branch and head is worth; how far back they look; which
    meta tokens fire for which text. One page with figures and maps that answer to a pointer
    (OUT/index.html, which works offline), and every number as JSON beside it. Float32."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id, with its tokenizer: any plan of ours (llama, mamba, hymba...)."""
    out: Path | None = None
    """Where the report goes: a new folder, or one of this command's."""
    against: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """A second model, of the same texts: what the paper says of two models is decided by both.
    The one with meta tokens and heads side by side goes first."""
    text: tuple[str, ...] = ()
    """Texts to look at, one kind each. Without it small samples of prose, code, mathematics and
    dialogue."""
    tokens: int = 256
    """How much of each text, from its beginning. Time grows with its square."""
    channels: int = 64
    """How many of an SSM's channels are looked at, evenly spread."""
    heads: Literal["few", "all", "none"] = "few"
    """Take away single heads too, not only whole branches: few does where they are 256 at most."""
    device: str | None = None
    """cpu or cuda; without it a GPU where there is one."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "probe", EXAMPLES)
    if options.out is None:
        raise UserError("name the folder of the report: --out runs/probe")
    for name, least in (("tokens", 16), ("channels", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be {least} or more")
    from hymba.eval.probe import report
    from hymba.eval.probe.run import Limits, probe

    report.check_folder(options.out)
    choose_threads(options.threads)
    heads = {"few": None, "all": True, "none": False}[options.heads]
    limits = Limits(options.tokens, options.channels, heads=heads)
    with bar() as progress:
        result, maps = probe(
            options.model, options.text, limits, options.device, ["probe", *argv], progress,
            options.against,
        )  # fmt: skip
    report.write(options.out, result, maps)
    for said in summary(result):
        print(said)
    print(f"\nreport   {options.out / 'index.html'}")
    print(f"numbers  {options.out / 'probe.json'}")
    return 0


def summary(result: dict) -> Iterator[str]:
    """The findings, a line or two each."""
    from hymba.eval.probe.against import note
    from hymba.eval.probe.findings import findings
    from hymba.eval.probe.report import VERDICTS

    yield f"{result['model']}: the paper's statements, and what this model shows"
    for found in findings(result):
        yield f"\n{found.statement}\n  {VERDICTS[found.agrees]}: {found.here}"
    if "against" in result and (said := note(result)):
        yield f"\n{said}"


@contextmanager
def bar() -> Iterator[Callable[[int], Callable[[str], None]]]:
    """begin(steps) -> tick(what); on standard error, and nowhere but in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(file=sys.stderr)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:  # fmt: skip

        def begin(steps: int) -> Callable[[str], None]:
            task = progress.add_task("looking", total=steps)
            return lambda what: progress.update(task, advance=1, description=what)

        yield begin
