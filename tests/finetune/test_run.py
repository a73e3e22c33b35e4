"""Fine-tunings of a tiny model, through TRL and PEFT, held against what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hymba.finetune import trainers
from hymba.finetune.folder import Folder
from hymba.finetune.lines import read
from hymba.finetune.masks import IGNORE, Encoder, Learnt
from hymba.finetune.run import run
from hymba.finetune.settings import FinetuneError, Settings
from hymba.finetune.template import with_template
from hymba.finetune.trainers import Watch
from hymba.hf import HymbaForCausalLM
from hymba.tokenizer import Tokenizer
from hymba.train import metrics
from hymba.train.claim import claimed

Tune = Callable[..., Path]
QUICK: dict[str, Any] = {"device": "cpu", "rows": 4, "micro_rows": 2, "max_length": 64, "lr": 3e-3}


@pytest.fixture
def tune(base: Path, write: Callable[..., Path], tmp_path: Path) -> Tune:
    """tune(lines, "name", **settings) -> the result's folder."""

    def make(lines: Sequence[Any], name: str = "out", model: Path = base, **options: Any) -> Path:
        data, out = write(lines), tmp_path / name
        settings = Settings(str(model), (data,), out, **{**QUICK, **options})
        assert run(settings) == 0
        return out

    return make


def steps(folder: Path) -> list[dict[str, Any]]:
    return [r for r in metrics.read(folder / "metrics.jsonl") if "loss" in r]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finetune.json").read_text())
    return found


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


# ---- what is trained


