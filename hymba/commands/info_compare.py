"""`hymba info MODEL --compare OTHER`: cache bytes of several models side by side, and a figure.

Two counts. The paper's (tables 1, 2, 10): FP16, 8,000 tokens, and what it leaves out. What a cache
of ours really holds: whole blocks, float32 states, convolution inputs. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba.config import KV_BLOCK, Config
from hymba.errors import UserError
from hymba.model import accounting
from hymba.presets import PEERS, PRESETS

PAPER_TOKENS = 8000  # the paper's "8k"
# Of the paper's table 2, from its cache column, in MB.
TABLE_2 = {
    "llama-3.2-3b": 918,
    "llama-3.2-1b": 262,
    "smollm2-1.7b": 1573,
    "phi-1.5": 1573,
    "qwen2.5-1.5b": 229,
    "danube2-1.8b": 492,
    "amd-olmo-1b": 1049,
    "hymba-1.5b": 79,
}
LONGEST = 1 << 20  # where nobody crosses any more
DRAWN = [256 << i for i in range(10)]  # tokens: 256 to 131,072


def compare(config: Config, others: Mapping[str, Config], context: int) -> dict[str, Any]:
    """For each other model: its bytes, and how many times this one's they are."""
    own, own_paper = _held(config, context), accounting.paper_cache_bytes(config, PAPER_TOKENS)
    found = {}
    for name, other in others.items():
        held, paper = _held(other, context), accounting.paper_cache_bytes(other, PAPER_TOKENS)
        found[name] = {
            "paper_cache_bytes": paper,
            "paper_ratio": paper / own_paper if own_paper else None,
            "cache_bytes": held["total"],
            "ratio": held["total"] / own["total"],
            "one_sequence_bytes": held["total"] + held["meta"],
            "one_sequence_ratio": (held["total"] + held["meta"]) / (own["total"] + own["meta"]),
            "smaller_from": smaller_from(config, other),
        }
    return found


def _held(config: Config, tokens: int) -> dict[str, int]:
    return accounting.cache_bytes(config, tokens)


def smaller_from(config: Config, other: Config) -> int | None:
    """The least text tokens from which on `config` holds fewer bytes than `other`, one sequence
    with its meta tokens; None if there is no such number below 2**20."""

    def smaller(tokens: int) -> bool:
        ours, theirs = _held(config, tokens), _held(other, tokens)
        return ours["total"] + ours["meta"] < theirs["total"] + theirs["meta"]

    # Bytes change where a block begins. Beyond every window both grow evenly, so that what is so
    # at the end was so since the last place where it was not.
    starts = [1, *range(KV_BLOCK + 1, LONGEST, KV_BLOCK)]
    windows = [x.window or 0 for c in (config, other) for x in c.layers]
    few = [n for n in starts if n <= 2 * max(windows, default=0) + 2 * KV_BLOCK]
    if not smaller(starts[-1]):
        return None
    low, high = len(few) - 1, len(starts) - 1
    if smaller(starts[low]):
        while low and smaller(starts[low - 1]):
            low -= 1
        return starts[low]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if smaller(starts[middle]) else (middle, high)
    return starts[high]


def lines(name: str, config: Config, found: Mapping[str, Any], context: int) -> list[list[str]]:
    """The rows of a table for people: this model first, then the others."""
    own, paper = _held(config, context), accounting.paper_cache_bytes(config, PAPER_TOKENS)
    head = ["", "by the paper", "times", f"held at {context:,}", "times", "with meta", "times"]
    rows = [[*head, "larger"]]
    together = _mega(own["total"] + own["meta"])
    rows.append([name, _mega(paper), "", _mega(own["total"]), "", together, "", ""])
    for other, facts in found.items():
        start = facts["smaller_from"]
        rows.append(
            [
                other,
                _mega(facts["paper_cache_bytes"]),
                _times(facts["paper_ratio"]),
                _mega(facts["cache_bytes"]),
                _times(facts["ratio"]),
                _mega(facts["one_sequence_bytes"]),
                _times(facts["one_sequence_ratio"]),
                "never" if start is None else "always" if start == 1 else f"from {start:,}",
            ]
        )
    return rows


LEGEND = (
    f"by the paper: FP16 at {PAPER_TOKENS:,} tokens, its own count (tables 1, 2 and 10)",
    "held: keys and values bfloat16, states float32, as one sequence has them allocated;",
    "with meta: and what the meta tokens leave, which all sequences share; larger: from so many",
    "text tokens on the model holds more than the first one, with meta",
)


def _mega(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def draw(named: Mapping[str, Config], path: Path) -> Path:
    """Bytes that one sequence holds, with its meta tokens, over text tokens. The first model is
    drawn thick, and dotted by the paper's count."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'hymba[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for number, (name, config) in enumerate(named.items()):
        held = [_held(config, tokens) for tokens in DRAWN]
        sizes = [(x["total"] + x["meta"]) / 1e6 for x in held]
        (line,) = axes.plot(DRAWN, sizes, label=name, linewidth=1 if number else 3)
        if not number:
            paper = [accounting.paper_cache_bytes(config, tokens) / 1e6 for tokens in DRAWN]
            label, color = f"{name}, by the paper's count", line.get_color()
            axes.plot(DRAWN, paper, ":", label=label, color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(DRAWN, [f"{n:,}" for n in DRAWN], rotation=45)
    axes.set(xlabel="text tokens", ylabel="MB", title="cache of one sequence, as allocated")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90, metadata=_METADATA.get(path.suffix.lower()))
    except ValueError as error:  # a kind of picture that there is not
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    finally:
        plt.close(figure)
    return path


_METADATA = {".png": {"Software": None}, ".svg": {"Date": None}}  # the same bytes on every run


def usual(name: str) -> Sequence[str]:
    """What a figure has beside a model unless told otherwise."""
    return [other for other in PEERS if other != name and other in PRESETS]
