"""One parameter budget, four architectures: what each costs. No torch, no weights; a second.

    python examples/compare_plans.py
    python examples/compare_plans.py --budget 350 --context 16384

The plans share depth, vocabulary and (but for Mamba, which has no MLP) width, and are fitted to the
budget by one size each, so that what differs is the mixer. FLOPs are those of decoding one token at
the end of the context. The cache is one sequence's: keys and values in bfloat16, SSM states in
float32.
"""

import argparse

from hymba.config import Config, ConfigError
from hymba.model.accounting import cache_bytes, fit, flops_per_token, parameters
from hymba.presets import hymba, llama, mamba, samba


def plans(budget: int) -> dict[str, Config]:
    """A config of each architecture with about so many parameters."""
    sizes = {"num_layers": 24, "vocab_size": 32001}
    pairs = max(1, round((budget / 500) ** 0.5 / 128))  # of heads 64 wide: 4 at 130 million
    heads = sizes | {"hidden_size": 128 * pairs, "num_heads": 2 * pairs, "num_kv_heads": pairs}
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
    try:
        configs = plans(int(asked.budget * 1e6))
    except ConfigError as error:
        raise SystemExit(f"{asked.budget:g} million parameters do not fit: {error}") from None
    for name, config in configs.items():
        table[name] = cells(config, asked.context)
    widths = [max(map(len, column)) for column in zip(*table.values(), strict=True)]
    for name, row in table.items():
        shown = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print(f"{name:<5}  " + "  ".join(shown))


if __name__ == "__main__":
    main()
