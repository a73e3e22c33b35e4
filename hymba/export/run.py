"""Write a folder that devices without Python can run: graphs, weights, tokenizer, sizes.

    model.onnx       a chunk of tokens and the cache before it -> logits and the cache after it
    start.onnx       room -> the cache before the first token: what the meta tokens left, and zeros
    weights.bin      both graphs' numbers
    tokenizer.json   and its companions, where the model has one
    hymba.json       names and shapes of the cache, sizes, the ids that end a text

The files appear together, when all are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, TensorProto, helper

from hymba import __version__
from hymba.cache import State
from hymba.config import Config
from hymba.export.decoder import Writer
from hymba.export.graph import MICROSOFT, Data, Graph, value
from hymba.export.layout import ROOM, Entry, entries
from hymba.export.linear import ExportError, check_scheme
from hymba.export.meta import meta_states
from hymba.files import filled, is_empty, write_json
from hymba.model.decoder import LanguageModel
from hymba.model.packed import schemes_of
from hymba.tokenizer import TOKENIZER_FILES

MODEL, START, WEIGHTS, TOLD = "model.onnx", "start.onnx", "weights.bin", "hymba.json"
FORMAT, VERSION = "hymba-onnx", 1
OPSET, IR = 17, 8  # as old as the ops allow: runtimes of 2022 read them


@dataclass(frozen=True)
class Choices:
    """chunk: the most tokens of one run. accuracy: MatMulNBits' accuracy_level, 4 for activations
    in int8, 1 for float32."""

    chunk: int = 128
    accuracy: int = 4


def export(
    model: LanguageModel,
    folder: str | Path,
    choices: Choices = Choices(),
    force: bool = False,
    progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> None:
    """Write `model` as a folder for onnxruntime. `progress` is told ("writing", layers done, of
    how many).

    Weights become float32, those of a packed model keep their codes. Raises ExportError, one line,
    for modules that are neither (adapters), codes that are floats, and for a folder that is there
    without `force`."""
    target = Path(folder)
    check_folder(target, force)
    for scheme in schemes_of(model).values():
        check_scheme(scheme)
    count = model.config.num_layers
    with filled(target, replaced=TOKENIZER_FILES) as unfinished:
        _fill(model, unfinished, choices, lambda done: progress("writing", done, count))


def check_folder(folder: Path, force: bool) -> None:
    """ExportError where writing would destroy something that is not ours, or not meant."""
    if not folder.exists() or (folder.is_dir() and is_empty(folder)):
        return
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file: name a new folder")
    if not (folder / TOLD).is_file():
        raise ExportError(f"{folder} holds something else: name a new folder")
    if not force:
        raise ExportError(f"{folder} holds an exported model: --force writes it anew")


def _fill(
    model: LanguageModel, folder: Path, choices: Choices, tick: Callable[[int], None]
) -> None:
    config, metas = model.config, meta_states(model.decoder)
    tick(0)
    cache = entries(config, choices.chunk)
    with Data(folder / WEIGHTS) as data:
        graph = _model_graph(model, data, metas, cache, choices, tick)
        _save(graph, folder / MODEL)
        _save(_start_graph(config, data, metas, cache), folder / START)
    if model.folder is not None:
        for name in TOKENIZER_FILES:
            if (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, folder / name)
    write_json(folder / TOLD, _told(model, cache, choices))
    for name in (MODEL, START):
        onnx.checker.check_model(str(folder / name))


def _model_graph(
    model: LanguageModel,
    data: Data,
    metas: Sequence[State],
    cache: Sequence[Entry],
    choices: Choices,
    tick: Callable[[int], None],
) -> GraphProto:
    graph = Graph(data)
    Writer(graph, model, list(metas), choices.chunk, choices.accuracy).write(tick)
    kind = TensorProto.INT64
    inputs = [value("ids", ["tokens"], kind), value("past", [1], kind)]
    inputs += [value(f"past.{entry.name}", entry.shape) for entry in cache]
    outputs = [value("logits", [1, model.config.vocab_size])]
    outputs += [value(f"present.{entry.name}", entry.shape) for entry in cache]
    return graph.proto("hymba", inputs, outputs)


def _start_graph(
    config: Config, data: Data, metas: Sequence[State], cache: Sequence[Entry]
) -> GraphProto:
    """No text yet: empty rings and buffers, and states as the meta tokens left them."""
    graph = Graph(data)
    for name, shape in cache:
        layer, what = name.split(".")
        meta = metas[int(layer)]
        left = {"conv": meta.conv, "state": None if meta.ssm is None else meta.ssm.mT}.get(what)
        if left is not None:
            known = graph.weight(f"start.{name}", left[0].detach().float().numpy())
            graph.op("Identity", known, output=f"past.{name}")
            continue
        sizes = [ROOM if size == ROOM else graph.ints(int(size)) for size in shape]
        graph.op("ConstantOfShape", graph.op("Concat", *sizes, axis=0), output=f"past.{name}")
    outputs = [value(f"past.{entry.name}", entry.shape) for entry in cache]
    return graph.proto("start", [value(ROOM, [1], TensorProto.INT64)], outputs)


def _save(graph: GraphProto, path: Path) -> None:
    sets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(
        graph,
        opset_imports=sets,
        ir_version=IR,
        producer_name="hymba",
        producer_version=__version__,
    )
    path.write_bytes(model.SerializeToString())


def _told(model: LanguageModel, cache: Sequence[Entry], choices: Choices) -> dict[str, Any]:
    """What a program must know that runs the folder."""
    config = model.config
    packed = {scheme.name for scheme in schemes_of(model).values()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "weights": sorted(packed) or ["float32"],
        "vocabulary": config.vocab_size,
        "chunk": choices.chunk,
        "positions": config.max_positions,
        "begin": config.bos_token_id,
        "end": _ends(model),
        "cache": {entry.name: list(entry.shape) for entry in cache},
    }


def read_told(folder: str | Path) -> dict[str, Any]:
    """What a folder says of itself."""
    found: dict[str, Any] = json.loads((Path(folder) / TOLD).read_text(encoding="utf-8"))
    return found


def _ends(model: LanguageModel) -> list[int]:
    """Ids that end a text, as the folder's generation_config.json says or the config does."""
    ends: Any = model.config.eos_token_id
    if model.folder is not None and (path := model.folder / "generation_config.json").is_file():
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", ends)
    return [] if ends is None else ends if isinstance(ends, list) else [ends]
