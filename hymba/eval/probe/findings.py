"""The paper's statements about the heads (arXiv 2411.13676), each beside what this model shows.

The paper speaks of models of 300 million parameters and more, trained on 100 billion tokens;
whether a small one agrees is a fact about that one. A rule decides, nobody's eye: True, False, or
None where the model lacks what the statement is about. Where the paper compares two models and a
second one was looked at too (against.py), the two decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hymba.eval.probe.against import (
    HEADS,
    by_turns,
    even,
    why_not_meta,
    why_not_turns,
    without_meta,
)

Record = dict[str, Any]


class Finding(NamedTuple):
    statement: str
    here: str
    agrees: bool | None


DRAIN = 2  # times what even attention gives the first token: from here on it is a drain
FURTHER = 2  # times the tokens back of heads by turns: from here on it is "much further"
NO_META, NO_HYBRID = "the model has no meta tokens", "the model has no layer with both branches"


def findings(result: Record) -> list[Finding]:
    return [
        _drain(result),
        _shares(result),
        _entropy(result, "attention", "in all attention heads (figure 15)"),
        _entropy(result, "ssm", "in 10 of 12 layers of SSM heads (figure 15)"),
        _specialised(result),
        _magnitude(result),
        _first_layer(result),
        _importance(result),
        _field(result),
    ]


def _drain(result: Record) -> Finding:
    said = "Meta tokens take over the attention that the first token would get (figure 7)"
    if "attention" not in result["shares"]:
        return Finding(said, "the model has no attention", None)
    without, a = result["shares_without_meta"], result["shares"]["attention"]["mean"]
    b, level, where = a, even(result["even"], "first"), "without meta tokens"
    if (other := without_meta(result, "attention")) is not None:
        b, level = other["shares"]["attention"]["mean"], even(other["even"], "first")
        where = f"in {other['model']}"
    elif without:
        b, level = without["attention"]["mean"], even(result["even_without_meta"], "first")
    here = (
        f"the first token gets {_percent(b['first'])} {where}, where even attention"
        f" would give it {_percent(level)}"
    )
    if without:
        here += (
            f", and {_percent(a['first'])} with them ({_percent(even(result['even'], 'first'))} if"
            f" even); they get {_percent(a['meta'])}"
        )
    why = _after(_undecided(result, "attention"))
    if b["first"] <= DRAIN * level:
        return Finding(said, f"{here}: there is no drain to take over{why}", None)
    here += why
    return Finding(said, here, a["first"] < b["first"] / 2 if without else None)


def _shares(result: Record) -> Finding:
    said = 'SSM heads favour "self", attention heads "cross" (figure 7)'
    shares = result["shares"]
    if set(shares) != {"attention", "ssm"}:
        return Finding(said, "the model has one kind of heads", None)
    a, s = shares["attention"]["mean"], shares["ssm"]["mean"]
    here = (
        f"self: SSM {_percent(s['self'])}, attention {_percent(a['self'])};"
        f" cross: SSM {_percent(s['cross'])}, attention {_percent(a['cross'])}"
    )
    return Finding(said, here, s["self"] > a["self"] and a["cross"] > s["cross"])


def _entropy(result: Record, branch: str, where: str) -> Finding:
    said = f"Meta tokens lower the entropy {where}"
    other, without = without_meta(result, branch), result["shares_without_meta"]
    bare, named = without, "with them taken away from the same weights"
    if other is not None:
        bare, named = other["shares"], f"in {other['model']}"
    if branch not in result["shares"]:
        return Finding(said, f"the model has no {HEADS[branch]}", None)
    if not bare:
        return Finding(said, _undecided(result, branch) or NO_META, None)
    # A second model may have more layers, and these heads in other ones: those that both have.
    rows = zip(result["shares"][branch]["layers"], bare[branch]["layers"], strict=False)
    pairs = [(a["entropy_bits"], b["entropy_bits"]) for a, b in rows if a and b]
    if not pairs:
        return Finding(said, f"these heads stand in other layers {named}", None)
    lower = sum(a < b for a, b in pairs)
    mean = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    here = (
        f"lower in {lower} of {len(pairs)} layers; mean {mean[0]:.2f} bits with,"
        f" {mean[1]:.2f} {named}{_after(_undecided(result, branch))}"
    )
    return Finding(said, here, lower > len(pairs) / 2)


def _specialised(result: Record) -> Finding:
    said = "Different meta tokens fire for different kinds of text (figure 5)"
    meta = result["meta"]
    if meta is None or len(meta["texts"]) < 2:
        return Finding(said, NO_META if meta is None else "there is one text", None)
    between = [pair["bits"] for pair in meta["distance_between_texts"]]
    within = list(meta["distance_within_text"].values())
    a, b = sum(between) / len(between), sum(within) / len(within)
    here = (
        f"halves of two texts are {a:.4f} bits apart in which meta tokens they use"
        f" (Jensen-Shannon), the two halves of one text {b:.4f}"
    )
    return Finding(said, here, a > b)


def _magnitude(result: Record) -> Finding:
    said = "The SSM's output is consistently larger than attention's (figure 12)"
    rows = [row for row in result["magnitudes"] if len(row) == 2]
    if not rows:
        return Finding(said, NO_HYBRID, None)
    ratios = sorted(row["ssm"]["before"] / max(1e-30, row["attention"]["before"]) for row in rows)
    larger = sum(ratio > 1 for ratio in ratios)
    here = (
        f"larger in {larger} of {len(rows)} layers; SSM over attention from {ratios[0]:.2f} to"
        f" {ratios[-1]:.2f} before the norms"
    )
    return Finding(said, here, larger > len(rows) / 2)


def _first_layer(result: Record) -> Finding:
    said = "Taking the first layer's SSM away costs most (figure 3: down to guessing)"
    rows = [part for part in result["importance"]["parts"] if part["head"] is None]
    if not any(part["branch"] == "ssm" for part in rows):
        return Finding(said, "the model has no SSM", None)
    worst = max(rows, key=lambda part: part["change"])
    name = {"ssm": "SSM", "attention": "attention"}[worst["branch"]]
    here = (
        f"the dearest branch is layer {worst['layer']}'s {name}: the loss of"
        f" {result['importance']['loss']:.2f} nats a token grows by {worst['change']:.2f}"
    )
    first = next(part["layer"] for part in rows if part["branch"] == "ssm")
    return Finding(said, here, worst["branch"] == "ssm" and worst["layer"] == first)


def _importance(result: Record) -> Finding:
    said = "A layer's SSM heads matter more than its attention heads (figure 3: 1.1 to 0.24 points)"
    means, rest = {}, {}
    for branch in ("attention", "ssm"):
        rows = [
            part["change"]
            for part in result["importance"]["parts"]
            if part["head"] is None and part["branch"] == branch
        ]
        if not rows:
            return Finding(said, "the model has one kind of heads", None)
        means[branch], others = sum(rows) / len(rows), rows[1:] or rows
        rest[branch] = sum(others) / len(others)
    here = (
        f"mean growth of the loss: {means['ssm']:.3f} nats without a layer's SSM,"
        f" {means['attention']:.3f} without its attention (but for the first of each kind:"
        f" {rest['ssm']:.3f} and {rest['attention']:.3f})"
    )
    return Finding(said, here, means["ssm"] > means["attention"])


def _field(result: Record) -> Finding:
    said = "Side by side, heads look much further back than by turns (figure 11, equation 5)"
    mean = result["field"]["mean"]
    here = "; ".join(f"{kind} {tokens:.1f} tokens" for kind, tokens in mean.items())
    if (other := by_turns(result)) is None:
        return Finding(said, f"{here}: {why_not_turns(result)}", None)
    there = other["field"]["mean"]
    here += f"; {other['model']}, by turns, {there['both']:.1f} tokens"
    return Finding(said, here, mean["both"] > FURTHER * there["both"])


def _undecided(result: Record, branch: str) -> str:
    """Why a second model, where one was looked at, does not decide about meta tokens."""
    if "against" not in result or without_meta(result, branch) is not None:
        return ""
    return why_not_meta(result, branch)


def _after(said: str) -> str:
    return f"; {said}" if said else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
