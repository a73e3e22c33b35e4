"""One parameter budget, four architectures: what each costs. No torch, no weights; a second.

    python examples/compare_plans.py
    python examples/compare_plans.py --budget 350 --context 16384

The plans share depth, vocabulary and (but for Mamba, which has no MLP) width, and are fitted to the
budget by one size each, so what differs is the mixer. FLOPs are those of decoding one token at the
end of the context; the cache is one sequence's, keys and values in bfloat16, SSM states in float32.
"""

import argparse

from hymba.config import Config
from hymba.model.accounting import cache_bytes, fit, flops_per_token, parameters
from hymba.presets import hymba, llama, mamba, samba


def plans(budget: int, layers: int = 24, width: int = 512) -> dict[str, Config]:
    sizes = {"num_layers": layers, "vocab_size": 32001}
    heads = sizes | {"hidden_size": width, "num_heads": 8, "num_kv_heads": 4}
    return {
        "hymba": fit(lambda mlp: hymba(intermediate_size=mlp, **heads), budget),
        "llama": fit(lambda mlp: llama(intermediate_size=mlp, **heads), budget),
        "mamba": fit(lambda wide: mamba(hidden_size=wide, **sizes), budget),
        "samba": fit(lambda mlp: samba(intermediate_size=mlp, **heads), budget),
    }


def cells(config: Config, context: int) -> list[str]:
    held = [cache_bytes(config, tokens)["total"] for tokens in (context // 4, context, context * 4)]
    return [
        f"{parameters(config)['total']:,}",
        f"{config.hidden_size} x {config.num_layers}",
        f"{config.intermediate_size:,}" if any(x.mlp for x in config.layers) else "none",
        f"{flops_per_token(config, context) / 1e6:,.0f}",
        *(f"{count / 1e6:,.1f}" for count in held),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=130, help="million parameters")
    parser.add_argument("--context", type=int, default=8192, help="text tokens")
    asked = parser.parse_args()
    lengths = [asked.context // 4, asked.context, asked.context * 4]
    head = ["parameters", "shape", "MLP", "MFLOP/token", *(f"MB at {n:,}" for n in lengths)]
    table = {"plan": head}
    for name, config in plans(int(asked.budget * 1e6)).items():
        table[name] = cells(config, asked.context)
    widths = [max(map(len, column)) for column in zip(*table.values(), strict=True)]
    for name, row in table.items():
        shown = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print(f"{name:<5}  " + "  ".join(shown))


if __name__ == "__main__":
    main()
