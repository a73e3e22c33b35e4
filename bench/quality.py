#!/usr/bin/env python3
"""What few bits cost: bits per byte and recall of trained models, by scheme and by kind of weight.

    python -m bench.quality                              # writes results/quality-<machine>.json
    python -m bench.quality --only kinds --models hymba  # a part of it, the rest of the file stays
    python -m bench.quality --table --document docs/quantisation.md     # the file, into the page

    schemes   whole models: rounded to nearest, calibrated, and with inputs in 8 bits
    kinds     one kind of weight rounded, all else as trained: what has to stay
    states    what decoding keeps (SSM states, keys and values), rounded after every token, or lost
    recall    the same of models that were trained to recall (once, kept in runs/quality)

Language models are those of results/lab-models; their text is the part of Python's library that
`hymba train` holds out, calibration reads another part. Every figure is a difference to the model
as trained on the same rows, with its standard error over rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hymba.cache import Cache
from hymba.eval.hay import HELD_OUT, Pen, documents
from hymba.eval.perplexity import cut_rows, row_bytes
from hymba.eval.recall import RecallRows
from hymba.eval.subject import Ours
from hymba.files import write_json
from hymba.lab import recall, tasks
from hymba.lab.jobs import facts
from hymba.lab.sizes import Size, size_named
from hymba.lab.training import Device, Trained, new_model, settings, train
from hymba.lab.variants import VARIANTS
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.packed import make_room, packed_tiles, plan
from hymba.ops.loss import IGNORE
from hymba.ops.packed import dequantize, quantize
from hymba.quant import calibrate, text_rows
from hymba.schemes import SCHEMES, Scheme
from hymba.tokenizer import Tokenizer
from hymba.train.data import find
from hymba.train.sources import key_of
from hymba.weights import load, save

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("hymba", "samba", "mamba", "mamba-mlp", "llama")
RECALL = ("hymba", "llama", "mamba-own-dt")  # Mamba learns it from its authors' start only
PARTS = ("schemes", "kinds", "states", "recall")
KINDS = {
    "in_proj": ("in_proj.weight",),
    "out_proj": ("out_proj.weight",),
    "gate_proj, up_proj": ("gate_proj.weight", "up_proj.weight"),
    "down_proj": ("down_proj.weight",),
    "x_proj": ("x_proj.weight",),
    "dt_proj": ("dt_proj.weight",),
    "embedding and head": ("embed_tokens.weight", "lm_head.weight"),
    "conv": ("conv.weight",),
    "A_log": ("A_log",),
    "D": (".D",),
    "meta tokens": ("meta_tokens.weight",),
}
MARKS = ("<!-- from results/, by bench/quality.py -->", "<!-- end of the tables -->")
Change = Callable[[Cache], None]


# Rounded models, in float32: what is measured is the weights, not a kernel


@torch.no_grad()
def with_rounded(model: LanguageModel, endings: tuple[str, ...], scheme: Scheme) -> Tensor | None:
    """Round weights of one kind where they are; None if the model has none, else how many."""
    ours = [p for name, p in model.named_parameters() if name.endswith(endings)]
    for weight in ours:
        flat = weight.view(len(weight), -1) if weight.dim() > 1 else weight[None]
        weight.copy_(dequantize(quantize(flat, scheme)).view_as(weight))
    return torch.tensor(sum(p.numel() for p in ours)) if ours else None


@torch.no_grad()
def widened(packed: LanguageModel) -> LanguageModel:
    """A packed model as one of float32 matrices."""
    wide = LanguageModel(packed.config)
    state = {k: v for k, v in packed.state_dict().items() if not k.endswith(".tiles")}
    for name, module in packed.named_modules():
        if hasattr(module, "tiles"):
            state[f"{name}.weight"] = dequantize(module.packed)
    wide.load_state_dict(state)
    return wide.eval()


def nearest(model: LanguageModel, scheme: str) -> LanguageModel:
    """As `hymba.load(..., quantize=scheme)`, of a model that is not in a folder."""
    packed = copy.deepcopy(model)
    schemes = plan(packed, SCHEMES[scheme])
    tiles = {x: packed_tiles(x, packed.get_submodule(x).weight, schemes[x]) for x in schemes}  # type: ignore[arg-type]
    make_room(packed, schemes, model.config.tie_embeddings)
    for name, found in tiles.items():
        packed.get_submodule(name).tiles.data = found
    return packed


def with_few_inputs(model: LanguageModel, scheme: str) -> LanguageModel:
    """Inputs of every projection rounded to 8 bits by groups, as a CPU's kernels do."""
    schemes = plan(model, SCHEMES[scheme])

    def round_inputs(module: nn.Module, args: tuple[Tensor, ...], size: int) -> tuple[Tensor]:
        x = args[0]
        missing = -x.shape[-1] % size
        groups = nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, size))
        return (in_int8(groups).flatten(-2)[..., : x.shape[-1]],)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = schemes[name].group
            module.register_forward_pre_hook(lambda m, a, size=size: round_inputs(m, a, size))
    return model


