"""`hymba train RECIPE --key value ...`: train a model as a recipe says, with single fields changed.

The same command goes on where a run stopped; torchrun starts it in several processes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.config import Config
from hymba.errors import UserError
from hymba.files import write_json
from hymba.recipes import RECIPES, recipe
from hymba.train.config import TrainConfig

if TYPE_CHECKING:
    from hymba.model.decoder import LanguageModel
    from hymba.tokenizer import Tokenizer

EXAMPLES = (
    "",
    "--steps 1000 --schedule.peak 1e-3 --folder runs/longer",
    "--data.sources corpus.jsonl=0.8 python=0.2 --track tensorboard",
    "--model hymba-350m --data.sources texts/ --precision bfloat16",
    "--print",
)
MODEL = "model"  # the folder within a run's that the trained model goes to


@dataclass(frozen=True)
class Options:
    """Train a model as a recipe says."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    print: bool = False
    """Show all settings as JSON, and do nothing."""
    device: str | None = None
    """cpu or cuda; without it a GPU where there is one."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = argv
    base = recipe(name)
    options = parse(Options, rest, f"train {name}", EXAMPLES, Options(base), registry())
    if options.print:
        print(json.dumps(as_json(options.config), indent=2))
        return 0
    choose_threads(options.threads)
    return _run(options.config, options.device, ["train", *argv])


def _help() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in RECIPES.items()]
    return "\n".join(
        [
            "usage: hymba train RECIPE [--key value ...]",
            "",
            "Train a model as a recipe says. The same command goes on where a run stopped.",
            "",
            "recipes:",
            *lines,
            f"  {'FILE.py:FUNCTION':<{width}}  a function of yours that returns a TrainConfig",
            "",
            "examples:",
            *(f"  hymba train tiny {example}".rstrip() for example in EXAMPLES),
            "  torchrun --nproc-per-node 8 -m hymba train hymba-350m --data.sources texts/",
            "",
            "hymba train RECIPE --help lists the keys.",
        ]
    )


def registry() -> tyro.constructors.ConstructorRegistry:
    """A model on the command line is a preset's name, or a folder with a config.json."""
    found = tyro.constructors.ConstructorRegistry()

    @found.primitive_rule
    def model(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type not in (Config, Config | None):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PRESET|FOLDER",
            instance_from_str=lambda given: _model(given[0]),
            is_instance=lambda value: value is None or isinstance(value, Config),
            str_from_instance=lambda value: [_words(value)],
        )

    return found


def _model(name: str) -> Config:
    return Config.from_folder(name) if Path(name).is_dir() else Config.preset(name)


def _words(config: Config | None) -> str:
    from hymba.model.accounting import parameters

    if config is None:
        return "none"
    return f"{config.num_layers} layers, {parameters(config)['total'] / 1e6:.1f}M parameters"


def as_json(config: TrainConfig) -> dict[str, Any]:
    """All settings, readable by machines; the model as its config.json."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain["model"] = config.model and config.model.to_dict()
    read: dict[str, Any] = json.loads(json.dumps(plain, default=_as_json))
    return read


def _as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


# ---- the run


def _run(config: TrainConfig, device: str | None, command: list[str]) -> int:
    from hymba.train import Trainer, open_data
    from hymba.train.parallel import gathered, join

    with join(device) as (world, own):
        say = print if world.first else _nothing
        with world.in_turn(), bar(world.first) as progress:
            data = open_data(config.data, progress)
        for line in data.facts:
            say(line)
        model = _build(config, data.tokenizer)
        say(f"{_words(model.config)}, {config.tokens:,} tokens a step, {own.type}")
        trainer = Trainer(model.to(own), config, data.rows, data.held_out, say, world)
        result = trainer.run(lambda: _write_settings(config, command))
        if result.stopped:
            return 130
        whole = gathered(trainer.model, world)
        if whole is not None:
            _finish(whole, config.folder / MODEL, data.tokenizer, result.bits_per_byte)
    return 0


def _nothing(_: str) -> None:
    pass


def _build(config: TrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """The model that the run begins with, in float32, with the tokenizer's ids."""
    from hymba.model.decoder import LanguageModel
    from hymba.model.packed import schemes_of
    from hymba.weights import load

    if config.start_from is not None:
        model = load(config.start_from, dtype="float32")
        if schemes_of(model):
            raise UserError(
                f"{config.start_from} has quantised weights, which cannot be trained: start from"
                " the model as it was trained"
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{config.start_from} knows {model.config.vocab_size} tokens, the data has"
                f" {tokenizer.vocab_size}: --data.tokenizer {config.start_from}"
            )
        if _reads_otherwise(model, tokenizer):
            raise UserError(
                f"{config.start_from} has learnt another tokenizer's tokens than the data's:"
                f" --data.tokenizer {config.start_from}"
            )
        if config.extension.share and model.config.rope_type == "ntk":
            raise UserError(
                f"{config.start_from} has the rotary base of longer rows already: --extension.share"
                " 0, and --sequence-length as long as you like"
            )
        return model.train()
    if config.model is None:
        raise UserError("the recipe names no model: --model PRESET, or a folder with a config.json")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    pad = {"pad_token_id": tokenizer.pad_id}
    plan = config.model.replace(vocab_size=tokenizer.vocab_size, **ids, **pad)
    return LanguageModel(plan).init_weights(config.seed, config.dt_start)


def _reads_otherwise(model: LanguageModel, tokenizer: Tokenizer) -> bool:
    """Whether the folder that a model came from has a tokenizer, and another one."""
    if model.folder is None or not (model.folder / "tokenizer.json").is_file():
        return False
    return type(tokenizer).from_folder(model.folder).fingerprint != tokenizer.fingerprint


def _write_settings(config: TrainConfig, command: list[str]) -> None:
    import platform

    import torch

    from hymba import __version__

    versions = {
        "hymba": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    settings = {"command": ["hymba", *command], "versions": versions, "settings": as_json(config)}
    write_json(config.folder / "run.json", settings)


def _finish(model: LanguageModel, folder: Path, tokenizer: Tokenizer, bits: float | None) -> None:
    from hymba.weights import save

    save(model, folder, tokenizer)
    if bits is not None:
        print(f"held out  {bits:.4f} bits per byte")
    print(f"model     {folder}  (hymba.load or transformers read it)")
    print(f'go on     hymba generate {folder} "import os" --max-tokens 100', file=sys.stdout)
