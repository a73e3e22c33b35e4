"""The figures of a report: each a picture, what it is (alt text), what it says (a sentence with
this model's own numbers) and the numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hymba.eval.probe import draw

Record = dict[str, Any]
EVERY = (
    "share-attention", "share-ssm", "entropy", "meta-tokens", "magnitudes", "importance", "heads",
    "field", "sharing",
)  # fmt: skip
NAMES = {"attention": "attention heads", "ssm": "SSM seen as attention"}
SHORT = {"attention": "attention", "ssm": "SSM"}
KINDS = ("meta", "first", "self", "cross")
BARE = "meta tokens taken away"


class Figure(NamedTuple):
    name: str  # of its file
    title: str
    svg: str
    alt: str
    says: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


def figures(result: Record) -> Iterator[Figure]:
    """Those that apply to the model."""
    makers: list[Callable[[Record], Figure | None]] = [
        lambda r: _shares(r, "attention"),
        lambda r: _shares(r, "ssm"),
        _entropy,
        _meta,
        _magnitudes,
        _branches,
        _heads,
        _field,
        _kv,
    ]
    for make in makers:
        if (made := make(result)) is not None:
            yield made


def left_out(result: Record) -> list[str]:
    """What does not apply to this model, a sentence each."""
    said = []
    if result["shares_without_meta"] is None:
        said.append("The model has no meta tokens: no heat map, no comparison without them.")
    for branch in NAMES:
        if branch not in result["branches"]:
            said.append(f"No layer has {'attention' if branch == 'attention' else 'an SSM'}.")
    if not any(len(row) == 2 for row in result["magnitudes"]):
        said.append("No layer has both branches: nothing is normed and joined, so magnitudes are"
                    " those of the outputs.")  # fmt: skip
    if result["kv"] is None:
        said.append("Fewer than two layers have keys and values of their own: none to compare.")
    if not any(part["head"] is not None for part in result["importance"]["parts"]):
        said.append("Single heads were not taken away: there are many (--heads all tries them).")
    return said


def _layers(result: Record) -> list[str]:
    return [str(i) for i in range(len(result["magnitudes"]))]


def _column(rows: Sequence[Record | None], key: str) -> list[float | None]:
    return [None if row is None else row[key] for row in rows]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _shares(result: Record, branch: str) -> Figure | None:
    sides = {"as it is": result["shares"], BARE: result["shares_without_meta"]}
    found = {name: x[branch] for name, x in sides.items() if x and branch in x}
    if not found:
        return None
    labels = _layers(result)
    panels, rows = [], []
    for name, side in found.items():
        series: draw.Series = {kind: _column(side["layers"], kind) for kind in KINDS}
        panels.append(draw.stacked(f"{NAMES[branch]}, {name}", labels, series))
        rows += [
            [name, i, *(row[kind] for kind in KINDS)]
            for i, row in enumerate(side["layers"])
            if row is not None
        ]
    mean = next(iter(found.values()))["mean"]
    says = f"Mean over layers and texts: {', '.join(f'{k} {_percent(mean[k])}' for k in KINDS)}."
    if BARE in found:
        bare = found[BARE]["mean"]
        says += (
            f" Without its meta tokens the same model gives the first token"
            f" {_percent(bare['first'])} in place of {_percent(mean['first'])}."
        )
    if branch == "attention":
        even = _mean(_column(result["even_without_meta"] or result["even"], "first"))
        says += f" Spread evenly over all that is seen, it would be {_percent(even)}."
    if branch == "ssm":
        says += " Shares are of |alpha|, the hidden attention matrix, mean over channels."
    title = {"attention": "Where attention goes", "ssm": "Where the SSM looks"}[branch]
    alt = f"Stacked bars by layer: share of {NAMES[branch]} on meta tokens, first token, self, rest"
    head = ["model", "layer", *KINDS]
    return Figure(f"share-{branch}", title, draw.svg(panels, alt), alt, says, head, rows)


def _entropy(result: Record) -> Figure:
    labels, bare, panels, said = _layers(result), result["shares_without_meta"], [], []
    every: draw.Series = {}
    for branch, found in result["shares"].items():
        series: draw.Series = {"as it is": _column(found["layers"], "entropy_bits")}
        if bare:
            series[BARE] = _column(bare[branch]["layers"], "entropy_bits")
        panels.append(draw.lines(f"{NAMES[branch]}, bits", labels, series))
        said += [
            f"{SHORT[branch]} {name} {_mean(values):.2f} bits" for name, values in series.items()
        ]
        every |= {f"{branch} {name}": values for name, values in series.items()}
    says = "Mean over layers: " + "; ".join(said)
    alt = "Lines by layer: entropy of attention and of the SSM's hidden attention, in bits"
    table = [[i, *(values[i] for values in every.values())] for i in range(len(labels))]
    svg, title = draw.svg(panels, alt), "How spread the weights are"
    return Figure("entropy", title, svg, alt, says + ".", ["layer", *every], table)


def _mean(values: Sequence[float | None]) -> float:
    found = [v for v in values if v is not None]
    return sum(found) / max(1, len(found))


def _meta(result: Record) -> Figure | None:
    meta = result["meta"]
    if meta is None:
        return None
    texts, count = meta["texts"], len(meta["share"][0])
    numbers = [str(i) for i in range(count)]
    panels = [
        draw.heat("share of meta attention", texts, numbers, meta["share"], "meta token"),
        draw.heat(
            "against the mean text, log2",
            texts,
            numbers,
            meta["log2_ratio_to_mean"],
            "meta token",
            signed=True,
        ),
    ]
    within = sum(meta["distance_within_text"].values()) / len(texts)
    between = [pair["bits"] for pair in meta["distance_between_texts"]]
    says = f"Two halves of one text are {within:.4f} bits apart in which meta tokens they use"
    if between:
        says += f", halves of two texts {sum(between) / len(between):.4f}"
        says += (
            ": more than chance and place alone"
            if sum(between) / len(between) > within
            else ": no more than chance and place alone"
        )
    alt = (
        "Two heat maps, texts by meta tokens: how attention on meta tokens is shared out among"
        " them, and how each text differs from the mean (blue more, orange less)"
    )
    rows = [[text, *map(float, row)] for text, row in zip(texts, meta["share"], strict=True)]
    title, head = "Which meta tokens fire for which text", ["text", *numbers]
    return Figure("meta-tokens", title, draw.svg(panels, alt), alt, says + ".", head, rows)


def _magnitudes(result: Record) -> Figure:
    labels, rows = _layers(result), result["magnitudes"]
    both = any(len(row) == 2 for row in rows)
    panels = []
    for when in ("before", "behind") if both else ("before",):
        series: draw.Series = {
            branch: [row[branch][when] if branch in row else None for row in rows]
            for branch in result["branches"]
        }
        name = f"root mean square {when} the norms" if both else "root mean square of the output"
        panels.append(draw.lines(name, labels, series))
    says = "One branch a layer: nothing is normed."
    if both:
        ratios, behind = (
            [row["ssm"][when] / max(1e-30, row["attention"][when]) for row in rows if len(row) == 2]
            for when in ("before", "behind")
        )
        larger = sum(ratio > 1 for ratio in ratios)
        says = (
            f"Before the norms the SSM's output is {min(ratios):.2f} to {max(ratios):.2f} times"
            f" attention's, and larger in {larger} of {len(ratios)} layers; behind"
            f" them it is {min(behind):.2f} to {max(behind):.2f} times attention's."
        )
    alt = "Lines by layer: root mean square of each branch's output, before and behind its norm"
    table = [
        [i, branch, row[branch]["before"], row[branch]["behind"], row[branch]["norm_weight"]]
        for i, row in enumerate(rows)
        for branch in row
    ]
    head = ["layer", "branch", "before", "behind", "mean |norm weight|"]
    title = "How large the branches are"
    return Figure("magnitudes", title, draw.svg(panels, alt), alt, says, head, table)


def _branches(result: Record) -> Figure:
    labels, parts = _layers(result), result["importance"]["parts"]
    series: draw.Series = {
        branch: [_change(parts, i, branch, None) for i in range(len(labels))]
        for branch in result["branches"]
    }
    worst = max((p for p in parts if p["head"] is None), key=lambda p: p["change"])
    says = (
        f"The loss of all texts is {result['importance']['loss']:.3f} nats a token. Most is lost"
        f" without layer {worst['layer']}'s {SHORT[worst['branch']]}: {worst['change']:+.3f}."
    )
    alt = "Bars by layer: growth of the loss when the layer's attention or SSM is taken away"
    panel = draw.bars("growth of the loss, nats a token", labels, series)
    table = [[i, *(values[i] for values in series.values())] for i in range(len(labels))]
    title, head = "What is lost without a branch", ["layer", *series]
    return Figure("importance", title, draw.svg([panel], alt), alt, says, head, table)


def _change(parts: list[Record], layer: int, branch: str, head: int | None) -> float | None:
    found = (
        part["change"]
        for part in parts
        if (part["layer"], part["branch"], part["head"]) == (layer, branch, head)
    )
    return next(found, None)


def _heads(result: Record) -> Figure | None:
    parts = [part for part in result["importance"]["parts"] if part["head"] is not None]
    if not parts:
        return None
    labels, panels, table = _layers(result), [], []
    for branch in result["branches"]:
        count = 1 + max((p["head"] for p in parts if p["branch"] == branch), default=0)
        changes = [[_change(parts, i, branch, h) for h in range(count)] for i in range(len(labels))]
        heads, name = [str(h) for h in range(count)], NAMES[branch].split(" seen")[0]
        rows = [f"layer {i}" for i in labels]
        panels.append(draw.heat(f"{name}, nats", rows, heads, changes, "head", signed=True))
        table += [[i, branch, *row] for i, row in enumerate(changes)]
    worst = max(parts, key=lambda p: p["change"])
    says = (
        f"The dearest head is number {worst['head']} of layer {worst['layer']}'s"
        f" {SHORT[worst['branch']]}: {worst['change']:+.3f} nats a token."
    )
    if "ssm" in result["branches"]:
        says += " A head of the SSM is the group of channels beside an attention head."
    alt = "Heat maps, layers by heads: growth of the loss without one head (blue worse)"
    most = max(len(row) for row in table) - 2
    head, title = ["layer", "branch", *map(str, range(most))], "What is lost without one head"
    return Figure("heads", title, draw.svg(panels, alt), alt, says, head, table)


def _field(result: Record) -> Figure:
    labels, field = _layers(result), result["field"]
    names = list(field["by_text"])
    series: draw.Series = {}
    for branch in result["branches"]:
        at = [[field["reach"][name][i].get(branch) for name in names] for i in range(len(labels))]
        series[branch] = [None if None in row else _mean(row) for row in at]
    says = "Effective receptive field (paper, equation 5), in tokens: " + ", ".join(
        f"{kind} {tokens:.1f}" for kind, tokens in field["mean"].items()
    )
    if result["field_without_meta"]:
        says += f"; without meta tokens {result['field_without_meta']['mean']['both']:.1f}"
    alt = "Bars by layer: how many tokens back the last token looks, weighted"
    panel = draw.bars("tokens back, last token", labels, series)
    table = [[i, *(values[i] for values in series.values())] for i in range(len(labels))]
    title, head = "How far back the last token looks", ["layer", *series]
    return Figure("field", title, draw.svg([panel], alt), alt, says + ".", head, table)


def _kv(result: Record) -> Figure | None:
    kv = result["kv"]
    if kv is None:
        return None
    owners = [str(i) for i in kv["owners"]]
    panels = [
        draw.heat(f"{name}, CKA", owners, owners, kv[kind]["cka"], "layer", numbers=len(owners) < 9)
        for kind, name in (("k", "keys"), ("v", "values"))
    ]
    pairs = list(zip(range(len(owners) - 1), range(1, len(owners)), strict=True))
    k, v = ([kv[kind]["cka"][a][b] for a, b in pairs] for kind in ("k", "v"))
    chance = max(max(kv[kind]["chance"]) for kind in ("k", "v"))
    says = (
        "Neighbours among the layers that have K/V of their own: keys"
        f" {min(k):.2f} to {max(k):.2f}, values {min(v):.2f} to {max(v):.2f} (linear CKA;"
        f" shuffled tokens at most {chance:.3f})."
    )
    alt = "Two heat maps, layers by layers: how alike their keys, and their values, are"
    table = [
        [f"{owners[a]}, {owners[b]}", *(kv[kind][m][a][b] for kind in ("k", "v") for m in MEASURES)]
        for a, b in pairs
    ]
    head = ["layers", *(f"{name} {m}" for name in ("keys", "values") for m in MEASURES)]
    title = "How alike neighbours' keys and values are"
    return Figure("sharing", title, draw.svg(panels, alt), alt, says, head, table)


MEASURES = ("cka", "cosine")