def in_int8(x: Tensor) -> Tensor:
    """x (..., G), rounded to 255 steps of its largest number."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(step == 0, 0, x / step).round() * step


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


# Decoding with rounded states


def rounding(
    states: Callable[[Tensor], Tensor] | None, kv: Callable[[Tensor], Tensor] | None
) -> Change:
    def change(cache: Cache) -> None:
        for ssm in filter(None, cache.ssm if states else []):
            ssm.ssm.copy_(states(ssm.ssm))  # type: ignore[misc]
        for store in filter(None, cache.kv if kv else []):
            store.k.copy_(kv(store.k))  # type: ignore[misc]
            store.v.copy_(kv(store.v))  # type: ignore[misc]

    return change


STATES = {
    "as trained": rounding(None, None),
    "SSM states bfloat16": rounding(in_bfloat16, None),
    "SSM states int8": rounding(in_int8, None),
    "SSM states zero": rounding(torch.zeros_like, None),  # what there is to lose
    "K/V bfloat16": rounding(None, in_bfloat16),
    "K/V int8": rounding(None, in_int8),
}


@torch.no_grad()
def decoded(model: LanguageModel, rows: Tensor, change: Change) -> Iterator[Tensor]:
    """rows (R, T), token by token through a cache that is changed after each: logits (R, V)."""
    count = len(rows)
    cache = model.new_cache(count)
    for at in range(rows.shape[1]):
        batch = Batch.of([1] * count, past=[at] * count)
        hidden = model(rows[:, at], batch, cache)
        change(cache)
        yield model.logits(hidden)


# Text


class Nats(NamedTuple):
    """Of every row (R,), and the bytes that all rows stand for."""

    each: Tensor
    size: int

    @property
    def bits(self) -> float:
        return float(self.each.sum()) / math.log(2) / self.size

    def more(self, than: Nats) -> list[float]:
        """How many bits a byte more, and the standard error of it."""
        gap = (self.each - than.each) / math.log(2) * len(self.each) / self.size
        return [float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))]


@dataclass
class Reader:
    """A language model and its held-out rows."""

    folder: Path
    count: int
    length: int
    calibration: tuple[int, int]  # rows, tokens

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_folder(self.folder)
        self.subject = Ours(self.model(), self.tokenizer)
        self.rows, _ = cut_rows(self.subject, documents(), self.length, self.count, seed=0)
        pen = Pen(self.tokenizer)
        self.size = sum(row_bytes(pen, row, [0, self.length - 1])[0] for row in self.rows)
        self.full = self.nats(self.model())

    def model(self, scheme: str | None = None) -> LanguageModel:
        return load(self.folder, dtype="float32", quantize=scheme)

    def nats(self, model: LanguageModel) -> Nats:
        self.subject.model = model
        said = self.subject.logprobs(self.rows, 8)
        return Nats(-torch.stack([row.double().sum() for row in said]), self.size)

    def decoded(self, change: Change) -> Nats:
        rows = torch.tensor(self.rows)
        total = torch.zeros(len(rows), dtype=torch.float64)
        for at, logits in enumerate(decoded(self.model(), rows[:, :-1], change), 1):
            said = logits.log_softmax(-1).gather(1, rows[:, at, None])[:, 0]
            total -= said.double()
        return Nats(total, self.size)

    @cached_property
    def seen(self) -> Tensor:
        """Rows that calibration reads, of files that are not held out."""
        texts = []
        for found in find("python-library").documents():
            key = key_of(found.text) if found.key is None else found.key
            if key >= HELD_OUT * 2.0**63:
                texts.append(found.text)
        return text_rows(self.tokenizer, texts, *self.calibration)

    def calibrated(self, scheme: str) -> LanguageModel:
        return calibrate(self.folder, scheme, self.seen)


def ways(
    full: Callable[[], LanguageModel], calibrated: Callable[[str], LanguageModel]
) -> Iterator[tuple[str, LanguageModel]]:
    """A model in every scheme, one after the other."""
    for scheme in SCHEMES:
        rounded = widened(nearest(full(), scheme))
        yield f"{scheme}, to nearest", rounded
        if SCHEMES[scheme].kind == "int":  # the others' inputs stay as they are
            yield f"{scheme}, to nearest, inputs int8", with_few_inputs(rounded, scheme)
        better = widened(calibrated(scheme))
        yield f"{scheme}, calibrated", better


def schemes_of_text(reader: Reader) -> dict[str, Any]:
    found: dict[str, Any] = {"bits per byte": reader.full.bits}
    for way, model in ways(reader.model, reader.calibrated):
        found[way] = reader.nats(model).more(reader.full)
    return found


def kinds_of_text(reader: Reader) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, endings in KINDS.items():
        for scheme in SCHEMES.values():
            model = reader.model()
            weights = with_rounded(model, endings, scheme)
            if weights is not None:
                more = reader.nats(model).more(reader.full)
                found.setdefault(kind, {"weights": int(weights)})[scheme.name] = more
    return found


def states_of_text(reader: Reader) -> dict[str, Any]:
    has = {"SSM": any(x.ssm for x in reader.model().config.layers)}
    has["K/V"] = any(x.attention for x in reader.model().config.layers)
    plain = reader.decoded(STATES["as trained"])
    wanted = {k: v for k, v in STATES.items() if has.get(k.split()[0])}
    return {state: reader.decoded(change).more(plain) for state, change in wanted.items()}


# Recall


@dataclass
class Pupil:
    """A model that was trained to recall pairs (`mqar`), as the laboratory's small ones are."""

    name: str
    folder: Path
    size: Size = field(default_factory=lambda: size_named("small"))
    task = "mqar"

    def model(self) -> LanguageModel:
        place = self.folder / self.task / self.name
        if not (place / "model" / "config.json").is_file():
            self._train(place)
        return load(place / "model", dtype="float32")

    def _train(self, place: Path) -> None:
        length, variant = self.size.recall.sequence_length, VARIANTS[self.name]
        config = variant.config(self.size.recall_shape, tasks.vocab_size(self.task, length))
        run, held_out = self.size.recall, self.size.held_out_tokens
        how = settings(place / "training", run, 0, "float32", variant.normalize, held_out)
        rows = recall.rows(self.task, self.size, 0)
        model = new_model(config, 0, Device("cpu"), variant.dt)
        trained = train(model, how, rows, None, None, lambda line: print("  ", line, flush=True))
        if trained is None:
            raise SystemExit(130)
        save(trained.model, place / "model")

    def calibrated(self, scheme: str) -> LanguageModel:
        rows = recall.rows(self.task, self.size, 0)
        some = [rows.row(number) for number in range(3 * 256)]
        whole = torch.stack([row.tokens for row in some if len(row.lengths) == 1])
        return calibrate(self.model(), scheme, whole)

    def score(self, model: LanguageModel) -> list[float]:
        """Recall as trained, and beyond."""
        trained = Trained(model, Path(), 0.0, 0.0)
        found = recall.measure(trained, self.task, self.size, Device("cpu"))
        return [found["recall"], found["beyond"]]

    def decoded(self, change: Change) -> list[float]:
        """The same, token by token."""
        found: dict[bool, list[float]] = {False: [], True: []}
        for point in tasks.LESSONS[self.task].test(self.size.recall.sequence_length):
            test = RecallRows((point.task,), seed=0, side="test")
            rows = [test.row(number) for number in range(self.size.test_rows)]
            tokens, labels = (
                torch.stack([getattr(r, x) for r in rows]) for x in ("tokens", "labels")
            )
            guesses = [x.argmax(-1) for x in decoded(self.model(), tokens, change)]
            right = (torch.stack(guesses, 1) == labels)[labels != IGNORE]
            found[point.beyond].append(float(right.double().mean()))
        return [sum(x) / len(x) for x in found.values()]


