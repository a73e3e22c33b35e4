"""`hymba finetune MODEL --data chats.jsonl --out folder`: the options; `hymba.finetune` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from hymba.commands import choose_threads, parse
from hymba.finetune.settings import Settings

EXAMPLES = (
    "runs/demo/hymba --data chats.jsonl --out runs/chat",
    "nvidia/Hymba-1.5B-Base --data chats.jsonl --out runs/chat --method lora --held-out 5%",
    "runs/chat --data preferences.jsonl --out runs/preferred",
    "runs/demo/hymba --data chats.jsonl --out runs/chat --packing --rows 8 --epochs 3",
)


@dataclass(frozen=True)
class Options(Settings):
    """Fine-tune a model on chats, or on preferences (DPO). Ctrl-C keeps what is done and the same
    command goes on; the result is a model folder for `hymba chat` and every other command.

    A line of the data is {"messages": [{"role", "content"}, ...]}, of which what the assistant says
    is learnt; {"prompt", "completion"}; or {"prompt", "chosen", "rejected"}. Text stays plain text,
    messages go through the tokenizer's chat template, or one that is written where it has none."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "finetune", EXAMPLES)
    options.check()
    from hymba.finetune.run import run

    choose_threads(options.threads)
    return run(options)
