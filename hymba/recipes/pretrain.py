"""Pre-training, from a laptop's minute to the paper's run.

The paper states (section 2.5 and appendix E): warmup-stable-decay, 1 % up to 3e-3 and the last 20 %
down to 1e-5, rows of 2k and 2M tokens a step for the 1.5B model, the last 100B of 1.5T tokens on
rows of 8k. Optimiser, weight decay and clipping it does not state: `OptimConfig` has the field's
habit. The three large recipes take text from the hub, by name; other text: --data.sources.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hymba.config import Config
from hymba.model.accounting import fit, parameters
from hymba.presets import llama
from hymba.train.config import DataConfig, Extension, Schedule, TrainConfig

# One of the two public corpora of the paper's appendix A.2, with the released model's tokenizer.
HUB = DataConfig(
    sources=("hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup",),
    held_out_percent=0.1,
    tokenizer="nvidia/Hymba-1.5B-Base",
    most_tokens=10_000_000_000,
)


def tiny() -> TrainConfig:
    """2.5M parameters on the standard library's sources: some minutes on a CPU."""
    return TrainConfig(
        folder=Path("runs/tiny"),
        steps=400,
        model=Config.preset("hymba-tiny"),
        data=DataConfig(sources=("python-library",), vocab_size=4096),
        rows=4,
        sequence_length=256,
        schedule=Schedule(warmup=0.05, decay=0.3),
        held_out_every=200,
        held_out_tokens=16384,
        save_every=100,
    )


def hymba_125m() -> TrainConfig:
    """10B tokens, half a million a step: a few days on one GPU."""
    return TrainConfig(
        folder=Path("runs/hymba-125m"),
        steps=20_000,
        model=Config.preset("hymba-125m").replace(rope_type="default"),
        data=HUB,
        rows=256,
        micro_rows=16,
        sequence_length=2048,
        extension=Extension(share=1 / 15),
        precision="bfloat16",
        held_out_every=1000,
        save_every=1000,
    )


def hymba_350m() -> TrainConfig:
    """20B tokens, a million a step: for several GPUs."""
    return replace(
        hymba_125m(),
        folder=Path("runs/hymba-350m"),
        model=Config.preset("hymba-350m"),
        rows=512,
        micro_rows=8,
    )


def hymba_1b5() -> TrainConfig:
    """The paper's run, 1.5T tokens in steps of 2M: for a cluster."""
    return replace(
        hymba_125m(),
        folder=Path("runs/hymba-1.5b"),
        model=Config.preset("hymba-1.5b"),
        steps=750_000,
        rows=1024,
        micro_rows=4,
        recompute=True,
    )


def llama_125m() -> TrainConfig:
    """hymba-125m's twin with attention alone: as many parameters, all else the same."""
    twin = Config.preset("hymba-125m")
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": twin.vocab_size,
    }
    plan = fit(
        lambda width: llama(num_layers=24, intermediate_size=width, **sizes),
        parameters(twin)["total"],
    )
    return replace(hymba_125m(), folder=Path("runs/llama-125m"), model=plan)
