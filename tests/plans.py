"""Plans in miniature, which the fixture `tiny` gives by name."""

from __future__ import annotations

from typing import Any

from hymba.config import FUSIONS, Config
from hymba.presets import hymba, llama, mamba, samba, scattered, sequential

SIZES: dict[str, Any] = {"hidden_size": 32, "vocab_size": 61, "max_positions": 512, "ssm_state": 4}
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40}


def plans() -> dict[str, Config]:
    return _main() | VARIANTS


def _main() -> dict[str, Config]:
    """The named architectures. "hymba" has all of the 1.5B's features: first, middle and last layer
    global, windows of 5, K/V shared by a pair and by a triple, meta tokens, NTK rotary."""
    ntk = {"rope_type": "ntk", "original_max_positions": 128}
    groups = [[1, 2], [4, 5, 6]]
    everything: dict[str, Any] = SIZES | HEADS | ntk | {"window": 5, "ssm_dt_rank": 3}
    plain = everything | {"num_layers": 3, "global_layers": (0,), "meta_tokens": 0}
    return {
        "hymba": hymba(num_layers=8, share=groups, meta_tokens=3, **everything),
        "hymba-no-meta": hymba(share=False, tie_embeddings=False, **plain),
        "llama": llama(num_layers=3, **SIZES, **HEADS),
        "mamba": mamba(num_layers=3, **SIZES),
        "samba": samba(num_layers=4, window=5, meta_tokens=2, **SIZES, **HEADS),
    }


def _variants() -> dict[str, Config]:
    """What a laboratory compares: each differs in one thing from a plan above, or from the next."""
    everything: dict[str, Any] = SIZES | HEADS | {"window": 5, "ssm_dt_rank": 3}
    everything["meta_tokens"] = 2
    few = everything | {"num_layers": 4, "global_layers": (0, 3)}
    compressed = {"window": 5, "share": True, "num_layers": 6}
    return {
        **{fusion: hymba(fusion=fusion, **few) for fusion in FUSIONS if fusion != "mean"},
        "sequential": sequential(num_layers=4, **SIZES, **HEADS),
        "some-attention": hymba(
            num_layers=7, attention_layers=(1, 3, 4, 6), global_layers=(3,), share=[[4, 6]],
            fusion="concat", **everything,
        ),
        "scattered": hymba(num_layers=6, global_layers=scattered(6, 2), **everything),
        "windows": hymba(num_layers=4, global_layers=(), **everything),
        "llama-meta": llama(num_layers=2, meta_tokens=3, **SIZES, **HEADS),
        "llama-compressed": llama(**compressed, **SIZES, **HEADS),
        "llama-compressed-meta": llama(**compressed, meta_tokens=2, **SIZES, **HEADS),
        "mamba-meta": mamba(num_layers=2, meta_tokens=3, **SIZES),
    }  # fmt: skip


VARIANTS = _variants()