def test_the_loss_is_the_mean_over_learnt_tokens(
    tune: Tune, base: Path, chats: list[Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A whole epoch in one step: the first loss is that of the base model, summed over the
    learnt tokens of each chat alone and divided by their number. Padded, packed and in other
    micro-batches. A model that looked across packed chats, a label too many or a mean of means
    would give another."""
    lines = [*chats[:9], {"messages": [*chats[9]["messages"], *chats[10]["messages"]]}]
    model = HymbaForCausalLM.from_pretrained(base)
    encoder = Encoder(with_template(tokenizer))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nats = count = 0.0
    for example in read(tmp_path / "x.jsonl"):
        learnt = encoder.learnt(example)
        logs = logits(model, learnt.ids)[0].log_softmax(-1)
        for place, label in enumerate(learnt.labels):
            if label != IGNORE:
                nats, count = nats - float(logs[place - 1, label]), count + 1
    for i, options in enumerate(({"micro_rows": 5}, {"micro_rows": 1}, {"packing": True})):
        out = tune(lines, f"out{i}", rows=10, epochs=1, **options)
        [step] = steps(out)
        assert step["loss"] == pytest.approx(nats / count, rel=1e-5), options


def test_packs_hold_several_chats(chats: list[Any], tmp_path: Path, base: Path) -> None:
    """What the test above relies on."""
    settings = Settings(str(base), (tmp_path,), tmp_path, packing=True, **QUICK)
    trainers.quiet()
    arguments = trainers.arguments(settings, "sft", "float32", Folder(tmp_path, {}), 64)
    rows = trainers.sft_rows([Learnt([5] * 20, [5] * 20)] * 6)
    model = HymbaForCausalLM.from_pretrained(base)
    hf = Encoder(with_template(Tokenizer.from_folder(base))).hf
    trainer = trainers.Sft(model=model, args=arguments, train_dataset=rows, processing_class=hf)
    assert [list(row["seq_lengths"]) for row in trainer.train_dataset] == [[20] * 3] * 2


def test_it_learns_and_the_result_is_a_normal_folder(
    tune: Tune, base: Path, chats: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tune(chats, epochs=8, held_out="10%", lr=1e-2)
    told, found = capsys.readouterr().out, record(out)
    assert found["last"]["loss"] < 0.5 * found["first"]["loss"]
    assert (
        found["held_out_after"]["held_out_loss"] < 0.6 * found["held_out_before"]["held_out_loss"]
    )
    assert found["data"]["lines"] == 36 and found["data"]["held_out_lines"] == 4
    assert found["steps"] == len(steps(out)) == 8 * 9
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "eta", "epoch"} <= steps(out)[0].keys()
    assert "step 72/72  loss" in told and f"hymba chat {out}" in told
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "chat_template.jinja", "LICENSE"} <= names
    assert "training" not in names and "adapter" not in names
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((base / name).read_text()), name
    assert (
        load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    )
    answers(out, chats)


def answers(folder: Path, chats: list[Any]) -> None:
    """The engine, as `hymba chat` asks it: one of the words that were taught, and the end."""
    from hymba.engine import LLM, Sampling

    llm = LLM(folder, "cpu")
    lines, words = chats[:8], {line["messages"][1]["content"] for line in chats}
    prompts = [llm.tokenizer_or_error().chat(line["messages"][:1]) for line in lines]
    ends = (llm.tokenizer_or_error().eos_id,)
    said = list(llm.generate(prompts, Sampling(max_tokens=8, temperature=0, stop_ids=ends)))
    assert {o.text for o in said} <= words, [o.text for o in said]
    assert all(o.finish == "stop" for o in said)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_held_out_loss_is_a_mean_over_tokens(
    tune: Tune,
    base: Path,
    chats: list[Any],
    tokenizer: Tokenizer,
    write: Callable[..., Path],
    packing: bool,
) -> None:
    """Whatever the batches: long and short answers in the same file."""
    held_out = [
        {"prompt": "a", "completion": " red" * 12},
        {"prompt": "b", "completion": " blue"},
        {"prompt": "c", "completion": " green"},
    ]
    file = write(held_out, "held_out.jsonl")
    out = tune(chats[:4], held_out=str(file), held_out_every=1, packing=packing)
    looks = [r for r in metrics.read(out / "metrics.jsonl") if "held_out_loss" in r]
    assert [r["step"] for r in looks] == [0, 1]
    encoder = Encoder(with_template(tokenizer))
    for folder, look in ((base, looks[0]), (out, looks[1])):
        model, nats, count = HymbaForCausalLM.from_pretrained(folder), 0.0, 0
        for learnt in map(encoder.learnt, read(file)):
            labels = torch.tensor(learnt.labels[1:])
            logs = logits(model, learnt.ids)[0, :-1].log_softmax(-1)
            nats -= float(logs[range(len(labels)), labels.clamp(min=0)][labels != IGNORE].sum())
            count += int((labels != IGNORE).sum())
        assert look["held_out_loss"] == pytest.approx(nats / count, rel=1e-4)


# ---- adapters


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_is_merged_is_the_adapter(
    tune: Tune, base: Path, chats: list[Any], method: str, text: Callable[..., Tensor]
) -> None:
    from peft import PeftModel

    out = tune(chats[:16], method=method, epochs=4, lr=2e-2, rank=4, alpha=8)
    assert steps(out)[-1]["loss"] < steps(out)[0]["loss"] - 0.5
    files = {path.name for path in (out / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    ids = text(40).tolist()
    plain = logits(HymbaForCausalLM.from_pretrained(base), ids)
    merged = logits(HymbaForCausalLM.from_pretrained(out), ids)
    adapted = PeftModel.from_pretrained(HymbaForCausalLM.from_pretrained(base), out / "adapter")
    torch.testing.assert_close(merged, logits(adapted, ids), rtol=1e-3, atol=1e-4)
    assert (merged - plain).abs().max() > 0.1
    assert adapted.peft_config["default"].use_dora == (method == "dora")
    assert adapted.peft_config["default"].base_model_name_or_path == str(base)
    kinds = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters()}
    assert set(trainers.TARGETS) <= kinds


# ---- preferences


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dpo_raises_the_margin(tune: Tune, preferences: list[Any], method: str) -> None:
    """From zero, where model and reference are the same, and the loss is log 2."""
    out = tune(preferences, method=method, epochs=4, held_out="20%", rank=4)
    first, late = steps(out)[0], steps(out)[-5:]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3) and abs(first["margin"]) < 1e-5
    assert sum(step["margin"] for step in late) / 5 > 0.2
    assert sum(step["loss"] for step in late) / 5 < 0.62
    assert record(out)["settings"]["objective"] is None
    before, after = record(out)["held_out_before"], record(out)["held_out_after"]
    assert after["held_out_margin"] > 0.1 > before["held_out_margin"]
    assert after["held_out_preferred"] > 0.7


def test_an_adapter_needs_no_second_model(
    tune: Tune, preferences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = HymbaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        HymbaForCausalLM,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: made.append(1) or original(cls, *a, **k)),
    )
    tune(preferences[:4], "full")
    count = len(made)
    made.clear()
    tune(preferences[:4], "lora", method="lora")
    assert (count, len(made)) == (2, 1)


def test_preferences_can_be_answers(tune: Tune, preferences: list[Any]) -> None:
    out = tune(preferences, objective="sft")
    assert "margin" not in steps(out)[0] and steps(out)[0]["loss"] > 1


def test_a_single_step_learns(tune: Tune, chats: list[Any], base: Path) -> None:
    """A warm-up would give it the rate 0, and the base back as the result."""
    out = tune(chats[:4])
    assert [r["lr"] for r in steps(out)] == [QUICK["lr"]]
    assert not same_weights(base, out)


def test_seeds_are_what_numpy_takes(tune: Tune, chats: list[Any]) -> None:
    with pytest.raises(FinetuneError, match="--seed must be below"):
        tune(chats[:4], seed=2**32)


# ---- to be gone on with


class Stopped(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("kind", ["sft", "packed", "lora", "dpo"])
def test_a_run_that_was_cut_short_ends_as_if_it_had_not_been(
    tune: Tune,
    chats: list[Any],
    preferences: list[Any],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    lines = preferences[:12] if kind == "dpo" else chats[:12]
    options: dict[str, Any] = {"epochs": 2, "save_every": 3}
    options |= {
        "packed": {"packing": True, "rows": 1, "epochs": 1},
        "lora": {"method": "lora"},
    }.get(kind, {})
    if kind == "dpo":
        options["method"] = "lora"
    whole = tune(lines, "whole", **options)
    tell = Watch._tell_step

    def stop(self: Watch, state: Any, logs: Any) -> None:
        tell(self, state, logs)
        if state.global_step == 5:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "_tell_step", stop)
        with pytest.raises(Stopped):
            tune(lines, "cut", **options)
    cut = tmp_path / "cut"
    assert [path.name for path in (cut / "training").glob("check*")] == ["checkpoint-3"]
    (cut / "training" / "checkpoint-5").mkdir()  # a kill came while it was written
    capsys.readouterr()
    tune(lines, "cut", **options)
    assert "going on after step 3" in capsys.readouterr().out
    assert same_weights(whole, cut)
    assert [r["loss"] for r in steps(cut)] == [r["loss"] for r in steps(whole)]


def test_a_finished_folder_is_not_destroyed(
    tune: Tune, chats: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tune(chats[:8])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    tune(chats[:8])
    assert "is done already" in capsys.readouterr().out
    with pytest.raises(FinetuneError, match="seed 0, not 1; .*--fresh|--fresh"):
        tune(chats[:8], seed=1)
    with pytest.raises(FinetuneError, match="another data"):
        tune(chats[:7])
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "notes.txt").write_text("mine")
    tune(chats[:8], seed=1, fresh=True)
    assert record(out)["settings"]["seed"] == 1 and (out / "notes.txt").exists()


def test_a_loss_that_is_lost_ends_the_run(
    tune: Tune, chats: list[Any], base: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(base / "model.safetensors")
    weights["model.final_layernorm.weight"] *= float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(FinetuneError, match="not finite at step 1: lower --lr"):
        tune(chats, model=broken)


def test_bfloat16_keeps_the_bases_dtype(tune: Tune, chats: list[Any], base: Path) -> None:
    """On a CPU, for want of a GPU: arithmetic in bfloat16, weights and result as the base has."""
    out = tune(chats[:16], precision="bfloat16", epochs=4)
    assert steps(out)[-1]["loss"] < 0.9 * steps(out)[0]["loss"]
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.float32}
    adapted = tune(chats[:16], "adapted", precision="bfloat16", method="lora", lr=2e-2)
    assert steps(adapted)[-1]["loss"] < steps(adapted)[0]["loss"]


def test_of_two_in_one_folder_the_second_is_refused(
    tune: Tune, chats: list[Any], tmp_path: Path
) -> None:
    """It would delete the checkpoints that the first goes on from."""
    with claimed(tmp_path / "out") as ours:
        assert ours
        with pytest.raises(FinetuneError, match="another fine-tuning is going on in"):
            tune(chats)
    out = tune(chats)
    assert (out / "model.safetensors").is_file() and not (out / "lock").exists()


def test_a_folder_that_was_killed_at_its_very_beginning_is_free(tmp_path: Path) -> None:
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / ".started.json.17-0123abcd").touch()
    folder = Folder(tmp_path / "out", {"model": "m"})
    assert folder.look(fresh=False) == "nothing"
    folder.begin("nothing")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["training"]
    (tmp_path / "out" / "training" / "started.json").unlink()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(FinetuneError, match="no fine-tuning"):
        folder.look(fresh=True)
