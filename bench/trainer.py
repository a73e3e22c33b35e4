#!/usr/bin/env python3
"""What `hymba train` does in a second, by length of the rows, beside an attention-only twin.

The Trainer itself: float32 weights, activations in bfloat16, clipping, fused AdamW, random tokens,
one document a row. The twin is a Llama plan of the same width and depth, fitted to as many
parameters by its MLP. A step has the same number of tokens at every length. MFU is useful work
(what is computed again to save memory does not count) over the matrix rate of the same run.

Several GPUs: torchrun --nproc-per-node 2 -m bench.trainer, once with as many tokens a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import gpu
from bench.gpu import attempt, rounded
from hymba.config import Config
from hymba.model.accounting import fit, parameters
from hymba.model.decoder import LanguageModel
from hymba.presets import llama
from hymba.train import TrainConfig, Trainer
from hymba.train.metrics import matrix_rate, step_flops
from hymba.train.parallel import World, join
from hymba.train.rows import Packed

EXAMPLES = """examples:
  python -m bench.trainer
  python -m bench.trainer --presets hymba-350m --lengths 2048,8192 --plans hymba
  torchrun --nproc-per-node 2 -m bench.trainer --presets hymba-1.5b --lengths 2048 --plans hymba
"""
PLANS = ("hymba", "llama")


@dataclass(frozen=True)
class RandomRows:
    """Rows of random tokens, a document each."""

    vocab_size: int
    sequence_length: int
    bytes_per_label: None = None

    def row(self, number: int) -> Packed:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, self.vocab_size, (self.sequence_length + 1,), generator=generator)
        return Packed(ids[:-1], ids[1:], (self.sequence_length,))

    @property
    def identity(self) -> dict[str, Any]:
        return {"sequence_length": self.sequence_length}

    def epochs(self, rows: int) -> float:
        return 0.0


def twin(config: Config) -> Config:
    """Attention alone, as wide, as deep and as large, and with the same number of heads."""

    def plan(width: int) -> Config:
        return llama(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            vocab_size=config.vocab_size,
            intermediate_size=width,
            max_positions=config.max_positions,
        )

    return fit(plan, parameters(config)["total"])


def plan_of(preset: str, plan: str, layers: int) -> Config:
    config = Config.preset(preset)
    config = config.replace(layers=config.layers[: layers or config.num_layers])
    return config if plan == "hymba" else twin(config)


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    preset: str
    plan: str
    length: int
    tokens: int
    """A step of one GPU."""
    micro_tokens: int
    recompute: bool = False

    def settings(self, folder: str, processes: int) -> TrainConfig:
        return TrainConfig(
            Path(folder),
            steps=10**6,
            rows=processes * self.tokens // self.length,
            micro_rows=max(1, self.micro_tokens // self.length),
            sequence_length=self.length,
            precision="bfloat16",
            recompute=self.recompute,
            resume="never",
        )

    def measure(
        self, config: Config, options: argparse.Namespace, world: World, device: torch.device
    ) -> dict[str, Any]:
        """Median wall time of a step; the Trainer waits for the device at the end of each."""
        torch.cuda.empty_cache()
        with torch.device(device):
            model = LanguageModel(config).init_weights(seed=0)
        with tempfile.TemporaryDirectory() as folder:
            settings = self.settings(folder, world.size)
            rows = RandomRows(config.vocab_size, self.length)
            trainer = Trainer(model.train(), settings, rows, None, lambda _: None, world)
            seconds = []
            for step in range(options.warmup + options.steps):
                if step == options.warmup:
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                record = trainer._one_step()
                seconds.append(time.perf_counter() - began)
        took = statistics.median(seconds[options.warmup :])
        flops = step_flops(config, [self.length] * (self.tokens // self.length))
        return {
            "preset": self.preset,
            "plan": self.plan,
            "parameters": parameters(config)["total"],
            "length": self.length,
            "processes": world.size,
            "tokens": world.size * self.tokens,
            "micro_tokens": min(self.tokens, max(self.micro_tokens, self.length)),
            "recompute": self.recompute,
            "ms": rounded(1e3 * took),
            "spread": rounded((max(seconds[options.warmup :]) - took) / took, 2),
            "tokens_per_s": round(world.size * self.tokens / took),
            "mfu": rounded(flops / took / options.rate),
            "peak_gib": rounded(torch.cuda.max_memory_allocated() / 2**30),
            "loss": rounded(record["loss"], 6),
        }


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/trainer.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--presets", default="hymba-350m,hymba-1.5b", help="both by default")
    parser.add_argument("--plans", default=",".join(PLANS), help="hymba, llama or both")
    parser.add_argument("--lengths", default="2048,8192,16384,32768", help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=65536, help="a step of one GPU (65536)")
    parser.add_argument("--micro-tokens", type=int, default=65536,
        help="at most so many at once; halved until they fit (65536)")  # fmt: skip
    parser.add_argument("--least", type=int, default=16384,
        help="with fewer at once, activations are computed again instead (16384)")  # fmt: skip
    parser.add_argument("--layers", type=int, default=0, help="only so many")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (2)")
    gpu.add_json(parser, "trainer")
    options = parser.parse_args(argv)
    options.presets, options.plans = options.presets.split(","), options.plans.split(",")
    if set(options.plans) - set(PLANS):
        parser.error(f"--plans: there are {', '.join(PLANS)}")
    if not all(length.isdigit() and int(length) for length in options.lengths.split(",")):
        parser.error("--lengths: whole numbers, with commas between them")
    options.lengths = [int(length) for length in options.lengths.split(",")]
    if any(options.tokens % length for length in options.lengths):
        parser.error(f"--tokens {options.tokens} must be whole rows of every length")
    if min(options.steps, options.warmup, options.least) < 1:
        parser.error("--steps, --warmup and --least must be 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/trainer.py")
    with join("cuda") as (world, device):
        options.rate = matrix_rate(device, torch.bfloat16)
        report = gpu.Report(gpu.json_path(options, "trainer"), gpu.machine("trainer"))
        report.data |= {"gpus": world.size, "matrix_flops_per_s": rounded(options.rate)}
        for preset in options.presets:
            for plan in options.plans:
                for length in options.lengths:
                    case = Case(preset, plan, length, options.tokens, options.micro_tokens)
                    one(case, options, world, device, report)
        if world.first:
            report.put(clocks=gpu.clocks())
            print(f"written: {report.path}")
    return 0


def tries(case: Case, least: int) -> Iterator[Case]:
    """Ever fewer tokens at once, at last with activations computed again."""
    least = max(least, case.length)
    while case.micro_tokens > least:
        yield case
        case = replace(case, micro_tokens=case.micro_tokens // 2)
    yield case
    yield replace(case, recompute=True)


def one(
    case: Case,
    options: argparse.Namespace,
    world: World,
    device: torch.device,
    report: gpu.Report,
) -> None:
    """A line of the results, with as many tokens at once as memory holds."""
    config = plan_of(case.preset, case.plan, options.layers)
    for each in tries(case, options.least):
        name = f"{case.preset}, {case.plan}, rows of {case.length}"
        row = attempt(name, lambda: each.measure(config, options, world, device))  # noqa: B023
        if row is not None:
            break
    if row is None or not world.first:
        return
    report.add(row)
    print(
        f"{name}: {row['ms']:.0f} ms, {row['tokens_per_s']:,} tokens/s, MFU {row['mfu']:.1%}, "
        f"{row['peak_gib']:.0f} GiB{', recomputed' if row['recompute'] else ''}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
