"""Everything that is asked of a model, as plain data: `measure` -> what probe.json holds, and maps.

Texts are looked at one by one, layers one by one (walk.py), so that memory holds the weights of the
model, one layer's rows and a strip of one attention matrix.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hymba import hub
from hymba.config import Config, ConfigError
from hymba.errors import UserError
from hymba.eval.probe.against import kept, refuse_twins
from hymba.eval.probe.attention import attention_rows, even_rows
from hymba.eval.probe.field import field
from hymba.eval.probe.hidden import channels, hidden_rows
from hymba.eval.probe.importance import MOST_HEADS, Part, branches, importance, single_heads
from hymba.eval.probe.magnitude import Magnitudes
from hymba.eval.probe.meta import domains
from hymba.eval.probe.share import KINDS, Reading, read
from hymba.eval.probe.sharing import KeysValues
from hymba.eval.probe.texts import Text
from hymba.eval.probe.texts import read as read_texts
from hymba.eval.probe.walk import Seen, start, walk
from hymba.eval.results import head
from hymba.model import accounting
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.weights import load

MAP_BYTES = 6 << 20  # of all maps in a page; single heads are left out of it where they are more
OURS = "probe takes Hymba and this package's own models (plans llama, mamba, samba included)"
Record = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How much is looked at; what is left out is said in the report."""

    tokens: int = 256  # of each text
    channels: int = 64  # of an SSM's, evenly spread
    shown: int = 96  # tokens of each text in the maps
    heads: bool | None = None  # take single heads away too; None: if there are not too many


@dataclass
class Found:
    """Readings of one text, layer by layer; None where a layer lacks the branch."""

    attention: list[Reading | None]
    ssm: list[Reading | None]

    def of(self, branch: str) -> list[Reading | None]:
        return self.attention if branch == "attention" else self.ssm


Tick = Callable[[str], None]  # told what was done, `steps` times in all


def parts_of(config: Config, limits: Limits) -> list[Part]:
    """What importance takes away."""
    heads = list(single_heads(config))
    wanted = len(heads) <= MOST_HEADS if limits.heads is None else limits.heads
    return [*branches(config), *(heads if wanted else [])]


def steps(config: Config, texts: int, limits: Limits) -> int:
    """How often `tick` is called."""
    walks = texts * (2 if config.meta_tokens else 1)
    return walks * config.num_layers + len(parts_of(config, limits))


def probe(
    name: str,
    files: Sequence[str],
    limits: Limits,
    device: str | None,
    command: Sequence[str],
    begin: Callable[[int], Tick] = lambda steps: lambda what: None,
    against: str | None = None,
) -> tuple[Record, Record]:
    """Load a model and texts, measure, and say how it was done: -> (probe.json, maps). Another
    model to set it `against` looks at the same texts first."""
    folder = model_folder(name)
    if against is None:
        return _probe(name, folder, files, limits, device, command, begin)
    second = model_folder(against)
    refuse_twins((name, folder), (against, second))
    few = dataclasses.replace(limits, heads=False)
    other = kept(_probe(against, second, files, few, device, command, begin)[0])
    found, maps = _probe(name, folder, files, limits, device, command, begin)
    return found | {"against": other}, maps


def model_folder(name: str) -> Path:
    """Where a model of ours is. What is wrong names it, since two may have been given."""
    folder = hub.find(name)
    try:
        Config.from_folder(folder)
    except ConfigError as error:
        said = str(error) if str(folder) in str(error) else f"{name}: {error}"
        raise UserError(said + (f": {OURS}" if "has model_type" in said else "")) from None
    return folder


