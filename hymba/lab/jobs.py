"""Runs of a laboratory as folders: which there are, which are done, which come next, until when.

    FOLDER/SIZE/PART/[TASK/]VARIANT/seed-N/result.json      one run's figures, all that is reported
                                           training/        its checkpoints until it is done
                                           model/           a trained language model, to look at
    FOLDER/data                                             tokens and tokenizer, for all runs

A run that has its result.json is done. Ctrl-C or the clock ends a run after a step with a
checkpoint, and the same command goes on from it exactly; killed, it goes on from the one before.
Seeds are the outermost loop, so that what is there when time ends is comparable. The same command
started several times (one a GPU: CUDA_VISIBLE_DEVICES) shares the runs out: each takes what no
other has begun.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba import __version__
from hymba.files import write_json
from hymba.lab.sizes import LabError, Size, named, size_named
from hymba.lab.variants import BASE, Variant, chosen
from hymba.model.accounting import parameters
from hymba.train.claim import claimed

if TYPE_CHECKING:
    from hymba.lab.training import Device, Trained
    from hymba.train.data import Data

PARTS = ("cost", "language", "recall")
TASKS = ("mqar", "phonebook", "needle", "copy", "induction")
MOST_SEEDS = 2**32
SPREAD = (BASE, "llama")  # language models trained with all seeds: how far apart seeds lie


@dataclass(frozen=True)
class Plan:
    """What of a laboratory to run."""

    size: str = "toy"
    only: tuple[str, ...] = ()
    part: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    folder: Path = Path("runs/lab")
    minutes: float | None = None
    device: str = ""

    def __post_init__(self) -> None:
        size_named(self.size)
        chosen(self.only)
        for kind, names, known in (("part", self.part, PARTS), ("task", self.tasks, TASKS)):
            for name in names:
                named(kind, name, dict.fromkeys(known))
        if self.minutes is not None and not self.minutes > 0:  # nan is not above 0 either
            raise LabError(f"--minutes must be above 0, not {self.minutes:g}")
        if not all(0 <= seed < MOST_SEEDS for seed in self.seeds):
            raise LabError(f"--seeds are whole numbers, 0 or more and below {MOST_SEEDS:,}")


@dataclass(frozen=True)
class Job:
    """One run."""

    size: Size
    part: str
    variant: Variant
    seed: int
    task: str = ""

    @property
    def place(self) -> Path:
        parts = self.size.name, self.part, self.task, self.variant.name, f"seed-{self.seed}"
        return Path(*filter(None, parts))

    @property
    def command(self) -> str:
        """What repeats this run alone."""
        words = ["hymba", "lab", "--size", self.size.name, "--part", self.part]
        words += ["--tasks", self.task] if self.task else []
        words += ["--only", self.variant.name]
        words += ["--seeds", str(self.seed)] if self.part != "cost" else []
        return shlex.join(words)

    def __str__(self) -> str:
        seed = "" if self.part == "cost" else f", seed {self.seed}"
        return f"{self.part} {self.task}{' ' if self.task else ''}{self.variant.name}{seed}"


def jobs(plan: Plan) -> list[Job]:
    """In the order in which they are run."""
    size, variants = size_named(plan.size), chosen(plan.only)
    found: list[Job] = []
    for part in plan.part or PARTS:
        if part == "cost":
            found += [Job(size, part, variant, 0) for variant in variants]
        elif part == "language":
            seeds = plan.seeds or size.seeds
            for seed in seeds:
                first = bool(plan.seeds) or seed == seeds[0]
                some = [v for v in variants if first or v.name in SPREAD]
                found += [Job(size, part, variant, seed) for variant in some]
        else:
            for seed in plan.seeds or size.seeds:
                for task in plan.tasks or TASKS:
                    found += [Job(size, part, variant, seed, task) for variant in variants]
    return found


class Clock:
    """How long is left of --minutes."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float | None:
        """Minutes; None: as long as it takes."""
        return None if self._end is None else (self._end - time.monotonic()) / 60

    @property
    def over(self) -> bool:
        left = self.left
        return left is not None and left <= 0


