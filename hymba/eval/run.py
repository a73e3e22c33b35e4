"""`hymba eval`: a model through tasks of lm-eval, one after another, each kept when it is done.

code = run(Plan("runs/mine", tasks=(Entry("piqa", "piqa", None, ""),), out=Path("scores.json")))
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymba.eval import tables
from hymba.eval.harness import EvalError, OurLM, Shelf, evaluate, peer_lm
from hymba.eval.results import (
    Finished,
    check_place,
    check_same,
    fingerprint,
    head,
    made_of,
    say,
    say_written,
    versions,
    weights_of,
)
from hymba.eval.subject import FILES, check_tokenizer
from hymba.eval.suites import SUITES, Entry
from hymba.files import write_text
from hymba.hub import find
from hymba.train.parallel import World, join
from hymba.weights import load

# Settings that change what is kept or how fast, but not what comes out of it.
FREE = ("out", "log_samples", "batch", "device", "fresh", "tasks", "suite", "model", "include_path")


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    model: str
    tasks: tuple[Entry, ...]
    suite: str | None = None
    include_path: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    batch: int | None = None  # None: as many as fit
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    out: Path | None = None
    log_samples: bool = False
    fresh: bool = False
    through_transformers: bool = False
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def shots_of(self, entry: Entry) -> int | None:
        return entry.shots if self.shots is None else self.shots


def run(plan: Plan) -> int:
    """Evaluate, or read what is done already; a table on standard output. The exit code."""
    with join(plan.device) as (world, device):
        if plan.out is not None:
            check_place(plan.out, "lm-eval")
        # Before the model, which may take long: names, and data that is not to be had.
        with world.in_turn():
            model = _Model(plan, _folder(plan.model), world, device)
            of = _of(plan, model.folder)
            if plan.out is not None and not plan.fresh:
                check_same(plan.out, of)
            shelf = Shelf.of([entry.task for entry in plan.tasks], plan.include_path)
            for entry in plan.tasks:
                shelf.load(entry.task)
        kept = plan.out if world.first else None
        finished = Finished(kept, head(_config(plan), device, "lm-eval"), plan.fresh, of)
        marks = {_key(plan, entry): _mark(plan, entry, shelf, model.folder) for entry in plan.tasks}
        try:
            for entry in _to_do(plan, marks, finished, model):
                _one(plan, entry, shelf, finished, model, marks[_key(plan, entry)])
        except KeyboardInterrupt:
            if world.first and plan.out is not None:
                say(f"stopped: {len(finished.tasks)} of {len(marks)} tasks are in {plan.out},")
                say("the same command goes on from there")
            raise
        if world.first:
            _tell(plan, finished)
    return 0


def _to_do(plan: Plan, marks: Mapping[str, str], finished: Finished, model: _Model) -> list[Entry]:
    """Tasks that are not done; the first process decides. Two columns may be of one task."""
    entries = {_key(plan, entry): entry for entry in reversed(plan.tasks)}
    wanted = []
    for key, mark in marks.items():
        found = finished.look(key, mark)
        if found is not None and _samples_are_there(plan, key):
            finished.take(key, found)
            model.say(f"{key}: done already, taken from {plan.out} (--fresh would do it again)")
            continue
        if finished.other(key, mark):
            model.say(f"{key}: {plan.out} has it with other settings, it is done again")
        wanted.append(key)
    return [entries[key] for key in _agreed(wanted, model.world)]


def _one(
    plan: Plan, entry: Entry, shelf: Shelf, finished: Finished, model: _Model, mark: str
) -> None:
    key, began = _key(plan, entry), time.monotonic()
    model.say(f"{key} ...")
    shots = plan.shots_of(entry)
    result = evaluate(
        model.lm, shelf, entry.task, shots, plan.limit, plan.chat, plan.gen_kwargs or None
    )
    if result is None or not model.world.first:
        return
    seconds = time.monotonic() - began
    kept = tables.summary(result, entry.task) | {"fingerprint": mark, "seconds": round(seconds, 2)}
    if plan.log_samples:
        kept["samples_in"] = _write_samples(plan, key, result)
    finished.add(key, kept)
    if kept["cut"]:
        model.say(
            f"{key}: {kept['cut']} prompts are longer than the model's context, their beginnings"
            " were left out"
        )


def _agreed(keys: list[str], world: World) -> list[str]:
    """The first process' list, on all of them."""
    told = [keys]
    if world.joined:
        dist.broadcast_object_list(told, src=0)
    return told[0]


