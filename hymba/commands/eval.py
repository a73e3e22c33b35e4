"""`hymba eval MODEL --suite NAME | --tasks NAMES`: the options; `hymba.eval.run` does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.eval.run import Plan

EXAMPLES = (
    "nvidia/Hymba-1.5B-Base --suite paper-base --out scores.json",
    "runs/mine --tasks piqa arc_easy --limit 100",
    "runs/mine --tasks questions --include-path my-tasks/ --num-fewshot 2",
    "runs/chat --suite paper-instruct --out chat.json --log-samples",
    "runs/mine --suite recall --lengths 512 2048 --samples 8 --plot recall.png",
    "runs/mine --suite perplexity --text letters.txt",
)
OWN = ("recall", "perplexity")  # suites that need no download
# What says nothing to the others: refused, since a score without it would be taken for one with it.
OF_TASKS = ("include_path", "limit", "num_fewshot", "apply_chat_template", "log_samples")
OF_OWN = ("lengths", "samples", "text", "plot")


@dataclass(frozen=True)
class Options:
    """Evaluate a model with lm-eval: a suite of the paper beside its figures, or any tasks. Or
    without a download: recall (needles and others, in text) and perplexity by position.

    Hymba models run without padding, with what questions share computed once and answers written
    by the engine; any other causal model by lm-eval's own class. Ctrl-C keeps finished tasks in
    --out, and the same command goes on (perplexity, one measurement, starts again). In several
    processes: torchrun --nproc-per-node 8 -m hymba eval ... (or accelerate launch)."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""
    suite: Literal["paper-base", "paper-1b", "paper-instruct", "recall", "perplexity"] | None = None
    """Tasks, shots and metrics of a table of the paper; or recall, or perplexity."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks or groups, or of files in --include-path; with --suite recall some
    of its tasks."""
    lengths: tuple[int, ...] = ()
    """Suite recall: tokens of the rows (256, 512, ... to the model's positions). Suite perplexity:
    one."""
    samples: int = 4
    """Suite recall: rows at each length and depth. Suite perplexity: four times as many rows."""
    text: tuple[Path, ...] = ()
    """Suite perplexity: files in place of Python's library."""
    plot: Path | None = None
    """Suites recall and perplexity: draw the figures into this file."""
    include_path: Path | None = None
    """A folder of task descriptions (YAML) of your own."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    num_fewshot: int | None = None
    """Examples in front of each question; without it the suite's or the task's own."""
    apply_chat_template: bool = False
    """Ask in the model's chat format, examples as turns (paper-instruct always does)."""
    batch: str = "auto"
    """Questions at a time; auto: as many as fit, counted in tokens. Scores do not depend on it."""
    device: str | None = None
    """cpu or cuda; without it a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the weights are made; without it they stay as they are."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME")] = None
    """int8, int4 or fp8: the matrices in few bits."""
    through_transformers: bool = False
    """Run a Hymba model by lm-eval's own class too, for comparison."""
    out: Path | None = None
    """A JSON file for the results, with versions, command and settings."""
    log_samples: bool = False
    """Keep every question and answer, in a folder named like --out."""
    fresh: bool = False
    """Start --out anew: what it has is done again, and what was not asked for is gone."""
    threads: int = 0
    """CPU threads (0: half the cores)."""

    def check(self) -> None:
        if self.suite not in OWN and (self.suite is None) == (not self.names()):
            raise UserError("say what to do: either --suite, or --tasks with one name or more")
        for name in ("limit", "num_fewshot"):
            value, least = getattr(self, name), 1 if name == "limit" else 0
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, but must be {least} or more")
        if self.batch != "auto" and not (self.batch.isdecimal() and int(self.batch) > 0):
            raise UserError(f"batch is {self.batch!r}: give auto, or a number of 1 or more")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"there is no folder {self.include_path} (--include-path)")
        if self.log_samples and self.out is None:
            raise UserError("--log-samples needs --out, which says where")
        if self.log_samples and self.out is not None and not self.out.suffix:
            raise UserError(f"--log-samples makes a folder {self.out}: call --out {self.out}.json")
        self._check_suite()

    def _check_suite(self) -> None:
        """Only what the suite, or lm-eval's tasks, heed."""
        for name in OF_TASKS if self.suite in OWN else OF_OWN:
            if getattr(self, name) != getattr(Options, name):
                of = "tasks of lm-eval" if self.suite in OWN else "the suites recall and perplexity"
                raise UserError(f"--{name.replace('_', '-')} is for {of} alone: leave it out")
        if self.suite == "recall" and self.text:
            raise UserError("--text is for the suite perplexity alone: leave it out")
        if self.suite == "perplexity" and self.tasks:
            raise UserError("the suite perplexity has no tasks: leave out --tasks")
        if self.suite == "perplexity" and len(self.lengths) > 1:
            raise UserError("the suite perplexity takes one of --lengths: it shows every position")
        if any(length < 1 for length in self.lengths):
            raise UserError(f"lengths has {min(self.lengths)}: a row has 1 token or more")
        if self.suite in OWN and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"the suite {self.suite} runs in one process: start it without torchrun"
            )

    def names(self) -> tuple[str, ...]:
        """Each task once; "piqa,arc_easy" is how lm-eval's own command has it."""
        words = [name for word in self.tasks for name in word.split(",") if name]
        return tuple(dict.fromkeys(words))


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "eval", EXAMPLES)
    options.check()
    _hush()
    choose_threads(options.threads)
    if options.suite in OWN:
        return _own(options)
    from hymba.eval.run import run

    return run(plan_of(options))


def _own(options: Options) -> int:
    """The suites that need no download, on one device."""
    from hymba.eval import own

    plan = own.Plan(
        model=options.model,
        suite=str(options.suite),
        names=options.names(),
        lengths=tuple(dict.fromkeys(options.lengths)),
        samples=options.samples,
        text=tuple(map(str, options.text)),
        batch=8 if options.batch == "auto" else int(options.batch),
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        through_transformers=options.through_transformers,
        out=options.out,
        plot=options.plot,
        fresh=options.fresh,
    )
    folder = own.check(plan)
    with bar() as progress:
        result, finished = own.measure(plan, folder, progress)
    own.tell(plan, result, finished)
    return 0


def plan_of(options: Options) -> Plan:
    from hymba.eval.run import Plan
    from hymba.eval.suites import SUITES, Entry

    suite = None if options.suite is None else SUITES[options.suite]
    named = tuple(Entry(name, name, None, "") for name in options.names())
    tasks = suite.tasks if suite else named
    return Plan(
        model=options.model,
        tasks=tasks,
        suite=options.suite,
        include_path=options.include_path,
        limit=options.limit,
        shots=options.num_fewshot,
        chat=options.apply_chat_template or bool(suite and suite.chat),
        batch=None if options.batch == "auto" else int(options.batch),
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        out=options.out,
        log_samples=options.log_samples,
        fresh=options.fresh,
        through_transformers=options.through_transformers,
    )


def _hush() -> None:
    """Libraries' bars belong to a terminal, and their hints to nobody who asked for scores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
