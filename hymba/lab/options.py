"""The laboratory's command line. argparse, not tyro: it must run on hosts that have only torch.

Light: nothing heavy is imported until something is run.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hymba.lab.jobs import PARTS, TASKS, Lab, Plan, jobs
from hymba.lab.sizes import SIZES, LabError, size_named
from hymba.lab.variants import GROUPS, chosen
from hymba.model.accounting import parameters

ABOUT = """Is the hybrid head better, and why? Architectures of one parameter budget, trained on the
same rows in the same order: bits per byte of real text, recall on tasks that are scored exactly,
tokens a second and bytes of cache. Every run is a folder: Ctrl-C stops after a step and the same
command goes on."""
EXAMPLES = """examples:
  {prog} --size toy                        all of it, tiny: does the machinery run?
  {prog} --list --size 20m                 the variants, and the command that repeats each row
  {prog} --size 20m --part language --only hymba llama --minutes 9
  {prog} --size small --part recall --tasks mqar --only a
  {prog} --size toy --report               what is done, as tables, figures and JSON
"""


def read(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=ABOUT,
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="toy", metavar="SIZE", help=f"one of {', '.join(SIZES)} (toy)")
    add("--only", nargs="+", default=[], metavar="NAME", help="variants, or groups (a, b, c)")
    add("--part", nargs="+", default=[], metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    add("--seeds", nargs="+", type=int, default=[], metavar="N", help="instead of the size's own")
    add("--sources", nargs="+", default=[], metavar="SOURCE",
        help="text instead of installed packages' sources, as hymba train takes it")  # fmt: skip
    add("--folder", type=Path, default=Path("runs/lab"), help="where runs are kept (runs/lab)")
    add("--minutes", type=float, metavar="N", help="stop cleanly after so long")
    add("--device", default="", help="cpu or cuda (the GPU if there is one)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (half the cores)")
    add("--list", action="store_true", help="run nothing: variants, sizes, commands")
    add("--report", action="store_true", help="run nothing: gather what is done")
    add("--results", type=Path, default=Path("results"),
        help="where --report writes lab-*.json and figures (results)")  # fmt: skip
    add("--page", type=Path, default=Path("docs/lab.md"),
        help="the document whose tables --report writes, if it exists (docs/lab.md)")  # fmt: skip
    return parser.parse_args(list(argv))


def main(argv: Sequence[str], prog: str = "hymba lab") -> int:
    options = read(argv, prog)
    if options.threads < 0:
        raise LabError("--threads must be 0 or more")
    plan = Plan(
        size=options.size,
        only=tuple(options.only),
        part=tuple(options.part),
        tasks=tuple(options.tasks),
        seeds=tuple(options.seeds),
        sources=tuple(options.sources),
        folder=options.folder,
        minutes=options.minutes,
        device=options.device,
    )
    if options.list:
        print("\n".join(listed(plan)))
        return 0
    if options.report:
        from hymba.lab.report import publish

        publish(plan.folder, size_named(plan.size), options.results, options.page)
        return 0
    return run(plan, options.threads)


def run(plan: Plan, threads: int) -> int:
    import os

    import torch

    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) // 2))
    lab = Lab(plan)
    if lab.run():
        print(f"all done in {plan.folder}; --report makes tables of it")
        return 0
    return 130 if lab.stopped else 0


def listed(plan: Plan) -> list[str]:
    """The variants of a plan: size, layers, what they are, and the command that repeats the row."""
    size = size_named(plan.size)
    lines, group = [f"{size.name}: {size.about}"], ""
    for variant in chosen(plan.only):
        if variant.group != group:
            group = variant.group
            lines += ["", f"{group}: {GROUPS[group]}"]
        config = variant.config(size.shape, size.vocab_size)
        total = parameters(config)["total"] / 1e6
        letters = "".join(map(_letter, config.layers))
        lines += [f"  {variant.name}: {variant.about} ({variant.paper})"]
        lines += [f"      {total:.2f} M parameters, layers {letters}"]
        lines += [f"      {row_command(plan, variant.name)}"]
    lines += ["", "layers: h hybrid, a attention, s SSM; a capital sees everything, else a window"]
    return [*lines, f"{len(jobs(plan))} runs, of {', '.join(plan.part or PARTS)}"]


def row_command(plan: Plan, variant: str) -> str:
    """Repeats one variant's row."""
    words = ["hymba", "lab", "--size", plan.size, "--only", variant]
    for key in ("part", "tasks", "seeds", "sources"):
        if given := getattr(plan, key):
            words += [f"--{key}", *map(str, given)]
    return shlex.join(words)


def _letter(layer: object) -> str:
    """H, h: hybrid, seeing everything or its window; A, a: attention alone; s: SSM alone."""
    attention, ssm, window = (getattr(layer, key) for key in ("attention", "ssm", "window"))
    if not attention:
        return "s"
    letter = "h" if ssm else "a"
    return letter if window else letter.upper()