def recall_of(pupil: Pupil) -> dict[str, Any]:
    found: dict[str, Any] = {"as trained": pupil.score(pupil.model())}
    for way, model in ways(pupil.model, pupil.calibrated):
        found[way] = pupil.score(model)
    kinds: dict[str, Any] = {}
    for kind, endings in KINDS.items():
        model = pupil.model()
        if with_rounded(model, endings, SCHEMES["int4"]) is not None:
            kinds[kind] = pupil.score(model)
    layers = pupil.model().config.layers
    has = {"as": True, "SSM": any(x.ssm for x in layers), "K/V": any(x.attention for x in layers)}
    wanted = {k: v for k, v in STATES.items() if has[k.split()[0]]}
    states = {state: pupil.decoded(change) for state, change in wanted.items()}
    return found | {"int4 alone": kinds, "states": states}


# The report


def processor() -> str:
    """The first two words of its name: amd-epyc."""
    return "-".join(re.findall(r"[a-z0-9]+", facts(Device("cpu"))["device"].lower())[:2])


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Markdown, as docs/quantisation.md has it."""
    if text := report.get("text"):
        size = sum(text["bytes"].values()) / len(text["bytes"]) / 1000
        yield (
            f"{report['device']}, torch {report['torch']}, {report['date']}: {text['rows']} rows of"
            f" {text['length']} tokens, {size:.0f} kB, calibrated with"
            f" {report['calibration']['rows']} rows of {report['calibration']['length']}. Bits a"
            " byte more than as trained, in brackets the standard error."
        )
        yield ""
    if found := report.get("schemes"):
        names = list(next(iter(found.values())))
        yield row("", *found)
        yield row("---", *("---" for _ in found))
        yield row("bits per byte as trained", *(f"{x[names[0]]:.4f}" for x in found.values()))
        for name in names[1:]:
            yield row(name, *(signed(x[name]) for x in found.values()))
        yield ""
    if found := report.get("kinds"):
        measured = {x for kinds in found.values() for kind in kinds.values() for x in kind}
        for scheme in (x for x in reversed(SCHEMES) if x in measured):
            yield row(f"{scheme} alone", *found)
            yield row("---", *("---" for _ in found))
            for kind in KINDS:
                if any(kind in x for x in found.values()):
                    cells = (x.get(kind, {}).get(scheme) for x in found.values())
                    yield row(kind, *map(signed, cells))
            yield ""
    if found := report.get("states"):
        yield row("after every token", *found)
        yield row("---", *("---" for _ in found))
        for state in [*STATES][1:]:
            yield row(state, *(signed(x.get(state)) for x in found.values()))
        yield ""
    if found := report.get("recall"):
        yield from recall_tables(found)


def recall_tables(found: dict[str, Any]) -> Iterator[str]:
    yield row("recall, as trained / beyond", *found)
    yield row("---", *("---" for _ in found))
    first = next(iter(found.values()))
    for name in (x for x in first if x not in ("int4 alone", "states")):
        yield row(name, *(pair(x[name]) for x in found.values()))
    for kind in KINDS:
        if any(kind in x["int4 alone"] for x in found.values()):
            cells = (x["int4 alone"].get(kind) for x in found.values())
            yield row(f"{kind} alone in int4", *map(pair, cells))
    for state in STATES:
        cells = (x["states"].get(state) for x in found.values())
        name = "token by token" if state == "as trained" else state
        yield row(name, *map(pair, cells))


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def signed(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:+.4f} ({value[1]:.4f})"


def pair(value: list[float] | None) -> str:
    return "" if value is None else " / ".join(f"{x:.3f}" for x in value)


def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    path: Path = options.out
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not options.table:
        torch.set_num_threads(options.threads)
        report |= {"benchmark": "quality", **facts(Device("cpu"))}
        measure(options, report)
    text = "\n".join(tables(report)).strip()
    print(text)
    if options.document:
        page = options.document.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        page = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
        options.document.write_text(page, encoding="utf-8")


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Part by part, the file written after each."""

    def keep(part: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        if part in options.only:
            print(f"{part}: {name}", flush=True)
            report.setdefault(part, {})[name] = make()
            write_json(options.out, report, indent=1)

    if set(options.only) - {"recall"}:
        sizes = report.get("text", {}).get("bytes", {})
        report["text"] = {"rows": options.rows, "length": options.length, "bytes": sizes}
        report["calibration"] = {"rows": options.calibration[0], "length": options.calibration[1]}
        for name in options.models:
            folder = options.lab_models / name
            reader = Reader(folder, options.rows, options.length, tuple(options.calibration))
            report["text"]["bytes"][name] = reader.size
            keep("schemes", name, lambda r=reader: schemes_of_text(r))  # type: ignore[misc]
            keep("kinds", name, lambda r=reader: kinds_of_text(r))  # type: ignore[misc]
            keep("states", name, lambda r=reader: states_of_text(r))  # type: ignore[misc]
    for name in RECALL:
        keep("recall", name, lambda n=name: recall_of(Pupil(n, options.runs)))  # type: ignore[misc]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, default=256, help="of held-out text (256)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    parser.add_argument("--calibration", type=int, nargs=2, default=[128, 512], metavar="N",
                        help="rows and their tokens (128 512)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lab-models", type=Path, default=ROOT / "results" / "lab-models")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the file")
    parser.add_argument("--document", type=Path, help="a page whose tables are replaced")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / f"quality-{processor()}.json"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
