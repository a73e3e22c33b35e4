"""What an architecture costs, whatever its weights: tokens a second and bytes of cache.

Decoding goes through the engine that `hymba serve` uses, training through the trainer's own
forward, backward and optimiser. Times are given as several, so that their spread is seen.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from hymba.config import Config
from hymba.engine import Engine, Limits, Sampling
from hymba.lab.sizes import Run, Size
from hymba.lab.training import Device, new_model
from hymba.model.accounting import cache_bytes, paper_cache_bytes
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.train.optim import OptimConfig, clip, optimizers, set_lr

GROUPS, STEPS, WARM = 3, 16, 6  # timed: so many groups of so many decode steps
ROOM = 1024  # tokens that a sequence may say while others are still read in
PAPER_TOKENS = 8000  # the paper's "8k"


def measure(config: Config, size: Size, device: Device) -> dict[str, Any]:
    most = max(size.contexts) + ROOM
    config = config.replace(max_positions=max(config.max_positions, most))
    found: dict[str, Any] = {"paper_cache_bytes": paper_cache_bytes(config, PAPER_TOKENS)}
    model = new_model(config, 0, device)
    found["training"] = training(model, size.language, device)
    model = model.to(getattr(torch, device.precision)).eval()
    found["decoding"] = [
        decoding(model, context, batch, device)
        for context in size.contexts
        for batch in size.batches
    ]
    return found


def training(model: LanguageModel, run: Run, device: Device) -> dict[str, Any]:
    """Whole steps of the language run's shape, each row one document."""
    rows, length = run.micro_rows or run.rows, run.sequence_length
    ids = torch.randint(3, model.config.vocab_size, (rows * length,)).to(device.type)
    batch = Batch.of((length,) * rows, device=device.type)
    found = optimizers(model, OptimConfig())
    set_lr(found, 1e-6)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.is_gpu):
            loss = model.loss(model(ids, batch), ids.roll(-1))
        loss.backward()
        clip(model.parameters(), 1.0)
        for optimizer in found:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    seconds = [_timed(step, device) for _ in range(3 + GROUPS)][3:]
    return {"rows": rows, "length": length, "tokens_per_s": [len(ids) / s for s in seconds]}


def decoding(model: LanguageModel, context: int, batch: int, device: Device) -> dict[str, Any]:
    """Steps of `batch` sequences that hold about `context` tokens each."""
    engine, prompts = _engine(model, context, batch)
    fill = batch + -(-batch * context // engine.room.step_tokens)
    sampling = Sampling(max_tokens=fill + 2 * WARM + (GROUPS + 1) * STEPS, stop_ids=())
    for prompt in prompts:
        engine.add(prompt, sampling)
    said: Counter[Any] = Counter()

    def steps(count: int = STEPS) -> None:
        for _ in range(count):
            said.update({delta.request: len(delta.tokens) for delta in engine.step()})

    while len(said) < batch:
        steps(1)
    steps(WARM)
    seconds = [_timed(steps, device) for _ in range(1 + GROUPS)][1:]  # the first of all is slow
    stats, kv_bytes, longest = engine.stats(), model.dtype.itemsize, context + max(said.values())
    return {
        "context": context,
        "batch": batch,
        "tokens_per_s": [batch * STEPS / s for s in seconds],
        "cache_bytes": {
            "at_context": cache_bytes(model.config, context, kv_bytes)["total"],
            "held": stats.cache_bytes // max(1, stats.running),  # after what was said
            "predicted": cache_bytes(model.config, longest, kv_bytes)["total"],  # of the longest
            "meta_once": stats.meta_bytes,
        },
    }


def _engine(model: LanguageModel, context: int, batch: int) -> tuple[Engine, list[list[int]]]:
    """Room for all at once, and a random prompt for each."""
    config = model.config
    longest = min(config.max_positions, context + ROOM)
    held = cache_bytes(config, longest, model.dtype.itemsize)["total"]
    limits = Limits(
        max_sequences=batch,
        max_tokens=longest,
        cache_bytes=int(1.05 * (batch + 3) * held) + (1 << 22),
        prefix_bytes=0,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (batch, context), generator=generator)
    return Engine(model, None, limits), ids.tolist()


def _timed(work: Any, device: Device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize()
