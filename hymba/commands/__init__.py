"""The commands of `hymba`: one module each, with `main(argv) -> exit code`.

A command's options are a dataclass, read by `parse`. Everything heavy is imported inside `main`,
so that `hymba COMMAND --help` answers at once. What a command does lives in the rooms above; here
are only its options and what it prints.
"""

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hymba.errors import UserError

Options = TypeVar("Options")


def parse(
    options: type[Options],
    argv: Sequence[str],
    command: str,
    examples: Sequence[str] = (),
    default: Options | None = None,
    registry: Any = None,
) -> Options:
    """Read a command's options; `--help` and mistakes end the program here, as argparse's do.

    The help opens with the dataclass' docstring and the examples (arguments only). `default` is
    where options come from that are not given, `registry` tyro's rules for types of our own.
    """
    import tyro  # here: a machine without it can still import the command

    given: dict[str, Any] = {} if default is None else {"default": default}
    lines = [inspect.getdoc(options) or ""]
    if examples:
        lines += ["", "Examples:", *(f"  hymba {command} {example}" for example in examples)]
    return tyro.cli(
        options,
        args=list(argv),
        prog=f"hymba {command}",
        description="\n".join(lines),
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
        registry=registry,
        **given,
    )


def choose_threads(asked: int = 0) -> None:
    """CPU threads of torch: as asked, as OMP_NUM_THREADS says, else half the cores.

    Small products wait for the slowest thread, and a "core" is often half of one: a thread for
    each is slower than half as many, and many times slower beside other work.
    """
    import torch

    if asked < 0:
        raise UserError(f"threads is {asked}, but must be 0 (half the cores) or more")
    if asked or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(asked or max(1, (os.cpu_count() or 2) // 2))


@contextmanager
def bar(shown: bool = True) -> Iterator[Any]:
    """A bar in a terminal: what it gives is called with (what, done, total or None)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    shown = shown and Console().is_terminal  # elsewhere it would be an empty line
    with Progress(*columns, TimeElapsedColumn(), transient=True, disable=not shown) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
