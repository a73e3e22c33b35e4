"""What a fine-tuning is to do, decided before the first step: lines, tokens, model, precision.

Whatever can be wrong with the data, the model or the folder is found here.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hymba.finetune.folder import Folder, fingerprint
from hymba.finetune.lines import Example, objective_of, read
from hymba.finetune.masks import IGNORE, Encoder, Learnt, Pair, length, longest
from hymba.finetune.settings import FinetuneError, Objective, Settings
from hymba.finetune.template import with_template
from hymba.finetune.trainers import say
from hymba.hub import find
from hymba.tokenizer import Tokenizer
from hymba.weights import TOKENIZER_FILES


@dataclass(frozen=True)
class Plan:
    """Settings, and what follows from them, the files and the machine."""

    settings: Settings
    objective: Objective
    precision: str
    base: Path
    folder: Folder
    tokenizer: Tokenizer
    examples: list[Example]
    held_out: list[Example]

    @property
    def how(self) -> str:
        return f"{self.objective}, {self.settings.method}"


def make_plan(settings: Settings) -> Plan:
    """Read the lines, find the model; UserError, one line, where something cannot be."""
    assert settings.out is not None
    given = [example for path in settings.data for example in read(path)]
    file = None if not settings.held_out or _share(settings.held_out) else Path(settings.held_out)
    held_out = read(file) if file else []
    objective = objective_of([*given, *held_out], settings.objective)
    if settings.packing and objective == "dpo":
        raise FinetuneError("--packing is for sft: pairs are compared one by one")
    base = find(settings.model)
    if base.resolve().is_relative_to(settings.out.resolve()):  # --fresh would delete it
        raise FinetuneError("--out is the model's own folder, or around it: name another one")
    precision = settings.precision or ("bfloat16" if _on_gpu(settings) else "float32")
    asked = {
        **settings.deciding(),
        "objective": objective,
        "lr": settings.rate(objective),
        "precision": precision,
        "base": fingerprint(_base_files(base)),
        "data": fingerprint(settings.data),
        "held-out data": fingerprint([file]) if file else settings.held_out,
    }
    if not file:
        given, held_out = _split(given, settings)
    tokenizer = with_template(Tokenizer.from_folder(base))
    folder = Folder(settings.out, asked)
    return Plan(settings, objective, precision, base, folder, tokenizer, given, held_out)


def _on_gpu(settings: Settings) -> bool:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise FinetuneError("there is no CUDA device: leave --device out, or say cpu")
    count = torch.cuda.device_count() if settings.device != "cpu" else 0
    if count > 1 and not torch.distributed.is_torchelastic_launched():
        raise FinetuneError(
            f"{count} GPUs are in sight: start a process for each (torchrun --nproc-per-node"
            f" {count} -m hymba finetune ...), or set CUDA_VISIBLE_DEVICES=0"
        )
    return count > 0


def _share(held_out: str) -> float | None:
    """5% -> 0.05; None where it is no share but a file's name."""
    if not held_out.endswith("%"):
        return None
    try:
        share = float(held_out[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise FinetuneError(f"--held-out {held_out} must be above 0% and below 100%")
    return share


def _split(given: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    share = _share(settings.held_out) if settings.held_out else None
    if share is None:
        return given, []
    count = max(1, round(share * len(given)))
    if count >= len(given):
        raise FinetuneError(f"--held-out {settings.held_out} leaves nothing to train on")
    chosen = set(random.Random(settings.seed).sample(range(len(given)), count))
    kept = [example for i, example in enumerate(given) if i not in chosen]
    return kept, [given[i] for i in sorted(chosen)]


def _base_files(base: Path) -> list[Path]:
    names = ("config.json", *TOKENIZER_FILES)
    return [f for name in names if (f := base / name).is_file()] + sorted(
        base.glob("*.safetensors")
    )


# ---- tokens


@dataclass(frozen=True)
class Data:
    """Tokens to train on and to look at, and what is told about them."""

    train: Sequence[Learnt | Pair]
    held_out: Sequence[Learnt | Pair]
    facts: dict[str, Any]


def make_data(plan: Plan) -> Data:
    """Encode all lines, leave out those too long, and say so."""
    encoder = Encoder(plan.tokenizer)
    encode = encoder.pair if plan.objective == "dpo" else encoder.learnt
    limit = limit_of(plan)
    parts, left_out, most = [], 0, 0
    for examples in (plan.examples, plan.held_out):
        tokens: list[Learnt | Pair] = [encode(example) for example in examples]
        fitting = [example for example in tokens if length(example) <= limit]
        left_out, most = left_out + len(tokens) - len(fitting), max(most, longest(tokens))
        if tokens and not fitting:
            raise FinetuneError(
                f"every line is longer than {limit} tokens (the longest {most:,}): raise"
                " --max-length, as far as the model has positions"
            )
        parts.append(fitting)
    facts = {
        "lines": len(parts[0]),
        "held_out_lines": len(parts[1]),
        "left_out": left_out,
        "longest": most,
        "tokens": sum(map(_count, parts[0])),
        "learnt_tokens": sum(map(_learnt, parts[0])),
    }
    _tell_data(plan, facts, limit)
    _warn_of_ends(plan, encoder)
    return Data(parts[0], parts[1], facts)


def limit_of(plan: Plan) -> int:
    """Tokens of a line at most: as asked, as far as the model has positions."""
    config = json.loads((plan.base / "config.json").read_text(encoding="utf-8"))
    return min(plan.settings.max_length, config.get("max_position_embeddings", 1 << 30))


def _count(example: Learnt | Pair) -> int:
    if isinstance(example, Pair):
        return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)
    return len(example.ids)


def _learnt(example: Learnt | Pair) -> int:
    if isinstance(example, Pair):
        return len(example.chosen) + len(example.rejected)
    return sum(label != IGNORE for label in example.labels)


def _tell_data(plan: Plan, facts: dict[str, Any], limit: int) -> None:
    kind = "preferences" if plan.objective == "dpo" else "lines"
    held = f", {facts['held_out_lines']:,} held out" if plan.held_out else ""
    say(
        f"data      {facts['lines']:,} {kind}{held}; {facts['tokens']:,} tokens,"
        f" {facts['learnt_tokens']:,} of them learnt"
    )
    if facts["left_out"]:
        say(
            f"          {facts['left_out']:,} are longer than {limit:,} tokens (the longest"
            f" {facts['longest']:,}) and are left out"
        )


def _warn_of_ends(plan: Plan, encoder: Encoder) -> None:
    """A model that ends its answers with another token than `hymba chat` waits for talks on."""
    config = json.loads((plan.base / "config.json").read_text(encoding="utf-8"))
    odd = encoder.ends - {plan.tokenizer.eos_id, config.get("eos_token_id")}
    if odd:
        names = ", ".join(plan.tokenizer.token_bytes(end).decode() for end in sorted(odd))
        print(
            f"hymba: answers end with {names} in this chat template, which neither config.json nor"
            " the tokenizer names as eos_token: chats will not stop there",
            file=sys.stderr,
        )
