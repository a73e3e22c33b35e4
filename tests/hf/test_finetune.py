"""Fine-tuning with other people's tools: transformers' Trainer, peft, trl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hymba.hf import HymbaForCausalLM
from hymba.weights import WeightsError

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments  # noqa: E402

Pad = Callable[..., dict[str, Tensor]]
Text = Callable[..., Any]
Build = Callable[..., HymbaForCausalLM]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """For a short run on the CPU in float32."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# transformers' own Trainer


def trainer(model: HymbaForCausalLM, text: Text, folder: Path, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in text([16] * 16)]
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **options)),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


def test_a_resumed_run_gives_the_same_losses(build: Build, text: Text, tmp_path: Path) -> None:
    """transformers resumes by loading the checkpoint file without checking that names match."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(build().train(), text, tmp_path, **options)
    whole.train()
    other = build(seed=7).train()
    resumed = trainer(other, text, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert whole.evaluate()["eval_loss"] == pytest.approx(resumed.evaluate()["eval_loss"])


def test_label_smoothing_shifts_the_labels(build: Build, text: Text, tmp_path: Path) -> None:
    """The Trainer shifts them for models in a list of names of its own, and for others trains
    the model to repeat its input."""
    model, ids = build(), torch.stack(text([16, 16]))
    run = trainer(model, text, tmp_path, label_smoothing_factor=0.1)
    got = run.compute_loss(model, {"input_ids": ids, "labels": ids})
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -logs.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(got, 0.9 * nll - 0.1 * logs.mean())


# peft


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def lora(peft: Any, **options: Any) -> Any:
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**settings)


def give_weight(model: Any, adapter: str = "default") -> None:
    """Adapters begin as zero; make them matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.normal_(0, 0.2, generator=generator)


@pytest.fixture
def batch(text: Text, pad: Pad) -> dict[str, Tensor]:
    return pad(text([5, 20]), "left")


def test_adapters_never_meet_stale_meta_states(
    build: Build, peft: Any, batch: dict[str, Tensor]
) -> None:
    """What the meta tokens leave is kept as a constant of the weights; switching an adapter
    changes it without touching a base weight. Generation with a cache (which uses the constant)
    is held against generation without one at every turn."""

    def check(model: Any) -> Tensor:
        model.eval()
        out = model.generate(**batch, **GREEDY)
        assert torch.equal(out, model.generate(**batch, use_cache=False, **GREEDY))
        return out

    base = build()
    plain, plain_logits = check(base), base(**batch).logits
    model = peft.get_peft_model(base, lora(peft))
    assert torch.equal(check(model), plain)  # an adapter of zeros
    give_weight(model)
    adapted, logits = check(model), model(**batch).logits
    assert not torch.equal(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(check(model), plain)
    model.add_adapter("other", lora(peft, target_modules=["in_proj", "dt_proj"]))
    model.set_adapter("other")
    give_weight(model, "other")
    assert not torch.equal(check(model), adapted)
    model.set_adapter("default")
    assert torch.equal(check(model), adapted)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, logits, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, logits, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain_logits, **CLOSE)
    merged = model.merge_and_unload()
    assert isinstance(merged, HymbaForCausalLM)
    torch.testing.assert_close(merged(**batch).logits, logits, **CLOSE)
    check(merged)


def test_all_linear_means_all(build: Build, peft: Any) -> None:
    model = peft.get_peft_model(build(), lora(peft))
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    wanted = {"in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj"}
    assert wanted <= found
    assert "lm_head" not in found


@pytest.mark.parametrize("saved", [None, ["meta_tokens"]], ids=["lora", "and_meta_tokens"])
def test_adapters_are_saved_and_loaded(
    build: Build, peft: Any, batch: dict[str, Tensor], tmp_path: Path, saved: list[str] | None
) -> None:
    """By peft, and by transformers itself where its version can (5.17 cannot load whole modules
    and would only warn)."""
    model = peft.get_peft_model(build(), lora(peft, modules_to_save=saved))
    give_weight(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "meta_tokens.modules_to_save" in name:
                parameter += 1
    model.save_pretrained(tmp_path / "adapter")
    want = model.eval()(**batch).logits
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, want, **CLOSE)
    build().save_pretrained(tmp_path / "base")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    try:
        third.load_adapter(str(tmp_path / "adapter"))
    except WeightsError as error:
        assert saved and "meta_tokens" in str(error)
    else:
        torch.testing.assert_close(third(**batch).logits, want, **CLOSE)


@pytest.mark.parametrize(
    ("plan", "saved"),
    [
        ("hymba", ["meta_tokens"]),
        ("hymba", ["embed_tokens", "lm_head"]),
        ("hymba", ["attention_norm", "ssm_norm"]),
        ("scalars", ["scales"]),
    ],
)
def test_whole_modules_can_be_tuned(
    build: Build, peft: Any, text: Text, plan: str, saved: list[str]
) -> None:
    model = peft.get_peft_model(build(plan), lora(peft, modules_to_save=saved)).train()
    ids = text(20)[None]
    model(ids, labels=ids).loss.backward()
    for name in saved:
        parts = [p for n, p in model.named_parameters() if f"{name}.modules_to_save" in n]
        assert parts and all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts), name


def test_checkpointing_with_adapters_is_exact(build: Build, peft: Any, text: Text) -> None:
    model = peft.get_peft_model(build(), lora(peft)).train()
    give_weight(model)
    ids = text(20)[None]

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = grads()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = grads()
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_prompt_tuning(build: Build, peft: Any, batch: dict[str, Tensor]) -> None:
    """Learned embeddings in front of a frozen model, in training and in generation."""
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build(), settings)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **GREEDY))


# trl


SENTENCES = [{"text": "the cat sat on the mat. " * k} for k in (1, 2, 3, 1, 2, 1)]


@pytest.fixture
def sft(
    build: Build, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., list[float]]:
    """sft(adapter=None, model=None, **options) -> the losses of a short SFT run."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def run(adapter: Any = None, model: Any = None, **options: Any) -> list[float]:
        settings = arguments(tmp_path, bf16=False, max_length=80, **options)
        run = trl.SFTTrainer(
            model=model or build().train(),
            args=trl.SFTConfig(**settings),
            train_dataset=datasets.Dataset.from_list(SENTENCES),
            processing_class=letters,
            peft_config=adapter,
        )
        run.train()
        return losses(run)

    return run


def test_sft_packed_learns_from_the_same_losses_as_padded(sft: Callable[..., list[float]]) -> None:
    """Best-fit packing puts several documents in a row and passes where they begin. The first
    loss of a whole epoch in one step is then that of padded rows, to a rounding; a model that
    looked across documents would give another."""
    everything = {"max_steps": 1, "per_device_train_batch_size": 6}
    padded = sft(**everything)
    packed = sft(packing=True, packing_strategy="bfd", **everything)
    filled = sft(packing=True, packing_strategy="bfd", pad_to_multiple_of=16, **everything)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert filled == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_with_an_adapter(sft: Callable[..., list[float]], peft: Any, packing: bool) -> None:
    run = sft(lora(peft), packing=packing, max_steps=4, learning_rate=1e-2)
    assert run[-1] < run[0]


def test_sft_of_everything(sft: Callable[..., list[float]], build: Build, tmp_path: Path) -> None:
    """From a folder, as trl's command line does."""
    build().save_pretrained(tmp_path / "base")
    run = sft(model=str(tmp_path / "base"), max_steps=4, gradient_accumulation_steps=2)
    assert run[-1] < run[0]
