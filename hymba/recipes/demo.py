"""The demo's two models and their run: small enough for a laptop, every Hymba feature on.

The attention-only model is a plan of the same decoder with the same depth, embedding and
tokenizer, fitted to the same number of parameters by its MLP width; data, order, seed, optimiser
and schedule are the same too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba.config import Config
from hymba.model.accounting import fit, parameters
from hymba.presets import hymba, llama
from hymba.train import Schedule, TrainConfig

VOCABULARY = 4096
STEPS = 300


def hybrid(vocab_size: int = VOCABULARY) -> Config:
    """Seven hybrid layers: three see everything, two pairs share K/V through a window of 64."""
    return hymba(
        hidden_size=128,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=384,
        window=64,
        meta_tokens=16,
        ssm_state=8,
        vocab_size=vocab_size,
    )


def attention_only(vocab_size: int = VOCABULARY) -> Config:
    """As many parameters and the same heads, all attention."""
    budget = parameters(hybrid(vocab_size))["total"]
    sizes: dict[str, Any] = {"hidden_size": 128, "num_layers": 7, "num_heads": 4, "num_kv_heads": 2}
    return fit(lambda width: llama(intermediate_size=width, vocab_size=vocab_size, **sizes), budget)


def run(folder: Path, steps: int = STEPS) -> TrainConfig:
    """1024 tokens a step; held-out files are looked at half way and at the end."""
    return TrainConfig(
        folder=folder,
        steps=steps,
        rows=4,
        sequence_length=256,
        schedule=Schedule(peak=3e-3, warmup=0.05, decay=0.3),
        held_out_every=max(1, steps // 2),
        held_out_tokens=min(32768, 1024 * steps),
        save_every=max(1, steps // 6),
        log_every=max(1, min(10, steps // 10)),
    )
