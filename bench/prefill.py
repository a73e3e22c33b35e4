#!/usr/bin/env python3
"""A prompt through the 1.5B model on one GPU: milliseconds, tokens a second, and MFU.

One sequence of 8192 tokens through an empty cache in bfloat16, without gradients, logits of the
last row: as written, with compiled blocks, and as one CUDA graph (what is left when the host costs
nothing; no cache is written there, because that copies what only the host knows). MFU is forward's
FLOPs (hymba/model/accounting.py) over time, over the matrix rate measured in the same run. For the
record, what one decoded token takes behind that prompt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from bench import gpu
from bench.gpu import Stopwatch, attempt, relative_error, rounded
from bench.model import (
    TOLERANCE,
    add_model,
    breakdown,
    build,
    compiled,
    config_of,
    difference,
    largest_lines,
    parts_line,
    speed,
    speed_line,
)
from hymba.model.accounting import forward_flops
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

EXAMPLES = """examples:
  python -m bench.prefill
  python -m bench.prefill --compile --tokens 32768
"""


class Prefill:
    def __init__(self, options: argparse.Namespace):
        self.config, self.tokens = config_of(options), options.tokens
        self.model: LanguageModel = build(self.config).eval()
        self.ids = torch.randint(1, self.config.vocab_size, (self.tokens,), device="cuda")
        self.batch = Batch.of((self.tokens,), device="cuda")
        self.flops = forward_flops(self.config, self.tokens, logits=1)
        self.cache: Any = self.model.new_cache(1)

    @torch.no_grad()
    def through_cache(self) -> torch.Tensor:
        self.cache.reset(0)
        return self.model.logits(self.model(self.ids, self.batch, self.cache)[-1:])

    @torch.no_grad()
    def without_cache(self) -> torch.Tensor:
        return self.model.logits(self.model(self.ids, self.batch)[-1:])

    def graph(self) -> tuple[Callable[[], None], torch.Tensor]:
        """(replay, where the logits will be)."""
        with self.constant_meta():
            return captured(self.without_cache)

    @contextmanager
    def constant_meta(self) -> Any:
        """What the meta tokens leave, without the look whether a weight has changed."""
        constants = self.model.decoder.meta_states()
        self.model.decoder.meta_states = lambda: constants
        try:
            yield
        finally:
            del self.model.decoder.meta_states

    @torch.no_grad()
    def decode_ms(self, steps: int = 32) -> float:
        """Eager milliseconds a token at batch 1, the host included."""
        token = self.through_cache().argmax(-1)

        def run(first: int, count: int) -> None:
            nonlocal token
            for past in range(first, first + count):
                batch = Batch.of((1,), past=(past,), device="cuda")
                token = self.model.logits(self.model(token, batch, self.cache)).argmax(-1)
            torch.cuda.synchronize()

        run(self.tokens, 8)
        begin = time.perf_counter()
        run(self.tokens + 8, steps)
        return rounded(1e3 * (time.perf_counter() - begin) / steps)


def captured(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    held = []

    def once() -> None:
        held[:] = [work()]

    replay = gpu.graphed(once)
    return replay, held[0]


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/prefill.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt (8192)")
    gpu.add_json(parser, "prefill")
    options = parser.parse_args(argv)
    if options.tokens < 1 or options.layers < 0:
        parser.error("--tokens must be 1 or more, --layers 0 or more")
    return options


class Rows:
    """Measures, prints and keeps one row."""

    def __init__(self, prefill: Prefill, report: gpu.Report, watch: Stopwatch, matrix_rate: float):
        self.prefill, self.report, self.watch = prefill, report, watch
        self.matrix_rate = matrix_rate

    def add(self, name: str, work: Callable[[], Any], explain: bool = True) -> None:
        timing = self.watch.time(work, flush=False)
        prefill = self.prefill
        row: dict[str, Any] = {"name": name}
        row |= speed(prefill.flops, prefill.tokens, timing.ms, timing.spread, self.matrix_rate)
        print(speed_line(row, self.matrix_rate), flush=True)
        if explain:
            found = attempt(f"{name}, breakdown", lambda: breakdown(work))
            if found is not None:
                row["breakdown"] = found
                print(parts_line(found) + "\n" + largest_lines(found), flush=True)
        self.report.add(row)


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/prefill.py")
    from bench.ceilings import ceilings

    torch.manual_seed(0)
    watch = Stopwatch(0.5)
    limits = ceilings(Stopwatch(0.1))
    report = gpu.Report(gpu.json_path(options, "prefill"), gpu.machine("prefill"))
    prefill = Prefill(options)
    report.put(
        ceilings={k: rounded(v) for k, v in limits.items()},
        model=options.preset,
        layers=prefill.config.num_layers,
        tokens=options.tokens,
        useful_flops=prefill.flops,
    )
    print(gpu.headline(report.data))
    print(
        f"{options.preset}, {prefill.config.num_layers} layers, 1 x {options.tokens} tokens, "
        f"useful {prefill.flops / 1e12:.1f} TFLOP",
        flush=True,
    )
    with torch.no_grad():
        off = attempt("check against plain PyTorch", lambda: difference(prefill.model))
    report.put(difference_from_plain=off)
    if off is None or off > TOLERANCE:
        print(f"hidden states differ from plain PyTorch's by {off}: no speed", file=sys.stderr)
        return 1
    measure(options, prefill, Rows(prefill, report, watch, limits["matrix_flops_per_s"]))
    report.put(clocks=gpu.clocks())
    print(f"hidden states differ from plain PyTorch's by {off}\nwritten: {report.path}")
    return 0


def measure(options: argparse.Namespace, prefill: Prefill, rows: Rows) -> None:
    attempt("as written", lambda: rows.add("as written", prefill.through_cache))
    attempt("CUDA graph", lambda: graph_row(prefill, rows))
    new_cache = attempt("new cache", lambda: rows.watch.time(lambda: prefill.model.new_cache(1)))
    decode = attempt("decode", prefill.decode_ms)
    rows.report.put(
        decode_ms_eager=decode, new_cache_ms=rounded(new_cache.ms) if new_cache else None
    )
    print(f"one decoded token, eager, batch 1: {decode} ms; a new cache "
          f"{rows.report.data['new_cache_ms']} ms", flush=True)  # fmt: skip
    if options.compile:
        compiled(prefill.model)
        attempt("compiled", lambda: rows.add("compiled blocks", prefill.through_cache))
        attempt("compiled graph", lambda: graph_row(prefill, rows, "compiled blocks, "))
        compiled(prefill.model, False)


def graph_row(prefill: Prefill, rows: Rows, prefix: str = "") -> None:
    """A graph of the forward alone: committing to the cache copies from the host, which cannot be
    captured; those copies are the last of a forward and small."""
    want = prefill.through_cache()
    replay, logits = prefill.graph()
    replay()
    torch.cuda.synchronize()
    off = relative_error(logits, want)
    if not off <= TOLERANCE:
        raise ValueError(f"the graph's logits differ by {off:.1e}, so no speed")
    rows.add(prefix + "CUDA graph, no cache written", replay, explain=False)


if __name__ == "__main__":
    sys.exit(main())
