#!/usr/bin/env python3
"""Where the time of a CPU training step and of a prefill goes: scan, convolution, attention, ...

The doors `hymba.ops.*` and `F.linear` get a clock, forward and backward, so the parts are wall
time of the real model and add up to the whole. Weights and tokens are random: this measures time,
in float32, as medians over interleaved repetitions. Every op is first compared with its reference
twin, and without agreement no speed is printed. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import __version__, ops
from hymba.commands import choose_threads
from hymba.config import Config
from hymba.model.accounting import parameters
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops import Meta, Segments
from hymba.ops.attention import attention_reference
from hymba.ops.conv import causal_conv_reference
from hymba.ops.loss import linear_cross_entropy_reference
from hymba.ops.scan import selective_scan_reference
from hymba.presets import hymba
from hymba.recipes import demo

EXAMPLES = """examples:
  python bench/cpu.py                              both models
  python bench/cpu.py --only demo --reps 15        one of them, more repetitions
  python bench/cpu.py --threads 4 --json results/cpu-my-machine.json
"""

# part: the doors whose time it is
DOORS: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "scan": ((ops, "selective_scan"),),
    "conv": ((ops, "causal_conv"),),
    "attention": ((ops, "attention"),),
    "norms": ((ops, "rms_norm"), (ops, "fuse_heads")),
    "matmuls": ((F, "linear"),),
    "loss": ((ops, "linear_cross_entropy"),),
}


# The clock


class Clock:
    """Seconds by part. Within an open part others do not count again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(DOORS, 0.0)
        self.open: list[tuple[str, float]] = []

    def start(self, part: str) -> None:
        self.open.append((part, time.perf_counter()))

    def stop(self, part: str) -> None:
        opened, begin = self.open.pop()
        assert opened == part, f"{part} ended within {opened}"
        if not self.open:
            self.seconds[part] += time.perf_counter() - begin