def _probe(
    name: str,
    folder: Path,
    files: Sequence[str],
    limits: Limits,
    device: str | None,
    command: Sequence[str],
    begin: Callable[[int], Tick],
) -> tuple[Record, Record]:
    """One model, from its folder."""
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_folder(folder)
    model = load(folder, target, "float32")
    config = model.config
    limits = dataclasses.replace(limits, tokens=min(limits.tokens, config.max_positions))
    texts = read_texts(files, tokenizer, limits.tokens)
    started = time.perf_counter()
    found, maps = measure(model, texts, limits, begin(steps(config, len(texts), limits)))
    looked = min(limits.channels, config.inner_size)
    settings = {"model": config.to_dict(), "limits": dataclasses.asdict(limits)}
    about = {
        **head(settings, model.device, "probe", shlex.join(["hymba", *command])),
        "model": name,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": accounting.parameters(config)["total"],
        "meta_tokens": config.meta_tokens,
        "windows": [layer.window for layer in config.layers],
        "channels": f"{looked} of {config.inner_size}, evenly spread"
        if any(layer.ssm for layer in config.layers)
        else "none",
        "texts": [
            {
                "name": text.name,
                "tokens": len(text.ids),
                "whole": text.whole,
                "note": "" if text.whole else ", its beginning",
            }
            for text in texts
        ],
    }
    return about | found, maps


def measure(
    model: LanguageModel, texts: list[Text], limits: Limits, tick: Tick = lambda what: None
) -> tuple[Record, Record]:
    """-> (every number, the maps)."""
    config = model.config
    looker = _Looker(model, texts, limits, tick)
    with_meta = {text.name: looker.look(text) for text in texts}
    without: dict[str, Found] = {}
    if config.meta_tokens:
        without = {text.name: looker.look(text, with_meta=False) for text in texts}
    parts = parts_of(config, limits)
    ids = {text.name: text.ids for text in texts}
    loss = importance(model, ids, parts, lambda: tick("taking parts away"))
    result = {
        "branches": [name for name in ("attention", "ssm") if _has(config, name)],
        "shares": _shares(with_meta),
        "even": _even(config, texts, config.meta_tokens),
        "even_without_meta": _even(config, texts, 0) if config.meta_tokens else None,
        "shares_without_meta": _shares(without) if without else None,
        "meta": _meta(with_meta) if config.meta_tokens and _has(config, "attention") else None,
        "magnitudes": [each.result() for each in looker.magnitudes],
        "importance": loss,
        "field": _fields(with_meta),
        "field_without_meta": _fields(without) if without else None,
        "kv": looker.kv.result() if len(config.kv_owners) > 1 else None,
    }
    return result, _maps(with_meta, texts, looker)


def _has(config: Config, branch: str) -> bool:
    return any(getattr(layer, branch) for layer in config.layers)


class _Looker:
    """Takes texts through the model; what all texts together tell is added up here."""

    def __init__(self, model: LanguageModel, texts: list[Text], limits: Limits, tick: Tick):
        self.model, self.limits, self.tick = model, limits, tick
        self.magnitudes = [Magnitudes() for _ in model.config.layers]
        self.kv = KeysValues()
        self.chosen = channels(model.config.inner_size, limits.channels)
        self.each_head = map_size(model.config, texts, limits) <= MAP_BYTES

    def look(self, text: Text, with_meta: bool = True) -> Found:
        """One text; without the meta tokens only for its readings, which no map shows."""
        meta = self.model.config.meta_tokens if with_meta else 0
        found = Found([], [])
        _, road = start(self.model, [text.ids], with_meta)
        for seen in walk(self.model, [text.ids], with_meta):
            if not torch.isfinite(seen.x).all():
                raise UserError(
                    f"layer {seen.number} gives numbers that are not finite for {text.name}:"
                    " is this a trained model, and are its files whole?"
                )
            self.read(seen, found, meta, self.limits.shown if with_meta else 0)
            if with_meta:
                self.magnitudes[seen.number].add(seen, meta)
                self.kv.add(seen, road.rope, meta)
            self.tick(f"{text.name}{'' if with_meta else ' without meta tokens'}")
        return found

    def read(self, seen: Seen, found: Found, meta: int, shown: int) -> None:
        attention = ssm = None
        if seen.layer.attention:
            attention = read(attention_rows(seen, meta), meta, shown, self.each_head)
        if seen.layer.ssm:
            ssm = read(hidden_rows(seen, self.chosen), meta, shown)
        found.attention.append(attention)
        found.ssm.append(ssm)


def map_size(config: Config, texts: list[Text], limits: Limits) -> int:
    """Weights in the maps if each head of attention has its own."""
    heads = sum(config.num_heads * x.attention + x.ssm for x in config.layers)
    shown = [min(limits.shown, len(text.ids)) for text in texts]
    return sum(n * (config.meta_tokens + n) for n in shown) * heads


