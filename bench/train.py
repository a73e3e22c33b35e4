#!/usr/bin/env python3
"""A training step of the 1.5B model on one GPU: milliseconds, tokens a second, and MFU.

Forward and backward of packed rows in bfloat16, each row a document, with the loss through the
chunked head. MFU is 3 times forward's FLOPs (hymba/model/accounting.py: the keys that are really
seen; what checkpointing computes again does not count) over time, over the matrix rate measured in
the same run. The optimiser is timed apart. Then the same model with the released stack's kernels:
mamba-ssm's scan (from its source package), FlexAttention, plain PyTorch for the rest.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from bench import gpu
from bench.gpu import Stopwatch, attempt, rounded
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
from bench.peers import released, replaced
from hymba.model.accounting import forward_flops, parameters
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

EXAMPLES = """examples:
  python -m bench.train                                 ours, as written
  python -m bench.train --compile --checkpoint          blocks compiled; activations made again
  python -m bench.train --mamba-ssm mamba_ssm-2.3.2.tar.gz    and the released stack
  python -m bench.train --layers 8 --rows 4             smaller
"""
VARIANTS = ("ours", "released", "exchanged")


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *args, use_reentrant=False)


class Training:
    def __init__(self, options: argparse.Namespace):
        self.options, self.config = options, config_of(options)
        rows, length = options.rows, options.length
        self.model: LanguageModel = build(self.config)
        self.ids = torch.randint(1, self.config.vocab_size, (rows * length,), device="cuda")
        self.labels = self.ids.roll(-1)
        self.labels[length - 1 :: length] = -100  # the next token is another row's
        self.batch = Batch.of((length,) * rows, device="cuda")
        self.flops = 3 * rows * forward_flops(self.config, length)

    def step(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.model.loss(self.model(self.ids, self.batch), self.labels)
        loss.backward()
        return loss.detach()

    def head(self) -> Callable[[], Any]:
        """Only the loss from hidden states, and its gradients."""
        hidden = torch.randn(len(self.ids), self.config.hidden_size, device="cuda")
        hidden = hidden.to(self.model.dtype).requires_grad_()
        weight = self.model.lm_head.weight

        def work() -> Any:
            return torch.autograd.grad(self.model.loss(hidden, self.labels), (hidden, weight))

        return work

    def measure(self, name: str, watch: Stopwatch, matrix_rate: float) -> dict[str, Any]:
        gc.collect()
        torch.cuda.empty_cache()
        loss = float(self.step())
        torch.cuda.reset_peak_memory_stats()
        timing = watch.time(self.step, flush=False)
        peak = torch.cuda.max_memory_allocated()
        row: dict[str, Any] = {"name": name}
        row |= speed(self.flops, len(self.ids), timing.ms, timing.spread, matrix_rate)
        row |= {"peak_gib": rounded(peak / 2**30), "loss": rounded(loss, 6)}
        print(
            f"{speed_line(row, matrix_rate)}  {row['peak_gib']:.1f} GiB  loss {loss:.4f}",
            flush=True,
        )
        return row

    def explain(self, row: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        row["head_ms"] = rounded(watch.time(self.head()).ms)
        row["breakdown"] = breakdown(self.step)
        print(parts_line(row["breakdown"]) + f"; the head alone {row['head_ms']:.1f}", flush=True)
        return row

    def optimiser(self, watch: Stopwatch) -> float:
        """Milliseconds of one fused AdamW step, states in the weights' dtype."""
        self.step()
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        return rounded(watch.time(optimiser.step, flush=False).ms)


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/train.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--rows", type=int, default=8, help="documents in a step (8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (2048)")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again")
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help="some of ours, released (the whole stack), exchanged (its scan and attention only)",
    )
    gpu.add_source(parser)
    gpu.add_json(parser, "train")
    options = parser.parse_args(argv)
    options.variants = options.variants.split(",")
    if set(options.variants) - set(VARIANTS):
        parser.error(f"--variants: there are {', '.join(VARIANTS)}")
    if min(options.rows, options.length) < 1 or options.layers < 0:
        parser.error("--rows and --length must be 1 or more, --layers 0 or more")
    return options