class _Mark(torch.autograd.Function):
    """Nothing, but its backward calls `then`. Around an op's outputs that is when its backward
    begins; around its inputs it waits for all their gradients, so that is when it ends."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.then()
        return None, *grads


def mark(value: Any, then: Callable[[], None]) -> Any:
    """One mark on all tensors with gradients in nested tuples, lists and dicts."""
    found: list[Tensor] = []

    def walk(value: Any, visit: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return visit(value) if value.requires_grad else value
        if isinstance(value, dict):
            return {key: walk(x, visit) for key, x in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [walk(x, visit) for x in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def collect(x: Tensor) -> Tensor:
        found.append(x)
        return x

    walk(value, collect)
    if not found or not torch.is_grad_enabled():
        return value
    marked = iter(_Mark.apply(then, *found))
    return walk(value, lambda _: next(marked))


@contextmanager
def clocked() -> Iterator[Clock]:
    """Every door with a clock, until the end of the block."""
    clock = Clock()
    plain = {(home, name): getattr(home, name) for doors in DOORS.values() for home, name in doors}
    for part, doors in DOORS.items():
        for home, name in doors:
            setattr(home, name, _timed(plain[home, name], part, clock))
    try:
        yield clock
    finally:
        for (home, name), door in plain.items():
            setattr(home, name, door)


def _timed(door: Callable[..., Any], part: str, clock: Clock) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = mark((args, kwargs), lambda: clock.stop(part))
        clock.start(part)
        out = door(*args, **kwargs)
        clock.stop(part)
        return mark(out, lambda: clock.start(part))

    return call


# What is measured


class Run(NamedTuple):
    model: str
    what: str  # "train" or "prefill"
    rows: int
    tokens: int  # of each row
    once: Callable[[], dict[str, float]]  # seconds by part, with "total"


def configs() -> dict[str, Config]:
    """The demo's model, one with the usual 16 states, and one global and one window layer of the
    1.5B with a small vocabulary, so that layers are what is seen."""
    sizes: dict[str, Any] = {"vocab_size": 4096, "meta_tokens": 16, "window": 64}
    layers: dict[str, Any] = {"num_layers": 2, "global_layers": (0,), "vocab_size": 512}
    return {
        "demo": demo.hybrid(),
        "demo-wide": hymba(
            hidden_size=192,
            num_layers=7,
            num_heads=6,
            num_kv_heads=2,
            intermediate_size=512,
            **sizes,
        ),
        "1.5b-layers": hymba(
            hidden_size=1600, num_heads=25, num_kv_heads=5, intermediate_size=5504, **layers
        ),
    }


def runs(name: str, config: Config) -> list[Run]:
    model = LanguageModel(config).init_weights(0)
    rows, lengths = (8, (256, 512)) if name.startswith("demo") else (1, (512, 512, 2048))
    train = Run(name, "train", rows, lengths[0], _training(model, rows, lengths[0]))
    return [train, *(Run(name, "prefill", 1, n, _prefill(model, n)) for n in lengths[1:])]


def _training(model: LanguageModel, rows: int, length: int) -> Callable[[], dict[str, float]]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (rows * length,))
    batch = Batch.of((length,) * rows)

    def once() -> dict[str, float]:
        with clocked() as clock:
            begin = time.perf_counter()
            model.loss(model(ids, batch), ids).backward()
            middle = time.perf_counter()
            optimiser.step()
            optimiser.zero_grad()
            end = time.perf_counter()
        return clock.seconds | {"optimiser": end - middle, "total": end - begin}

    return once


def _prefill(model: LanguageModel, length: int) -> Callable[[], dict[str, float]]:
    ids = torch.randint(0, model.config.vocab_size, (length,))
    batch = Batch.of((length,))

    def once() -> dict[str, float]:
        cache = model.new_cache(1)
        with clocked() as clock, torch.no_grad():
            begin = time.perf_counter()
            model.logits(model(ids, batch, cache)[-1:])
            end = time.perf_counter()
        return clock.seconds | {"total": end - begin}

    return once


def measure(runs: list[Run], reps: int) -> list[list[dict[str, float]]]:
    """All runs in turn, `reps` times over, after one that does not count."""
    found: list[list[dict[str, float]]] = [[] for _ in runs]
    for rep in range(reps + 1):
        for run, seconds in zip(runs, found, strict=True):
            once = run.once()
            if rep:
                once["rest"] = 2 * once["total"] - sum(once.values())
                seconds.append(once)
    return found


def summary(run: Run, config: Config, seconds: list[dict[str, float]]) -> dict[str, Any]:
    ms = {part: 1e3 * statistics.median(s[part] for s in seconds) for part in seconds[0]}
    total, tokens = ms.pop("total"), run.rows * run.tokens
    layers = sum(layer.ssm for layer in config.layers)
    elements = tokens * layers * config.inner_size * config.ssm_state
    return {
        "model": run.model,
        "what": run.what,
        "rows": run.rows,
        "tokens": run.tokens,
        "parameters": parameters(config)["total"],
        "ms": round(total, 2),
        "fastest_ms": round(1e3 * min(s["total"] for s in seconds), 2),
        "tokens_per_second": round(1e3 * tokens / total, 1),
        "scan_ns_per_element": round(1e6 * ms["scan"] / elements, 3),
        "ms_by_part": {part: round(x, 2) for part, x in ms.items()},
        "share_by_part": {part: round(x / total, 4) for part, x in ms.items()},
    }


# Checks


def check() -> list[str]:
    """The ops that do not agree with their reference twins in float64, gradients included."""
    segments = Segments((70, 1, 33, 64))
    n, e, states = segments.total, 24, 5
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    labels, meta = torch.randint(0, 50, (n,)), (random(3, 2, 8), random(3, 2, 8))
    decay = (-torch.rand(e, states, dtype=torch.float64) * 16).requires_grad_()
    scan = [random(n, e), random(n, e), decay, random(n, states), random(n, states)]
    scan += [random(e), random(n, e), random(e), random(4, e, states)]
    qkv = [random(n, 4, 8), random(n, 2, 8), random(n, 2, 8), *meta]
    conv = [random(n, e), random(e, 4), random(e), random(4, 3, e)]
    head = [random(n, e), random(50, e)]
    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = {
        "scan": (
            lambda *t: ops.selective_scan(*t[:8], segments, t[8]),
            lambda *t: selective_scan_reference(*t[:8], segments, t[8]),
            scan,
        ),
        "conv": (
            lambda *t: ops.causal_conv(*t[:3], segments, t[3]),
            lambda *t: causal_conv_reference(*t[:3], segments, t[3]),
            conv,
        ),
        "attention": (
            lambda *t: ops.attention(*t[:3], segments, 16, Meta(*t[3:])),
            lambda *t: attention_reference(*t[:3], segments, 16, Meta(*t[3:])),
            qkv,
        ),
        "loss": (
            lambda *t: ops.linear_cross_entropy(*t, labels),
            lambda *t: linear_cross_entropy_reference(*t, labels),
            head,
        ),
    }
    return [name for name, case in cases.items() if not _agree(*case)]


def _agree(op: Callable[..., Any], twin: Callable[..., Any], inputs: list[Tensor]) -> bool:
    found = []
    for f in (op, twin):
        out = f(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        loss = torch.stack([x.sin().sum() for x in outs]).sum()
        found.append([*outs, *torch.autograd.grad(loss, inputs)])
    pairs = zip(*found, strict=True)
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in pairs)


# What is printed


def cpu_name() -> str:
    """As Linux says it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(results: list[dict[str, Any]]) -> str:
    parts = [*DOORS, "optimiser", "rest"]
    head = f"{'model':12} {'what':18} {'ms':>8} {'tok/s':>8} {'scan ns':>8}"
    lines = [head + "".join(f"{part:>10}" for part in parts)]
    for r in results:
        what = f"{r['what']} {r['rows']} x {r['tokens']}"
        line = f"{r['model']:12} {what:18} {r['ms']:8.1f} {r['tokens_per_second']:8.0f}"
        line += f" {r['scan_ns_per_element']:8.2f}"
        shares = r["share_by_part"]
        cells = (f"{shares[part]:>10.1%}" if part in shares else f"{'-':>10}" for part in parts)
        lines.append(line + "".join(cells))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "benchmark": "cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hymba": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "dtype": "float32",
    }


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*configs()], help="one model; without it all")
    parser.add_argument("--reps", type=int, default=7, help="repetitions (7)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: half the cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args(argv)
    if options.reps < 1:
        parser.error("--reps must be 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    choose_threads(options.threads)
    wrong = check()
    if wrong:
        print(f"no speeds: {', '.join(wrong)} differ from the reference", file=sys.stderr)
        return 1
    report = machine() | {"reps": options.reps, "checked": ["scan", "conv", "attention", "loss"]}
    results = []
    for name, config in configs().items():
        if options.only in (None, name):
            todo = runs(name, config)
            for run, seconds in zip(todo, measure(todo, options.reps), strict=True):
                results.append(summary(run, config, seconds))
    report["results"] = results
    print(f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}")
    print(table(results))
    line = json.dumps(report)
    print(line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