@dataclass
class Lab:
    """Runs the jobs of a plan; `run` says whether all are done."""

    plan: Plan
    say: Callable[[str], None] = print
    stopped: bool = False  # by a signal, not by the clock
    _data: dict[str, Data] = field(default_factory=dict)

    def run(self) -> bool:
        from hymba.lab.training import Device

        device, clock = Device.find(self.plan.device), Clock(self.plan.minutes)
        todo, others = jobs(self.plan), 0
        for number, job in enumerate(todo, 1):
            with claimed(self.plan.folder / job.place) as mine:
                if self.result(job) is not None:
                    continue
                if not mine:
                    others += 1
                    continue
                if clock.over:
                    self.say(f"time is over: {len(todo) - number + 1} runs are left, go on with")
                    self.say("the same command")
                    return False
                self.say(f"== {number}/{len(todo)} {job}")
                if not self._do(job, device, clock):
                    self.stopped = not clock.over
                    return False
        if others:
            self.say(f"{others} runs are left to the processes that have begun them")
        return not others

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a done run has left; LabError if it was another run."""
        path = self.plan.folder / job.place / "result.json"
        if not path.is_file():
            return None
        found = _record(path)
        if found.get("settings") != _plain(self._settings(job)):
            raise LabError(
                f"{path} was made with other settings: name another --folder, or delete its folder"
            )
        return found

    def _settings(self, job: Job) -> dict[str, Any]:
        """All that decides a run's figures, but for the machine and the text."""
        size = job.size
        found: dict[str, Any] = {"size": size.name, "part": job.part, "variant": job.variant.name}
        if job.part == "cost":
            return found | {"contexts": size.contexts, "batches": size.batches}
        run = size.recall if job.part == "recall" else size.language
        found |= {"seed": job.seed, "run": asdict(run), "normalize": job.variant.normalize}
        found |= {"dt": job.variant.dt} if job.variant.dt else {}
        if job.part == "recall":
            from hymba.lab import recall

            lessons = recall.rows(job.task, size, job.seed).identity["corpus"]
            return found | {"task": job.task, "rows": lessons, "test_rows": size.test_rows}
        sources = self.plan.sources or size.sources
        return found | {"sources": sources, "held_out_tokens": size.held_out_tokens}

    def _do(self, job: Job, device: Device, clock: Clock) -> bool:
        """One run; False where it was stopped."""
        began = time.time()
        make = {"cost": self._cost, "language": self._language, "recall": self._recall}[job.part]
        figures = make(job, device, clock)
        if figures is None:
            return False
        record = {
            "settings": self._settings(job),
            "task": job.task,
            "variant": job.variant.name,
            "part": job.part,
            "seed": job.seed,
            "command": job.command,
            **facts(device),
            **figures,
        }
        place = self.plan.folder / job.place
        write_json(place / "result.json", record, indent=1)
        self.say(f"   {summary(record)}  ({time.time() - began:.0f} s)")
        return True

    def _cost(self, job: Job, device: Device, clock: Clock) -> dict[str, Any]:
        from hymba.lab import cost

        config = job.variant.config(job.size.shape, job.size.vocab_size)
        return {"parameters": parameters(config)} | cost.measure(config, job.size, device)

    def _language(self, job: Job, device: Device, clock: Clock) -> dict[str, Any] | None:
        from hymba.lab import language
        from hymba.lab.training import forget
        from hymba.weights import save

        size, data = job.size, self._open(job.size)
        assert data.held_out is not None
        config = job.variant.config(size.shape, data.tokenizer.vocab_size)
        rows = data.rows(size.language.sequence_length, job.seed)
        trained = self._train(job, device, clock, config, rows, data.held_out)
        if trained is None:
            return None
        found = language.measure(trained, data.held_out, size, device)
        place = self.plan.folder / job.place
        save(trained.model.bfloat16(), place / "model", data.tokenizer)
        forget(place / "training")
        corpus = {
            "distinct_tokens": sum(int(corpus.store.pairs.sum()) for corpus in data.corpora),
            "epochs": rows.epochs(size.language.steps * size.language.rows),
            "facts": list(data.facts),
        }
        tokens = size.language.tokens
        return self._common(config, trained, tokens) | {"corpus": corpus} | found

    def _recall(self, job: Job, device: Device, clock: Clock) -> dict[str, Any] | None:
        from hymba.lab import recall, tasks
        from hymba.lab.training import forget

        size = job.size
        words = tasks.vocab_size(job.task, size.recall.sequence_length)
        config = job.variant.config(size.recall_shape, words)
        rows = recall.rows(job.task, size, job.seed)
        trained = self._train(job, device, clock, config, rows, None)
        if trained is None:
            return None
        found = recall.measure(trained, job.task, size, device)
        forget(self.plan.folder / job.place / "training")
        return self._common(config, trained, size.recall.tokens) | found

    def _train(
        self, job: Job, device: Device, clock: Clock, config: Any, rows: Any, held_out: Any
    ) -> Trained | None:
        from hymba.lab.training import new_model, settings, train

        run = job.size.recall if job.part == "recall" else job.size.language
        place = self.plan.folder / job.place / "training"
        normalize = job.variant.normalize
        how = settings(place, run, job.seed, device.precision, normalize, job.size.held_out_tokens)
        model = new_model(config, job.seed, device, job.variant.dt)
        return train(model, how, rows, held_out, clock.left, lambda line: self.say(f"   {line}"))

    def _common(self, config: Any, trained: Trained, tokens: int) -> dict[str, Any]:
        return {
            "parameters": parameters(config),
            "tokens": tokens,
            "seconds": trained.seconds,
            "tokens_per_s": trained.tokens_per_second,
            "losses": trained.losses,
        }

    def _open(self, size: Size) -> Data:
        """The corpus, opened once for all runs."""
        from hymba.lab import language

        if size.name not in self._data:
            sources = self.plan.sources or size.sources
            folder = self.plan.folder / "data"
            self._data[size.name] = language.corpus(size, sources, folder, teller(self.say))
            for line in self._data[size.name].facts:
                self.say(f"   {line}")
        return self._data[size.name]


