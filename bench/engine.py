#!/usr/bin/env python3
"""The engine on one GPU: time to first token, time per token, tokens a second, and how far that is
from the limit of the memory's bandwidth.

Random weights, bfloat16, SSM states in float32. Each sequence has a prompt of its own (nothing is
shared that a server would not share), computed by the engine, until all hold `--context` tokens;
then decode steps are timed through `Engine.step`, reading every token on the host, greedy. The
limit: bytes that a step cannot do without moving (`step_bytes` in hymba/model/accounting.py) over
the bandwidth that the same run measured. Layers that share K/V read them again, which the limit
does not count ("moved" does). "over" is the time above the limit, a layer: launches, latencies,
reductions, work that is not bytes.

Beside it: the llama-3.2-3b plan on the same engine, transformers' Llama of the same shape behind a
cache of the same length, the prompt's time against the plain forward, what sampling costs, and the
share of tokens that stay the same when a trained model's sequences share a batch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu
from bench.gpu import Stopwatch, attempt, rounded
from bench.model import breakdown, build, largest_lines, parts_line
from hymba.config import Config
from hymba.engine import Engine, Limits, Sampling
from hymba.model.accounting import cache_bytes, step_bytes
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.weights import load

EXAMPLES = """examples:
  python -m bench.engine
  python -m bench.engine --batches 1,128 --skip llama,transformers
  python -m bench.engine --trained runs/demo/hymba
