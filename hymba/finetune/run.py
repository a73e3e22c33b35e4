"""One fine-tuning, from settings to a model folder.

code = run(Settings("runs/demo/hymba", data=(Path("chats.jsonl"),), out=Path("runs/chat")))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import PrinterCallback  # what the trainer prints by default

from hymba.finetune import result, trainers
from hymba.finetune.folder import Found, step_of
from hymba.finetune.masks import Encoder, longest
from hymba.finetune.plan import Data, Plan, limit_of, make_data, make_plan
from hymba.finetune.settings import FinetuneError, Settings
from hymba.finetune.trainers import say
from hymba.hf import HymbaForCausalLM
from hymba.tokenizer import Tokenizer
from hymba.train.claim import LOCK, claimed
from hymba.train.stop import stop_signals

INTERRUPTED = 130


def run(settings: Settings) -> int:
    """Train, or go on with what is in the folder. The exit code: 0, or 130 where it was stopped."""
    settings.check()
    trainers.quiet()
    plan = make_plan(settings)
    found = plan.folder.look(settings.fresh)
    if found == "a result":
        say(f"{plan.folder.path} is done already; --fresh would make it anew")
        result.tell(plan)
        return 0
    data = make_data(plan)
    with _alone(plan.folder.path):
        _begin(plan, plan.folder.look(settings.fresh))  # once more: another may have ended just now
        return _train(plan, data)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """FinetuneError where another fine-tuning goes on in the folder. Of several processes the first
    claims it for all."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with claimed(folder) as ours:
        if not ours:
            raise FinetuneError(f"another fine-tuning is going on in {folder}: name another --out")
        yield
        (folder / LOCK).unlink(missing_ok=True)


def _begin(plan: Plan, found: Found) -> None:
    """Of several processes one makes the folder, when all have seen what was in it."""
    if "WORLD_SIZE" not in os.environ:
        return plan.folder.begin(found)
    state = PartialState(cpu=plan.settings.device == "cpu" or not torch.cuda.is_available())
    state.wait_for_everyone()
    if state.is_main_process:
        plan.folder.begin(found)
    state.wait_for_everyone()


def _train(plan: Plan, data: Data) -> int:
    latest = plan.folder.latest()
    done = 0 if latest is None else step_of(latest)
    trainer = _trainer(plan, data)
    watch = trainers.Watch(plan.folder, plan.settings, done, trainer.is_world_process_zero())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    _tell_model(plan, trainer)
    if latest is not None:
        say(f"going on after step {done}")
        trainer.args.eval_on_start = False
    with stop_signals() as watch.stop:
        try:
            trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
        finally:
            watch.close()
    if watch.interrupted:
        say(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, saved")
        say("the same command goes on from there")
        return INTERRUPTED
    if data.held_out and watch.held_out.get("step") != trainer.state.global_step:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        result.save(plan, data, trainer)
        result.tell(plan)
    trainer.accelerator.wait_for_everyone()
    return 0


def _trainer(plan: Plan, data: Data) -> Any:
    """TRL's trainer for this plan, with the model in it."""
    settings = plan.settings
    limit = max(longest(data.train), 2) if not settings.packing else limit_of(plan)
    arguments = trainers.arguments(settings, plan.objective, plan.precision, plan.folder, limit)
    rows = trainers.dpo_rows if plan.objective == "dpo" else trainers.sft_rows
    encoder = Encoder(plan.tokenizer)
    common: dict[str, Any] = {
        "model": _model(plan),
        "args": arguments,
        "train_dataset": rows(data.train),  # type: ignore[arg-type]
        "eval_dataset": rows(data.held_out) if data.held_out else None,  # type: ignore[arg-type]
        "processing_class": encoder.hf,
        "peft_config": trainers.adapter(settings),
    }
    if plan.objective == "sft":
        return trainers.Sft(**common)
    # With an adapter the model without it is the reference; else it is a second copy.
    reference = _model(plan).eval() if settings.method == "full" else None
    return trainers.Dpo(**common, ref_model=reference)


def _model(plan: Plan) -> HymbaForCausalLM:
    """What is trained is float32 (a rate of 1e-5 moves no bfloat16 weight); a frozen base may be
    bfloat16, PEFT keeps the adapter's own weights in float32."""
    frozen = plan.settings.method != "full"
    narrow = frozen and plan.precision == "bfloat16"
    dtype = torch.bfloat16 if narrow else torch.float32
    model: HymbaForCausalLM = HymbaForCausalLM.from_pretrained(plan.base, dtype=dtype)
    return model


def _tell_model(plan: Plan, trainer: Any) -> None:
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    own = Tokenizer.from_folder(plan.base).has_chat_template
    settings = plan.settings
    say(
        f"model     {settings.model}, {plan.precision} on {trainer.args.device}, chat format"
        f" {'its own' if own else 'of the released Instruct model'}"
    )
    what = (
        "every weight" if settings.method == "full" else f"{settings.method} rank {settings.rank}"
    )
    say(
        f"training  {plan.objective}, {what}: {trained:,} of {total:,} parameters,"
        f" {settings.rows} rows a step, lr {settings.rate(plan.objective):.1e}"
    )
