"""What bench/train.py and bench/prefill.py share: the model with random weights, a check of it
against plain PyTorch, and where the device's time goes, by kernel name."""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.gpu import relative_error, rounded
from bench.peers import plain, replaced
from hymba import ops
from hymba.config import Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops.backend import FILES

PARTS = ("matrix products", "scan", "conv", "attention", "elementwise", "head", "copies", "rest")
CUDA_KERNEL = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)"
TOLERANCE = 0.01  # of hidden states in float32 after all layers, ours against plain PyTorch


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="hymba-1.5b", help="the config (hymba-1.5b)")
    parser.add_argument(
        "--layers", type=int, default=0, metavar="K", help="only the first K layers"
    )
    parser.add_argument("--compile", action="store_true", help="also with each block compiled")


def config_of(options: argparse.Namespace) -> Config:
    config = Config.preset(options.preset)
    keep = options.layers or config.num_layers
    return config.replace(layers=config.layers[:keep])


def build(config: Config) -> LanguageModel:
    """Random weights in bfloat16, made on the device."""
    with torch.device("cuda"):
        model = LanguageModel(config)
    return model.to(torch.bfloat16).init_weights(0)


def compiled(model: LanguageModel, on: bool = True) -> None:
    """Each block compiled by itself, or (on=False) as it is written."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # a variant for each kind of layer
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for block in model.decoder.layers:
        if on:
            block.compile(dynamic=False)
        else:
            block._compiled_call_impl = None


def all_plain() -> dict[str, Callable[..., Any]]:
    """Every op of the door in plain PyTorch."""
    return {name: plain(name) for name in FILES}


def difference(model: LanguageModel, tokens: int = 512) -> float:
    """How far hidden states are from those with plain PyTorch in every op, both in float32: in
    bfloat16 the roundings of 32 random layers drown what is looked for. There, ours must be no
    further from the float32 truth than plain PyTorch's, or this is infinite."""
    ids = torch.randint(1, model.config.vocab_size, (2 * tokens,), device=model.device)
    batch = Batch.of((tokens, tokens), device=model.device)
    wide = copy.deepcopy(model).float()
    ours, ours_wide = model(ids, batch).detach(), wide(ids, batch).detach()
    with replaced(all_plain()):
        theirs, truth = model(ids, batch).detach(), wide(ids, batch).detach()
    if relative_error(ours, truth) > 1.25 * relative_error(theirs, truth):
        return math.inf
    return rounded(relative_error(ours_wide, truth), 2)


def speed(flops: float, tokens: int, ms: float, spread: float, matrix_rate: float) -> dict:
    """What a row of results says of one timing."""
    rate = flops / ms * 1e3
    return {
        "ms": rounded(ms),
        "spread": rounded(spread, 2),
        "tokens_per_s": round(tokens / ms * 1e3),
        "tflop_per_s": rounded(rate / 1e12),
        "mfu": rounded(rate / matrix_rate),
    }


def speed_line(row: Mapping[str, Any], matrix_rate: float) -> str:
    """The rate counts useful work; MFU is its share of the matrix rate of the same run."""
    return (
        f"{row['name']:38} {row['ms']:8.2f} ms ±{row['spread']:<4.0%} "
        f"{row['tokens_per_s']:7} tokens/s {row['tflop_per_s']:5.0f} TFLOP/s, "
        f"MFU {row['mfu']:.1%} of the {matrix_rate / 1e12:.0f} measured in this run"
    )


# Where the time goes


@cache
def own_kernels() -> dict[str, str]:
    """{name of a kernel: part}, read off the files of hymba/ops; "this or that" where two files
    have a kernel of one name."""
    found: dict[str, set[str]] = {}
    for path in Path(ops.__path__[0]).rglob("*"):
        source = path.suffix in (".py", ".cu", ".cuh")
        text = path.read_text(encoding="utf-8") if source else ""
        names = re.findall(r"@triton\.jit\b.*\n(?:@.*\n)*def (\w+)", text)
        names += re.findall(CUDA_KERNEL, text)
        file = re.split(r"[_.]", path.name)[0]
        part = {"attention": "attention", "scan": "scan", "conv": "conv", "loss": "head"}
        part |= dict.fromkeys(("thin", "narrow", "packed"), "matrix products")
        for name in names:
            found.setdefault(name, set()).add(part.get(file, "elementwise"))
    return {name: " or ".join(sorted(parts)) for name, parts in found.items()}


# Kernels of torch and of peers. The first that fits counts.
FOREIGN = (
    ("scan", "selective_scan"),
    ("attention", "flex|flash|fmha|attention|attn"),
    ("matrix products", "gemm|gemv|nvjet|cutlass|xmma|cublas|splitk"),
    ("head", "softmax|nll|cross_entropy"),
    ("copies", "memcpy|memset|copy|catarray|fillfunctor"),
    ("elementwise", "elementwise|reduce|triton_|index|norm|arange"),
)


def part_of(kernel: str) -> str:
    own = own_kernels()
    if kernel in own:
        return own[kernel]
    for name in re.findall(r"[a-z]\w+", kernel):  # CUDA C++ names are decorated
        if name in own and not name.startswith("_"):
            return own[name]
    lower = kernel.lower()
    return next((part for part, words in FOREIGN if re.search(words, lower)), "rest")


def breakdown(work: Callable[[], Any], runs: int = 2) -> dict[str, Any]:
    """Device milliseconds of one run by part, and the kernels that take most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            work()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.self_device_time_total / 1e3 / runs, event.count // runs)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    return by_part(kernels)


def by_part(kernels: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    """(name, ms, launches) of each kernel -> ms by part, their sum, and the largest."""
    parts = dict.fromkeys(PARTS, 0.0)
    ordered = sorted(kernels, key=lambda kernel: -kernel[1])
    for name, ms, _ in ordered:
        parts[part_of(name)] = parts.get(part_of(name), 0.0) + ms
    largest = [
        {"kernel": name[:120], "part": part_of(name), "ms": rounded(ms, 3), "launches": count}
        for name, ms, count in ordered[:30]
    ]
    total = sum(parts.values())
    shown = {part: rounded(ms, 4) for part, ms in parts.items() if ms}
    return {"ms_by_part": shown, "device_ms": rounded(total), "largest": largest}


def parts_line(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in found["ms_by_part"].items())
    return f"    device {found['device_ms']:.1f} ms: {parts}"


def largest_lines(found: dict[str, Any], count: int = 12) -> str:
    rows = (
        f"      {row['ms']:8.2f} ms {row['launches']:5} x {row['part']:16} {row['kernel'][:70]}"
        for row in found["largest"][:count]
    )
    return "\n".join(rows)