"""
GROUPS, STEPS = 5, 16  # timed: so many groups of so many decode steps
WARM = 8
PARTS = ("hymba", "llama", "transformers", "prefill", "sampling", "agreement")
LLAMA = "llama-3.2-3b"


class Bench:
    def __init__(self, options: argparse.Namespace, report: gpu.Report, limits: dict[str, float]):
        self.options, self.report = options, report
        # Reading is what a decode step does most; a sum of 4 GiB and a copy tell how fast.
        self.bandwidth = max(limits["read_bytes_per_s"], limits["copy_bytes_per_s"])
        self.generator = torch.Generator().manual_seed(0)

    def prompt(self, model: LanguageModel, length: int) -> list[int]:
        size = model.config.vocab_size
        return torch.randint(3, size, (length,), generator=self.generator).tolist()

    def engine(self, model: LanguageModel, batch: int) -> Engine:
        """Room for `batch` sequences of the model's positions, and no more."""
        config = model.config
        held = cache_bytes(config, config.max_positions)["total"]
        room = int((batch + 2) * held * 1.02)
        return Engine(model, None, Limits(max_sequences=batch, cache_bytes=room, prefix_bytes=0))

    def fill(self, engine: Engine, batch: int, **sampling: Any) -> None:
        """Sequences that all hold `context` tokens in the end: the first of them have spoken while
        the others' prompts were computed."""
        context, steps = self.options.context, WARM + (GROUPS + 2) * STEPS
        left = batch
        for row in range(batch):
            ahead = batch - row
            how = Sampling(max_tokens=ahead + steps, stop_ids=(), **sampling)
            engine.add(self.prompt(engine.model, context - ahead), how)
        seen: set[Any] = set()
        while left > len(seen):
            seen.update(delta.request for delta in engine.step())

    def decode(self, name: str, model: LanguageModel, batch: int, **sampling: Any) -> None:
        engine = self.engine(model, batch)
        self.fill(engine, batch, **sampling)
        for _ in range(WARM):
            engine.step()
        times = [self.steps(engine, STEPS) / STEPS for _ in range(GROUPS)]
        row = self.row(name, model.config, batch, statistics.median(times))
        row["spread"] = rounded((max(times) - min(times)) / statistics.median(times), 2)
        parts = attempt("breakdown", lambda: breakdown(engine.step, runs=4))
        row |= {"sampling": sampling} if sampling else {}
        row["cache"] = self.cache(engine)
        print(self.line(row), flush=True)
        if parts is not None:
            row["breakdown"] = parts
            print(parts_line(parts) + "\n" + largest_lines(parts, 14), flush=True)
        self.report.add(row)

    def steps(self, engine: Engine, count: int) -> float:
        """Seconds of so many decode steps, the device's work at their end included."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            engine.step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def row(self, name: str, config: Config, batch: int, seconds: float) -> dict[str, Any]:
        tokens = self.options.context + WARM + GROUPS * STEPS // 2
        found = step_bytes(config, tokens, batch)
        limit = found["total"] / self.bandwidth
        return {
            "name": name,
            "batch": batch,
            "ms": rounded(1e3 * seconds),
            "tokens_per_s": round(batch / seconds),
            "limit_ms": rounded(1e3 * limit),
            "limit_tokens_per_s": round(batch / limit),
            "share": rounded(limit / seconds),
            "moved_share": rounded((found["total"] + found["again"]) / self.bandwidth / seconds),
            "over_us_per_layer": rounded(1e6 * (seconds - limit) / config.num_layers, 3),
            "bytes": found,
        }

    def line(self, row: dict[str, Any]) -> str:
        return (
            f"{row['name']:24} batch {row['batch']:4} {row['ms']:8.3f} ms ±{row['spread']:<4.0%}"
            f" {row['tokens_per_s']:7,} tok/s, {row['share']:.1%} of {row['limit_tokens_per_s']:,}"
            f" ({row['moved_share']:.1%} of all that moves),"
            f" {row['over_us_per_layer']} us a layer over the limit"
        )

    def cache(self, engine: Engine) -> dict[str, int]:
        """Bytes of a sequence as allocated, and those held once."""
        stats, count = engine.stats(), len(engine.scheduler.running)
        return {
            "per_sequence": stats.cache_bytes // max(1, count),
            "allocated": stats.cache_bytes_total,
            "meta_once": stats.meta_bytes,
        }

    # ---- the parts

    def hymba(self) -> None:
        model = self.model(self.options.preset)
        most = max(self.options.batches)
        physical = self.row(LLAMA, Config.preset(LLAMA), most, 1.0)["limit_tokens_per_s"]
        self.report.put(peer={"name": LLAMA, "batch": most, "limit_tokens_per_s": physical})
        for batch in self.options.batches:
            attempt(f"batch {batch}", lambda b=batch: self.decode(self.options.preset, model, b))
        for part, work in (("prefill", self.prefill), ("sampling", self.sampling)):
            if part not in self.options.skip:
                attempt(part, lambda work=work: work(model))

    def llama(self) -> None:
        model = self.model(LLAMA)
        for batch in self.options.llama_batches:
            attempt(f"llama, batch {batch}", lambda b=batch: self.decode(LLAMA, model, b))

    def model(self, preset: str) -> LanguageModel:
        config = Config.preset(preset)
        if config.max_positions > 2 * self.options.context:  # pages for what is never there
            config = config.replace(max_positions=self.options.context + 128)
        return build(config).eval()

    def prefill(self, model: LanguageModel) -> None:
        """A prompt of `context` tokens: to its first token through the engine, and the forward."""
        context = self.options.context
        engine, ids = self.engine(model, 1), torch.tensor(self.prompt(model, context)).cuda()
        batch, cache = Batch.of((context,), device="cuda"), model.new_cache(1)

        def first_token() -> None:
            engine.add(self.prompt(model, context), Sampling(max_tokens=1, stop_ids=()))
            while engine.busy:
                engine.step()

        @torch.no_grad()
        def plain() -> None:
            cache.reset(0)
            model.logits(model(ids, batch, cache)[-1:])

        ours, forward = medians_ms(first_token, plain)
        share = rounded(forward / ours)
        row = {"tokens": context, "first_token_ms": ours, "forward_ms": forward, "share": share}
        print(
            f"prompt of {context}: first token {ours} ms, forward alone {forward} ms: {share:.0%}"
        )
        self.report.put(prefill=row)

    def sampling(self, model: LanguageModel) -> None:
        """Decode steps that draw: temperature alone, and with top_p, which sorts."""
        batch = max(self.options.batches)
        for how in ({"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.95}):
            name = f"{self.options.preset}, drawn" + (", top_p" if "top_p" in how else "")
            self.decode(name, model, batch, seed=0, **how)

    def agreement(self) -> None:
        """The same seeds alone and in a batch, in a trained model and bfloat16: which share of the
        tokens is equal. (Random weights in 32 layers turn a rounding into another token.)"""
        model = load(self.options.trained, "cuda", "bfloat16").eval()
        prompts = [self.prompt(model, 16 + 7 * i) for i in range(16)]
        found = {}
        for name, heat in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            how = [
                Sampling(max_tokens=64, temperature=heat, seed=i, stop_ids=()) for i in range(16)
            ]
            together, one = answers(self.engine(model, 16), prompts, how), self.engine(model, 1)
            alone = [answers(one, [p], [s])[0] for p, s in zip(prompts, how, strict=True)]
            pairs = zip(together, alone, strict=True)
            found[name] = rounded(sum(equal(*pair) for pair in pairs) / (16 * 64), 3)
        print(f"bfloat16, same seeds alone and in a batch of 16, share of equal tokens: {found}")
        self.report.put(agreement=found | {"model": self.options.trained.name})

    def transformers(self) -> None:
        """Llama of the same shape in transformers, behind a filled cache."""
        config = Config.preset(LLAMA)
        for batch in self.options.transformers_batches:
            for static in (True, False) if batch == 1 else (False,):
                name = f"transformers, {'static' if static else 'dynamic'} cache"
                ms = attempt(name, lambda b=batch, s=static: theirs(config, self.options, b, s))
                if ms is not None:
                    row = self.row(name, config, batch, ms / 1e3) | {"spread": 0.0}
                    print(self.line(row), flush=True)
                    self.report.add(row)


def equal(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def answers(
    engine: Engine, prompts: Sequence[list[int]], samplings: Sequence[Sampling]
) -> list[list[int]]:
    requests = [engine.add(p, s) for p, s in zip(prompts, samplings, strict=True)]
    said: dict[Any, list[int]] = {request: [] for request in requests}
    while engine.busy:
        for delta in engine.step():
            said[delta.request] += delta.tokens
    return [said[request] for request in requests]


def medians_ms(*works: Callable[[], None], runs: int = 9) -> list[float]:
    """Of each, in turns, so that a host that is slow for a while is slow for all."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(runs + 2):
        for work, times in zip(works, found, strict=True):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
    return [rounded(statistics.median(times[2:])) for times in found]


