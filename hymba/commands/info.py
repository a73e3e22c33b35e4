"""`hymba info MODEL`: what a model costs, from its config alone. No torch, no weights read.

Everything printed is predicted by `hymba.model.accounting`; the layers are drawn a character each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hymba import hub
from hymba.commands import info_compare, parse
from hymba.commands.info_compare import PAPER_TOKENS
from hymba.config import FUSIONS, Config, ConfigError, Layer
from hymba.errors import UserError
from hymba.hub import looks_like_hub_id
from hymba.model import accounting
from hymba.presets import PRESETS
from hymba.schemes import SCHEMES

EXAMPLES = (
    "hymba-1.5b",
    "hymba-1.5b --context 32768",
    "hymba-1.5b --compare llama-3.2-3b smollm2-1.7b --plot cache.png",
    "path/of/model-folder --json",
)
LENGTHS = (512, 2048, 8192, 32768, 131072)  # of the cache table, as far as the model's positions go
CONTEXT = 8192  # unless another is asked for, or the positions end before
WEIGHT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Options:
    """What a model costs: parameters, FLOPs a token, cache bytes, and its layers drawn.

    Nothing is loaded: a config is enough.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A preset's name, a model folder (one with a config.json) or a hub id."""
    context: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Text tokens in the cache. Without it 8192, or as many as the model's positions allow."""
    compare: tuple[str, ...] = ()
    """Other models, named in the same ways: how many times this one's cache they hold, by the
    paper's count and as allocated."""
    plot: Path | None = None
    """Draw cache bytes over text tokens into this file (.png, .svg), beside the compared models or
    those of the paper's table 2."""
    json: bool = False
    """One JSON object, for programs."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "info", EXAMPLES)
    if not options.compare and any(word.partition("=")[0] == "--compare" for word in argv):
        raise UserError(  # the one name behind --compare is MODEL's: a model is required
            f"--compare needs a model and another one, and {options.model} is the only one named:"
            " hymba info hymba-1.5b --compare llama-3.2-3b"
        )
    config, origin = find(options.model)
    context = min(CONTEXT, config.max_positions) if options.context is None else options.context
    if context < 1:
        raise UserError(f"--context must be 1 or more, not {context}")
    others = {name: find(name)[0] for name in options.compare}
    compared = info_compare.compare(config, others, context)
    if options.plot is not None:
        drawn = others or {name: Config.preset(name) for name in info_compare.usual(options.model)}
        info_compare.draw({options.model: config} | drawn, options.plot)
        print(f"{options.plot} is written", file=sys.stderr)
    if options.json:
        facts = {"model": options.model, "origin": origin, **describe(config, context)}
        print(json.dumps(facts | ({"compare": compared} if others else {}), indent=2))
    elif others:
        rows = info_compare.lines(options.model, config, compared, context)
        print("\n".join(["cache of one sequence", *_align(rows), "", *info_compare.LEGEND]))
    else:
        print(report(f"{options.model} ({origin})", config, context))
    return 0


def find(model: str) -> tuple[Config, str]:
    """The config of a preset, a folder or a hub id, and which of them it is.

    A preset's name wins; write ./NAME for a folder called so.
    """
    path = Path(model)
    if model in PRESETS:
        return Config.preset(model), "preset"
    if path.is_dir():
        return Config.from_folder(path), "folder"
    if path.name == "config.json" and path.is_file():
        return Config.from_folder(path.parent), "folder"
    if looks_like_hub_id(model):
        return Config.from_folder(hub.find(model, ["config.json"])), "hub"
    if "/" in model:
        raise ConfigError(f"there is no folder {model}; presets: {', '.join(PRESETS)}")
    return Config.preset(model), "preset"  # raises, naming the nearest presets


def describe(config: Config, context: int) -> dict[str, Any]:
    """Every number of the report, as plain data."""
    lengths = sorted({context, *(n for n in LENGTHS if n <= config.max_positions)})
    return {
        "parameters": accounting.parameters(config),
        "context": context,
        "flops_per_token": accounting.flops_per_token(config, context),
        "cache_bytes": {str(n): accounting.cache_bytes(config, n) for n in lengths},
        "paper_cache_bytes": accounting.paper_cache_bytes(config, PAPER_TOKENS),
        "plan": plan(config),
        "kv_from": [layer.kv_from for layer in config.layers],
        "config": config.to_dict(),
    }


def sizes(config: Config) -> dict[str, str]:
    """One line for each part that the plan uses."""
    windows = sorted({x.window for x in config.layers if x.window is not None})
    values = sorted({config.value_dim(x) for x in config.layers if x.attention})
    lines = {
        "decoder": f"{config.num_layers} layers, width {config.hidden_size},"
        f" vocabulary {config.vocab_size}"
        + (f", {config.meta_tokens} meta tokens" if config.meta_tokens else ""),
        "attention": f"{config.num_heads} heads of {config.head_dim}"
        f" over {config.num_kv_heads} K/V heads, values of {_list(values)}"
        + (f", window {_list(windows)}" if windows else ""),
        "ssm": f"{config.inner_size} channels, {config.ssm_state} states each,"
        f" convolution {config.ssm_conv}, dt rank {config.ssm_dt_rank}",
        "fusion": f"{config.fusion}: {FUSIONS[config.fusion]}, where a and s are the normed"
        " outputs of attention and SSM",
        "mlp": f"{config.intermediate_size} wide, {config.mlp_activation}",
    }
    used = {part: any(getattr(x, part) for x in config.layers) for part in _ROWS if part != "K/V"}
    used["fusion"] = config.fusion != "mean" and any(x.hybrid for x in config.layers)
    return {part: line for part, line in lines.items() if used.get(part, True)}


# How a layer is drawn: one character in each row.
_ROWS: dict[str, Callable[[Layer], str]] = {
    "attention": lambda x: "." if not x.attention else "G" if x.window is None else "w",
    "K/V": lambda x: "." if not x.attention else "o" if x.owns_kv else "<",
    "ssm": lambda x: "s" if x.ssm else ".",
    "mlp": lambda x: "m" if x.mlp else ".",
}
_LEGEND = {
    "attention": "G sees everything, w its window",
    "K/V": "o own, < of the owner before it",
    "ssm": "s state-space heads",
    "mlp": "m MLP, . none",
}


def plan(config: Config) -> dict[str, str]:
    """{row: one character for each layer}."""
    return {row: "".join(map(draw, config.layers)) for row, draw in _ROWS.items()}


def _weights(config: Config, total: int) -> str:
    """Their bytes as they are released, or in the scheme that a folder keeps them in."""
    kept = config.source.get("quantization_config")
    scheme = SCHEMES.get(kept.get("scheme", "")) if isinstance(kept, dict) else None
    if scheme is None:
        return f"{_short(WEIGHT_BYTES * total, 'B')} in bfloat16"
    return f"about {_short(total * scheme.group_bytes / scheme.group / 32, 'B')} in {scheme.name}"


def report(name: str, config: Config, context: int) -> str:
    """The same as text for people, at most 100 columns wide."""
    facts = describe(config, context)
    total = facts["parameters"]["total"]
    flops = f"token number {context:,} costs {_short(facts['flops_per_token'], 'FLOP')} forward"
    blocks = [
        [f"{name}: {total:,} parameters, {_weights(config, total)}"],
        [f"  {part:<9}  {line}" for part, line in sizes(config).items()],
        _draw_plan(facts["plan"]) + _far_sharing(config),
        _parameter_table(facts["parameters"]),
        [flops],
        [*_cache_table(facts["cache_bytes"]), _paper_line(facts["paper_cache_bytes"])],
    ]
    if context > config.max_positions:
        blocks.append([f"note: this model's positions end at {config.max_positions:,} tokens"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _draw_plan(rows: dict[str, str], width: int = 40) -> list[str]:
    """The layers in pieces of `width`, a ruler above each; the legend beside the first."""
    lines = []
    count = len(rows["mlp"])
    for start in range(0, count, width):
        ruler = "".join(f"{i:<10}" for i in range(start, min(start + width, count), 10))
        lines.append(f"layers       {ruler}".rstrip())
        for row, drawn in rows.items():
            piece = drawn[start : start + width]
            legend = "" if start else f"   {_LEGEND[row]}"
            lines.append(f"  {row:<9}  {piece}{legend}")
    return lines


def _far_sharing(config: Config) -> list[str]:
    """Layers whose producer is not the nearest owner before them: the drawing cannot say it."""
    owners = plan(config)["K/V"]
    return [
        f"  layer {i} reads the K/V of layer {layer.kv_from}"
        for i, layer in enumerate(config.layers)
        if layer.kv_from is not None and owners.rfind("o", 0, i) != layer.kv_from
    ]


def _parameter_table(parameters: dict[str, int]) -> list[str]:
    total = parameters["total"]
    parts = [(part, n) for part, n in parameters.items() if n]
    return [
        "parameters",
        *_align([(part.replace("_", " "), f"{n:,}", f"{n / total:.1%}") for part, n in parts]),
    ]


def _cache_table(cache: dict[str, dict[str, int]]) -> list[str]:
    """A row for each length, a column for each kind of bytes that this model has."""
    *_, longest = cache.values()
    kinds = [kind for kind, n in longest.items() if n and kind != "meta"]
    rows = [
        [f"{int(n):,}", *(_short(row[kind], "B") for kind in kinds)] for n, row in cache.items()
    ]
    title = "cache of one sequence, by its text tokens (keys and values bfloat16, states float32)"
    meta = f"and once for all sequences, what the meta tokens leave: {_short(longest['meta'], 'B')}"
    lines = [title, *_align([["tokens", *(kind.replace("_", " ") for kind in kinds)], *rows])]
    return lines + ([meta] if longest["meta"] else [])


def _paper_line(count: int) -> str:
    return f"by the paper's own count (FP16, {PAPER_TOKENS:,} tokens): {_short(count, 'B')}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{x:>{width}}" for x, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines


def _short(count: float, unit: str) -> str:
    """A large number in three digits and powers of 1000: 3.05 GB."""
    if count < 1000:
        return f"{count:.0f} {unit}"
    prefixes = iter("kMGTPE")
    while count >= 999.5:
        count, prefix = count / 1000, next(prefixes)
    return f"{count:#.3g}".rstrip(".") + f" {prefix}{unit}"


def _list(values: Sequence[int]) -> str:
    return " and ".join(map(str, values))