def teller(say: Callable[[str], None], every: float = 10.0) -> Callable[..., None]:
    """Progress as a line now and then."""
    last = [time.monotonic()]

    def tell(what: str, done: int, total: int | None) -> None:
        if time.monotonic() - last[0] > every:
            last[0] = time.monotonic()
            say(f"   {what}: {done:,}" + (f" of {total:,}" if total else ""))

    return tell


def summary(record: dict[str, Any]) -> str:
    """A run in one line."""
    if record["part"] == "language":
        return f"bits per byte {record['bits_per_byte']:.4f}"
    if record["part"] == "recall":
        return f"recall {record['recall']:.3f}, beyond training {record['beyond']:.3f}"
    return ", ".join(
        f"decode {_middle(row['tokens_per_s']):,.0f} tok/s at {row['context']} x {row['batch']}"
        for row in record["decoding"]
    )


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def facts(device: Device) -> dict[str, Any]:
    """What a figure depends on, besides code and settings."""
    import torch

    name = torch.cuda.get_device_name() if device.is_gpu else _cpu()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": device.precision,
        "hymba": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _plain(value: Any) -> Any:
    """As it reads when it comes back from JSON."""
    return json.loads(json.dumps(value))


def _record(path: Path) -> dict[str, Any]:
    """A result.json; LabError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"part", "device"}:
        raise LabError(f"{path} is damaged: delete its folder, and the run is made again")
    return found


def results(folder: Path, size: str) -> Iterator[dict[str, Any]]:
    """Every run of a size that is done, whatever command made it."""
    for path in sorted((folder / size).rglob("result.json")):
        yield _record(path)