@torch.no_grad()
def theirs(config: Config, options: argparse.Namespace, batch: int, static: bool) -> float:
    """ms of a decode step of transformers' Llama behind `context` random keys and values."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=options.context + 128,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape).bfloat16().eval()
    room = options.context + 128
    cache = StaticCache(config=shape, max_cache_len=room) if static else DynamicCache()
    heads = config.num_kv_heads, options.context, config.head_dim
    for layer in range(config.num_layers):
        k, v = (torch.randn(batch, *heads, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache.update(k, v, layer)
    ids = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    at = [options.context]

    def step() -> None:
        nonlocal ids
        position = torch.tensor([[at[0]]], device="cuda").expand(batch, 1)
        ids = model(ids, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
        at[0] += 1

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2 * STEPS):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / (2 * STEPS)


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part]
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 1,16,128")
    return found


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/engine.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="hymba-1.5b", help="the model (hymba-1.5b)")
    parser.add_argument("--context", type=int, default=8064, help="tokens in the cache (8064)")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64, 128], metavar="N,N")
    parser.add_argument("--llama-batches", type=numbers, default=[1, 16, 64], metavar="N,N")
    parser.add_argument("--transformers-batches", type=numbers, default=[1, 16], metavar="N,N")
    parser.add_argument(
        "--trained",
        type=Path,
        metavar="FOLDER",
        help="a trained model, for the share of equal tokens",
    )
    parser.add_argument(
        "--skip",
        type=lambda text: [part for part in text.split(",") if part],
        default=[],
        metavar="PART,PART",
        help=f"of {', '.join(PARTS)}",
    )
    gpu.add_json(parser, "engine")
    options = parser.parse_args(argv)
    unknown = set(options.skip) - set(PARTS)
    if unknown:
        parser.error(f"--skip {', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    if options.context < 2 * max(options.batches + options.llama_batches):
        parser.error("--context must be at least twice the largest batch")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/engine.py")
    from bench.ceilings import ceilings

    torch.manual_seed(0)
    limits = ceilings(Stopwatch(0.1))
    report = gpu.Report(gpu.json_path(options, "engine"), gpu.machine("engine"))
    report.put(
        ceilings={k: rounded(v) for k, v in limits.items()},
        model=options.preset,
        context=options.context,
    )
    print(gpu.headline(report.data), flush=True)
    bench = Bench(options, report, limits)
    for part in ("hymba", "llama", "transformers", "agreement"):
        if part not in options.skip and (part != "agreement" or options.trained):
            attempt(part, getattr(bench, part))
            gc.collect()
            torch.cuda.empty_cache()
    report.put(clocks=gpu.clocks())
    print(f"written: {report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
