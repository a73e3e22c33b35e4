"""The end of a fine-tuning: the adapter merged in, a normal model folder, and its record."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hymba import __version__
from hymba.finetune.folder import ADAPTER, METRICS
from hymba.finetune.plan import Data, Plan
from hymba.finetune.trainers import say
from hymba.hf import HymbaForCausalLM
from hymba.train import metrics

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
CARD = """---
library_name: hymba
pipeline_tag: text-generation
---
Made by `hymba finetune` from {model} ({how}); finetune.json has the settings and the results.
`hymba chat` runs this folder, and transformers reads it after `import hymba.hf`.
"""


def save(plan: Plan, data: Data, trainer: Any) -> None:
    """Write the result beside the checkpoints, then move it to its place: all of it or nothing."""
    result = plan.folder.training / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if plan.settings.method != "full":
        model.peft_config["default"].base_model_name_or_path = plan.settings.model
        model.save_pretrained(result / ADAPTER, save_embedding_layers=False)
        (result / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's form, not filled in
        model = merged(model)
    _write_model(plan, model, result)
    plan.folder.finish(result, _record(plan, data, trainer))


def merged(model: Any) -> Any:
    """A PEFT model with its adapter in the weights, in float32: bfloat16 would round it away."""
    return model.float().merge_and_unload()


def _write_model(plan: Plan, model: Any, place: Path) -> None:
    """The files of a checkpoint, those as the base has them that training does not change: trl has
    written settings of its own into the model's config."""
    original = HymbaForCausalLM.config_class.from_pretrained(plan.base)
    if original.dtype is not None:
        model.to(original.dtype)
    card = CARD.format(model=plan.settings.model, how=plan.how)
    (place / "README.md").write_text(card, encoding="utf-8")
    model.save_pretrained(place)
    plan.tokenizer.save(place)
    for name in ("config.json", "generation_config.json", "LICENSE"):
        if (plan.base / name).is_file():
            shutil.copyfile(plan.base / name, place / name)


def _record(plan: Plan, data: Data, trainer: Any) -> dict[str, Any]:
    told = metrics.read(plan.folder.path / METRICS)
    steps = [r for r in told if "loss" in r]
    looks = [r for r in told if "held_out_loss" in r]
    return {
        "settings": plan.settings.to_dict(),
        "data": data.facts,
        "versions": _versions(),
        "device": str(trainer.args.device),
        "steps": trainer.state.global_step,
        "seconds": sum(r["seconds"] for r in steps),
        "first": steps[0] if steps else {},
        "last": steps[-1] if steps else {},
        "held_out_before": looks[0] if looks else {},
        "held_out_after": looks[-1] if looks else {},
    }


def _versions() -> dict[str, str]:
    found = {"hymba": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def tell(plan: Plan) -> None:
    """Print what has come out."""
    record, path = plan.folder.record(), plan.folder.path
    steps, took = record["steps"], metrics.duration(record["seconds"])
    first, last = (record[name].get("loss", float("nan")) for name in ("first", "last"))
    say(f"result    {steps} steps in {took}, loss {first:.4f} -> {last:.4f}")
    before, after = record["held_out_before"], record["held_out_after"]
    if after:
        loss = f"{before['held_out_loss']:.4f} -> {after['held_out_loss']:.4f}"
        preferred = _change(before, after, "held_out_preferred", "chosen preferred")
        say(f"held out  loss {loss}{preferred}")
    say(f"model     {path}  (hymba chat {path})")
    if plan.settings.method != "full":
        say(f"adapter   {path / ADAPTER}  (PEFT reads it)")


def _change(before: dict[str, Any], after: dict[str, Any], key: str, words: str) -> str:
    if key not in after:
        return ""
    return f", {words} {before[key]:.1%} -> {after[key]:.1%}"