def doors_of(variant: str, source: Any) -> Any:
    """What runs in place of the ops of the door."""
    if variant == "ours":
        return nullcontext()
    from bench import mamba

    return replaced(released(mamba.load(source), elementwise=variant == "released"))


class Variant(NamedTuple):
    name: str
    compiled: bool
    checkpoint: bool

    @property
    def title(self) -> str:
        names = {"released": "released stack", "exchanged": "ours with its scan and attention"}
        title = names.get(self.name, self.name)
        title += ", compiled" if self.compiled else ""
        return title + (", checkpointed" if self.checkpoint else "")


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/train.py")
    from bench import mamba
    from bench.ceilings import ceilings

    ahead = None
    if options.mamba_ssm and set(options.variants) - {"ours"}:
        ahead = mamba.Build(options.mamba_ssm)
    torch.manual_seed(0)
    watch = Stopwatch(1.0)
    limits = ceilings(Stopwatch(0.1))
    report = gpu.Report(gpu.json_path(options, "train"), gpu.machine("train"))
    training = Training(options)
    report.put(
        ceilings={k: rounded(v) for k, v in limits.items()},
        model=options.preset,
        layers=training.config.num_layers,
        parameters=parameters(training.config)["total"],
        rows=options.rows,
        length=options.length,
        checkpoint=options.checkpoint,
        useful_flops=training.flops,
    )
    print(gpu.headline(report.data))
    print(
        f"{options.preset}, {training.config.num_layers} layers, {options.rows} x "
        f"{options.length} tokens, useful {training.flops / 1e12:.1f} TFLOP a step",
        flush=True,
    )
    off = attempt("check against plain PyTorch", lambda: difference(training.model))
    report.put(difference_from_plain=off)
    if off is None or off > TOLERANCE:
        print(f"hidden states differ from plain PyTorch's by {off}: no speed", file=sys.stderr)
        return 1
    report.put(optimiser_ms=attempt("optimiser", lambda: training.optimiser(watch)))
    rest = training, watch, limits, report
    kernels = None if ahead is None else attempt("mamba-ssm", ahead.kernels)
    report.put(mamba_ssm=None if kernels is None else mamba.version(options.mamba_ssm))
    for variant in options.variants:
        if variant != "ours" and kernels is None:
            print(f"{variant}: needs mamba-ssm's source package: --mamba-ssm or MAMBA_SSM_SOURCE")
            continue
        for fused in (False, True) if options.compile else (False,):
            run = Variant(variant, fused, options.checkpoint)
            attempt(run.title, lambda: fitting(run, *rest))  # noqa: B023
    if any(row["checkpoint"] for row in report.data.get("results", [])) and not options.checkpoint:
        run = Variant("ours", False, True)  # beside a peer that had to be
        attempt(run.title, lambda: one(run, *rest))
    report.put(clocks=gpu.clocks())
    print(f"AdamW (fused) {report.data['optimiser_ms']} ms; hidden states differ from plain "
          f"PyTorch's by {off}\nwritten: {report.path}")  # fmt: skip
    return 0


def fitting(run: Variant, *rest: Any) -> None:
    """As asked for, or with checkpointing where the memory is too small."""
    try:
        return one(run, *rest)
    except torch.OutOfMemoryError:
        if run.checkpoint:
            raise
    # Not within the except: the exception holds what filled the memory.
    print(f"{run.title}: out of memory; once more with checkpointing", flush=True)
    one(run._replace(checkpoint=True), *rest)


def one(
    run: Variant,
    training: Training,
    watch: Stopwatch,
    limits: dict[str, float],
    report: gpu.Report,
) -> None:
    model = training.model
    with doors_of(run.name, training.options.mamba_ssm):
        try:
            compiled(model, run.compiled)
            model.decoder.checkpoint_blocks = checkpointed if run.checkpoint else None
            row = training.measure(run.title, watch, limits["matrix_flops_per_s"])
            row |= {"variant": run.name, "compiled": run.compiled, "checkpoint": run.checkpoint}
            attempt(f"{run.title}, breakdown", lambda: training.explain(row, watch))
            if "breakdown" in row and run.name == "ours":
                print(largest_lines(row["breakdown"]), flush=True)
            report.add(row)
        finally:
            compiled(model, False)
            model.decoder.checkpoint_blocks = None
            model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