def _each(found: dict[str, Found], branch: str) -> Iterator[tuple[str, list[Reading | None]]]:
    for name, one in found.items():
        if any(reading is not None for reading in one.of(branch)):
            yield name, one.of(branch)


def _shares(found: dict[str, Found]) -> Record:
    """{branch: a row a layer, mean over texts; the texts' own rows; attention by head too}."""
    result: Record = {}
    for branch in ("attention", "ssm"):
        by_text = {name: readings for name, readings in _each(found, branch)}
        if not by_text:
            continue
        rows = [
            _layer_row([x for x in at if x is not None], branch)
            for at in zip(*by_text.values(), strict=True)
        ]
        result[branch] = {
            "layers": rows,
            "mean": _mean_row([row for row in rows if row is not None]),
            "by_text": {
                name: [None if x is None else _row([x]) for x in readings]
                for name, readings in by_text.items()
            },
        }
    return result  # fmt: skip


def _even(config: Config, texts: list[Text], meta: int) -> list[Record | None]:
    """A row a layer, as in shares: attention spread evenly over all that its rows see."""

    @cache
    def row(window: int | None) -> Record:
        totals = [meta + len(text.ids) for text in texts]
        return _row([read(even_rows(total, window, meta), meta, 0) for total in totals])

    return [row(layer.window) if layer.attention else None for layer in config.layers]


def _row(readings: list[Reading]) -> Record:
    """Means over heads and texts, as many texts as readings."""
    share = torch.stack([x.share.mean(0) for x in readings]).mean(0)
    return {
        **dict(zip(KINDS, share.tolist(), strict=True)),
        "entropy_bits": _mean([float(x.entropy.mean()) for x in readings]),
        "distance": _mean([float(x.distance.mean()) for x in readings]),
    }


def _layer_row(readings: list[Reading], branch: str) -> Record | None:
    if not readings:
        return None
    row = _row(readings)
    if branch == "attention":
        share = torch.stack([x.share for x in readings]).mean(0)  # (H, 4)
        entropy = torch.stack([x.entropy for x in readings]).mean(0)
        row["heads"] = [
            {**dict(zip(KINDS, each, strict=True)), "entropy_bits": bits}
            for each, bits in zip(share.tolist(), entropy.tolist(), strict=True)
        ]
    return row


def _mean_row(rows: list[Record]) -> Record:
    return {key: _mean([row[key] for row in rows]) for key in rows[0] if key != "heads"}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _meta(found: dict[str, Found]) -> Record:
    return domains({
        name: torch.stack([x.firing.mean(1) for x in one.attention if x is not None], dim=1)
        for name, one in found.items()
    })  # fmt: skip


def _fields(found: dict[str, Found]) -> Record:
    """Equation 5 for each text, and their mean; tokens back of each layer's last token."""
    by_text, layers = {}, {}
    for name, one in found.items():
        reach = [
            {
                branch: float(x.reach.mean())
                for branch in ("attention", "ssm")
                if (x := one.of(branch)[i]) is not None
            }
            for i in range(len(one.attention))
        ]
        by_text[name], layers[name] = field(reach), reach
    kinds = next(iter(by_text.values()))
    mean = {kind: _mean([each[kind] for each in by_text.values()]) for kind in kinds}
    return {"mean": mean, "by_text": by_text, "reach": layers}


def _maps(found: dict[str, Found], texts: list[Text], looker: _Looker) -> Record:
    """Weights of the first tokens of each text: {"texts": {name: {"tokens", branch: [a layer's
    {"mean": rows, "heads": [rows] or None} or None]}}}."""
    result: Record = {}
    for text in texts:
        entry: Record = {"tokens": text.pieces[: looker.limits.shown]}
        for branch in ("attention", "ssm"):
            readings, heads = found[text.name].of(branch), looker.each_head
            if any(x is not None for x in readings):
                entry[branch] = [_map(x, heads and branch == "attention") for x in readings]
        result[text.name] = entry
    return {"texts": result, "heads": looker.each_head}


def _map(reading: Reading | None, heads: bool) -> Record | None:
    if reading is None:
        return None
    pattern = reading.pattern
    return {"mean": pattern.mean(0), "heads": list(pattern) if heads else None}