class _Model:
    """The model, loaded when a task needs it: never, where all are done already."""

    def __init__(self, plan: Plan, folder: Path, world: World, device: torch.device) -> None:
        self.plan, self.folder, self.world, self.device = plan, folder, world, device
        self._lm: Any = None
        check_tokenizer(folder)
        if plan.quantize is not None and (plan.through_transformers or not self._ours()):
            raise EvalError("only Hymba models, on our own code, can be quantised here")

    @property
    def lm(self) -> Any:
        if self._lm is None:
            plan = self.plan
            if self._ours() and not plan.through_transformers:
                model = load(self.folder, self.device, plan.dtype, plan.quantize)
                self._lm = OurLM(model, self.folder, self.world, plan.batch, sys.stderr.isatty())
            else:
                self._lm = peer_lm(self.folder, str(self.device), plan.dtype, plan.batch)
        return self._lm

    def _ours(self) -> bool:
        return kind_of(self.folder) == "hymba"

    def say(self, line: str) -> None:
        if self.world.first:
            say(line)


def kind_of(folder: Path) -> str:
    """The model_type of config.json; EvalError where there is none."""
    file = folder / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        raise EvalError(f"{folder} has no config.json: it is no model folder") from None
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{file} names no model_type: it is no model's config") from None


def _folder(model: str) -> Path:
    folder = find(model, FILES)
    kind_of(folder)
    return folder


def _of(plan: Plan, folder: Path) -> dict[str, Any]:
    return made_of(
        plan.model,
        folder,
        plan.through_transformers,
        plan.quantize,
        dtype=plan.dtype,
        limit=plan.limit,
        chat=plan.chat,
        include_path=plan.include_path,
    )


def _key(plan: Plan, entry: Entry) -> str:
    """A task under its own name; with shots, where those are not its own."""
    shots = plan.shots_of(entry)
    return entry.task if shots is None else f"{entry.task}@{shots}"


def _mark(plan: Plan, entry: Entry, shelf: Shelf, folder: Path) -> str:
    """Equal where the result must be: the model, the task, its data's files, what computes."""
    used = versions()
    which = {name: used.get(name) for name in ("hymba", "lm_eval")}
    free = {name: value for name, value in asdict(plan).items() if name not in FREE}
    free["shots"] = plan.shots_of(entry)
    return fingerprint(weights_of(folder), shelf.describe(entry.task), free, which)


def _config(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"tasks": [entry.task for entry in plan.tasks]}


def _samples_path(plan: Plan, key: str) -> Path:
    assert plan.out is not None
    return plan.out.with_suffix("") / f"{key}.jsonl"


def _samples_are_there(plan: Plan, key: str) -> bool:
    return not plan.log_samples or _samples_path(plan, key).is_file()


def _write_samples(plan: Plan, key: str, result: Mapping[str, Any]) -> str:
    """A line for each question: what was asked, what the model said, what it scored."""
    path = _samples_path(plan, key)
    samples = [x for some in result.get("samples", {}).values() for x in some]
    lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
    write_text(path, "".join(lines))
    return str(path)


def _tell(plan: Plan, finished: Finished) -> None:
    rows = {entry: finished.tasks[_key(plan, entry)] for entry in plan.tasks}
    if plan.suite is None:
        print(tables.plain(list(finished.tasks.items())))
    else:
        suite = SUITES[plan.suite]
        figures = {entry: tables.figure(entry, found) for entry, found in rows.items()}
        local = plan.include_path is not None
        print(tables.beside_the_paper(plan.model, suite, figures, plan.limit, local))
        finished.write({"suite": tables.suite_json(plan.suite, suite, figures)})
    say_written(finished)
