"""`hymba demo`: train a small hybrid-head model and an attention-only twin, and look at both.

Everything is real: the text is the Python standard library's sources, the models are written as
checkpoint folders, the cache is measured as well as predicted. Ctrl-C keeps what is done and the
same command goes on; a second run offers to reuse what is there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba.commands import choose_threads, parse
from hymba.errors import UserError
from hymba.files import is_leftover, write_json

if TYPE_CHECKING:
    from hymba.commands.demo_report import Trained
    from hymba.config import Config
    from hymba.tokenizer import Tokenizer
    from hymba.train import TokenStore

EXAMPLES = ("", "--steps 1000 --folder runs/longer", "--fresh")
RECORD = "demo.json"  # what this folder was made with
FOLDERS = ("data", "tokenizer", "training", "hymba", "llama")
FILES = (RECORD, f"{RECORD}.tmp", "demo.png", "result.json")
NAMES = {"hymba": "hybrid heads", "llama": "attention only"}


@dataclass(frozen=True)
class Options:
    """Train a small hybrid-head model beside an attention-only one of the same size on this
    machine, then compare them: about four minutes on four cores."""

    folder: Path = Path("runs/demo")
    """Where everything goes."""
    steps: int = 0
    """Training steps of each model (0: the recipe's)."""
    prompt: str = "def read_lines(path):\n"
    """What the trained model continues at the end."""
    fresh: bool = False
    """Start anew even if the folder holds a demo."""
    threads: int = 0
    """CPU threads (0: half the cores, which small products like best)."""


@dataclass(frozen=True)
class _Settings:
    """What decides the result; a folder made with others is not reused."""

    version: str
    steps: int


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "demo", EXAMPLES)
    if options.steps < 0 or options.threads < 0:
        raise UserError("--steps and --threads must be 0 or more")
    from hymba import __version__
    from hymba.recipes import demo as recipe

    choose_threads(options.threads)
    settings = _Settings(__version__, options.steps or recipe.STEPS)
    _open_folder(options.folder, settings, options.fresh)
    return _run(options, settings)


def _run(options: Options, settings: _Settings) -> int:
    from hymba.commands import demo_report as report
    from hymba.recipes import demo as recipe

    tokenizer, train, held_out = _data(options.folder, recipe.VOCABULARY)
    plans: dict[str, Callable[[int], Config]] = {
        "hymba": recipe.hybrid,
        "llama": recipe.attention_only,
    }
    trained: list[Trained] = []
    for name, plan in plans.items():
        _say(f"{NAMES[name]}: training, {settings.steps} steps")
        config = recipe.run(options.folder / "training" / name, settings.steps)
        model = _train(plan(tokenizer.vocab_size), config, train, held_out)
        if model is None:
            return 130
        _save(model, options.folder / name, tokenizer)
        trained.append(report.Trained(NAMES[name], model, config.folder / "metrics.jsonl"))
    _say(f"the hybrid model continues a prompt ({options.folder / 'hymba'})")
    report.show_text(trained[0], tokenizer, options.prompt)
    _say("the two models side by side")
    rows = report.compare(trained, held_out)
    report.show_table(rows)
    report.save_figure(rows, options.folder / "demo.png")
    report.save_json(rows, options.folder / "result.json")
    print(f"figure    {options.folder / 'demo.png'}")
    print(f"model     {options.folder / 'hymba'}  (hymba.load or transformers read it)")
    print(f'go on     hymba generate {options.folder / "hymba"} "import os" --max-tokens 100')
    return 0


def _say(heading: str) -> None:
    print(f"\n== {heading}", flush=True)


def _open_folder(folder: Path, settings: _Settings, fresh: bool) -> None:
    """Make the folder, or decide what becomes of the demo in it."""
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name another --folder")
    others = folder.iterdir() if folder.is_dir() and not record.is_file() else ()
    if not all(map(is_leftover, others)):
        raise UserError(f"{folder} holds something that is no demo: name another --folder")
    if record.is_file() and not fresh:
        before = _read(record)
        if before != asdict(settings):
            raise UserError(
                f"{folder} holds a demo made with {_words(before)}, this one has"
                f" {_words(asdict(settings))}: add --fresh to start anew or name another --folder"
            )
        fresh = not _reuse(folder)
    if fresh:
        _empty(folder)
    write_json(record, asdict(settings), indent=None)


def _read(record: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _words(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "settings that cannot be read"
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _reuse(folder: Path) -> bool:
    """Ask a person; a script reuses."""
    if not sys.stdin.isatty():
        print(f"{folder} holds a demo: going on with it (--fresh starts anew)")
        return True
    try:
        answer = input(f"{folder} holds a demo. Go on with it, reusing what is done? [Y/n] ")
    except EOFError:  # Ctrl-D is no wish to lose anything
        answer = ""
        print()
    return answer.strip().lower() not in ("n", "no")


def _empty(folder: Path) -> None:
    """Remove what a demo makes, and nothing else."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _data(folder: Path, vocab_size: int) -> tuple[Tokenizer, TokenStore, TokenStore]:
    """Tokenizer and tokens of the standard library, made once."""
    from rich.progress import Progress

    from hymba.tokenizer import Tokenizer
    from hymba.train import prepare, python_library, split

    _say("the text: this Python's own standard library")
    train, held_out = split(python_library())
    place = folder / "tokenizer"
    if (place / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(place)
    else:
        tokenizer = Tokenizer.train(train, vocab_size, progress=sys.stderr.isatty())
        tokenizer.save(place)
    stores = []
    with Progress(transient=True) as progress:
        for name, files in {"train": train, "held_out": held_out}.items():
            task = progress.add_task(f"tokenising {name} files", total=None)

            def update(done: int, total: int | None, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            stores.append(prepare(folder / "data" / name, files, tokenizer, update))
    for name, store in zip(("training", "held out"), stores, strict=True):
        facts = store.manifest
        print(
            f"{name:8}  {facts['documents']:5,} files  {facts['bytes'] / 1e6:6.2f} MB"
            f"  {facts['tokens']:10,} tokens  {store.bytes_per_label:.2f} bytes each"
        )
    return tokenizer, stores[0], stores[1]


def _train(config: Config, run: Any, train: TokenStore, held_out: TokenStore) -> Any:
    """The trained model, or None where a signal stopped it."""
    from hymba.model.accounting import parameters
    from hymba.model.decoder import LanguageModel
    from hymba.train import Trainer

    print(f"{parameters(config)['total']:,} parameters")
    model = LanguageModel(config).init_weights(seed=0)
    result = Trainer(model, run, train, held_out).run()
    return None if result.stopped else model.eval()


def _save(model: Any, folder: Path, tokenizer: Tokenizer) -> None:
    from hymba.weights import save

    save(model, folder, tokenizer)
