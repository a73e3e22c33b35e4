"""A second model beside the first, for the paper's statements about two: trained with meta tokens
and without, heads side by side and by turns.

    refuse_twins(one, other)            # before the work: a model has nothing to tell of itself
    result["against"] = kept(other)     # what of another model's probe.json is kept
    pairs(result)                       # both models' numbers, a line each
    note(result)                        # what the two leave open, and the rows they do not share

Both look at the same texts, each by its own tokenizer. The two differ in more than the statement
is about (a Llama lacks an SSM too), so a verdict is about these two models.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hymba.config import Config
from hymba.errors import UserError

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


def refuse_twins(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    """UserError where two (name, folder) are one model. The same weights under another config (its
    windows, say) are two."""
    (name, folder), (named, second) = one, other
    if folder.resolve() == second.resolve():
        raise UserError(f"--against {named} is the model itself: name another one")
    if _same_weights(folder, second) and Config.from_folder(folder) == Config.from_folder(second):
        raise UserError(f"{name} and {named} are the same weights: name another model --against")


def _same_weights(*folders: Path) -> bool:
    """Byte by byte; two models differ early, so that this is long for the same ones only."""
    one, other = (sorted(folder.glob("*.safetensors")) for folder in folders)
    if not one or [path.name for path in one] != [path.name for path in other]:
        return False
    return all(filecmp.cmp(a, b, shallow=False) for a, b in zip(one, other, strict=True))


def without_meta(result: Record, branch: str) -> Record | None:
    """The second model, where it was trained without meta tokens, the first with them, and both
    have the branch."""
    other: Record | None = result.get("against")
    if other is None or other["meta_tokens"] or not result["shares_without_meta"]:
        return None
    return other if _both(result, other, branch) else None


def why_not_meta(result: Record, branch: str) -> str:
    """Why the second model does not decide about meta tokens; the first one has the branch."""
    other = result["against"]
    here, there, head = result["model"], other["model"], HEADS[branch]
    if not result["shares_without_meta"]:
        if not other["meta_tokens"]:
            return f"neither {here} nor {there} has meta tokens: name a model that has them first"
        if branch not in other["branches"]:
            return f"{here} has no meta tokens, {there} no {head}: name a model that has both first"
        return f"{there} has meta tokens and {here} has none: name the one that has them first"
    if branch not in other["branches"]:
        return f"{there} has no {head}: --against a model that has, without meta tokens"
    return f"{there} has meta tokens too: --against a model without"


def why_not_turns(result: Record) -> str:
    """Why nothing decides about heads side by side and by turns."""
    other = result.get("against")
    if other is None:
        return "a comparison needs a second model (--against)"
    here, there = result["model"], other["model"]
    if side_by_side(result):
        turns = "--against a model that has both branches in different layers"
        return f"{there} has no heads by turns: {turns}"
    if not side_by_side(other):
        first = "name a model that has both branches in one layer first"
        return f"neither {here} nor {there} has heads side by side: {first}"
    if len(result["branches"]) == 2:
        first = "name the one with heads side by side first"
        return f"{here} has heads by turns, {there} side by side: {first}"
    first = f"name {there} first, --against a model that has both branches in different layers"
    return f"{here} has no heads by turns: {first}"


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
HEADS = {"attention": "attention", "ssm": "SSM"}
ROWS = {"attention": "shares, entropy, receptive field", "ssm": "entropy, receptive field"}


def note(result: Record) -> str:
    """A sentence: what the two leave open, and the rows that only one has; else nothing."""
    one, other = result, result["against"]
    said = []
    if by_turns(result) is None and not any(without_meta(result, branch) for branch in SAID):
        shared = any(_both(one, other, branch) for branch in SAID)
        why = ": each says above what is missing" if shared else ", which share no kind of heads"
        two = f"{one['model']} and {other['model']}"
        said.append(f"no statement could be decided by the two, {two}{why}")
    rows = [
        f"those of {SAID[branch]} ({ROWS[branch]}), which {without['model']} lacks"
        for branch in SAID
        for has, without in ((one, other), (other, one))
        if branch in has["branches"] and branch not in without["branches"]
    ]
    if rows:
        said.append(f"rows left out of the table of both: {', and '.join(rows)}")
    sentence = "; ".join(said)
    return sentence[:1].upper() + sentence[1:] + ("." if sentence else "")


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
