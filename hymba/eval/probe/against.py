"""A second model beside the first, for the paper's statements about two: trained with meta tokens
and without, heads side by side and by turns.

    result["against"] = kept(other)     # what of another model's probe.json is kept
    pairs(result)                       # both models' numbers, a line each

Both look at the same texts, each by its own tokenizer. The two differ in more than the statement
is about (a Llama lacks an SSM too), so a verdict is about these two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
KEPT = (
    "model", "parameters", "meta_tokens", "windows", "branches", "texts", "shares", "even", "field",
)  # fmt: skip


class Pair(NamedTuple):
    what: str
    here: float
    there: float


def kept(other: Record) -> Record:
    return {key: other[key] for key in KEPT} | {"loss": other["importance"]["loss"]}


def without_meta(result: Record, branch: str) -> Record | None:
    """The second model, where it was trained without meta tokens, the first with them, and both
    have the branch."""
    other: Record | None = result.get("against")
    if other is None or other["meta_tokens"] or not result["shares_without_meta"]:
        return None
    return other if _both(result, other, branch) else None


def by_turns(result: Record) -> Record | None:
    """The second model, where it has both branches and never in one layer, the first in one."""
    other: Record | None = result.get("against")
    if other is None or len(other["branches"]) < 2:
        return None
    return other if side_by_side(result) and not side_by_side(other) else None


def side_by_side(result: Record) -> bool:
    """Has any layer both branches?"""
    sides = [side["layers"] for side in result["shares"].values()]
    return len(sides) == 2 and any(all(layer) for layer in zip(*sides, strict=True))


def even(rows: Sequence[Record | None], key: str) -> float:
    """Mean over the layers that have attention of what it would have, spread evenly."""
    found = [row[key] for row in rows if row is not None]
    return sum(found) / len(found)


def pairs(result: Record) -> list[Pair]:
    """Numbers of the first model and of the second, of what both have."""
    other = result["against"]
    both = [branch for branch in SAID if _both(result, other, branch)]
    first = _numbers(result | {"loss": result["importance"]["loss"]}, both)
    return [Pair(*a, b) for a, (_, b) in zip(first, _numbers(other, both), strict=True)]


SAID = {"attention": "attention", "ssm": "the SSM seen as attention"}


def _numbers(model: Record, branches: Sequence[str]) -> Iterator[tuple[str, float]]:
    yield "tokens of the texts", sum(text["tokens"] for text in model["texts"])
    yield "loss, nats a token", model["loss"]
    if "attention" in branches:
        shares = model["shares"]["attention"]["mean"]
        for kind, said in (("meta", "meta tokens"), ("first", "the first token")):
            yield f"attention on {said}, %", 100 * shares[kind]
            yield f"even attention on {said}, %", 100 * even(model["even"], kind)
    for branch in branches:
        yield f"entropy of {SAID[branch]}, bits", model["shares"][branch]["mean"]["entropy_bits"]
        if branch == "attention":
            yield "entropy of even attention, bits", even(model["even"], "entropy_bits")
    yield "receptive field of all heads, tokens", model["field"]["mean"]["both"]
    for branch in branches:
        yield f"receptive field of {SAID[branch]}, tokens", model["field"]["mean"][branch]


def _both(result: Record, other: Record, branch: str) -> bool:
    return branch in result["branches"] and branch in other["branches"]


def cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
