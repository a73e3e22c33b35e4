"""One forward through transformers' classes: padding, packing, losses, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from hymba.config import Config
from hymba.hf import HymbaCache, HymbaForCausalLM, InputError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (9, 23, 14)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 in another order of sums; logits have a spread of 5
Pad = Callable[..., dict[str, Tensor]]
Text = Callable[..., Any]
Build = Callable[..., HymbaForCausalLM]


@pytest.mark.parametrize("case", ["plain", "swa_meta", "kvshare", "ntk", "full"])
def test_logits_and_loss_are_the_released_ones(case: str, device: str) -> None:
    io = load_file(GOLDEN / case / "io.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / case).to(device)
    out = model(io["input_ids"].to(device), labels=io["input_ids"].to(device))
    torch.testing.assert_close(out.logits.cpu(), io["logits"], atol=5e-4, rtol=0)
    assert out.loss.item() == pytest.approx(io["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("plan", ["hymba", "hymba-no-meta", "llama", "mamba", "samba"])
def test_every_plan_gives_our_logits(
    plan: str,
    tiny: Callable[[str], Config],
    lively: Callable[..., LanguageModel],
    wrap: Callable[[LanguageModel], HymbaForCausalLM],
    text: Text,
) -> None:
    ours = lively(tiny(plan))
    ids = text(20)
    want = ours.logits(ours(ids, Batch.of([20])))
    torch.testing.assert_close(wrap(ours)(ids[None]).logits[0], want, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_padded_row_gives_what_it_gives_alone(
    model: HymbaForCausalLM, text: Text, pad: Pad, side: str, grad: bool
) -> None:
    """Logits and every hidden state; padding holds an id outside the vocabulary to prove that
    nobody looks at it."""
    rows = text(LENGTHS)
    with torch.set_grad_enabled(grad):
        out = model(**pad(rows, side, fill=99), output_hidden_states=True)
        for i, row in enumerate(rows):
            place = slice(-len(row), None) if side == "left" else slice(len(row))
            alone = model(row[None], output_hidden_states=True)
            torch.testing.assert_close(out.logits[i, place], alone.logits[0], **CLOSE)
            assert len(out.hidden_states) == model.config.num_hidden_layers + 1
            for padded, single in zip(out.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(padded[i, place], single[0], **CLOSE)


def test_hidden_states_end_with_the_norm(model: HymbaForCausalLM, text: Text) -> None:
    out = model.model(text(9)[None], output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    torch.testing.assert_close(
        out.hidden_states[0], model.get_input_embeddings()(text(9)[None]), rtol=0, atol=0
    )


def test_holes_in_the_mask_are_padding_too(model: HymbaForCausalLM, text: Text) -> None:
    ids = text(12)[None]
    mask = torch.ones_like(ids)
    mask[0, [0, 4, 5, 11]] = 0
    out = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(out, model(ids[mask.bool()][None]).logits[0], **CLOSE)


def gradients(model: HymbaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        off = (got[name] - grad).norm() / grad.norm()
        assert off < 1e-4, f"{name} is off by {off:.1e}"


@pytest.fixture
def learner(build: Build) -> HymbaForCausalLM:
    return build().train()


@pytest.fixture
def alone(learner: HymbaForCausalLM, text: Text) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over all predictions of the rows one by one, and its gradients."""
    rows, total, count = text(LENGTHS), torch.zeros(()), 0
    for row in rows:
        logits = learner(row[None]).logits[0, :-1]
        total, count = (
            total + F.cross_entropy(logits, row[1:], reduction="sum"),
            count + len(row) - 1,
        )
    loss = total / count
    return loss.item(), gradients(learner, loss)


def packed(rows: list[Tensor]) -> dict[str, Any]:
    """What trl's padding-free collator passes."""
    lengths = torch.tensor([len(row) for row in rows])
    edges = F.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "seq_idx": torch.arange(len(rows)).repeat_interleave(lengths)[None],
    }


@pytest.mark.parametrize("way", ["left", "right", "packed"])
def test_loss_and_gradients_are_those_of_each_sequence_alone(
    learner: HymbaForCausalLM, alone: tuple[float, Any], text: Text, pad: Pad, way: str
) -> None:
    """Also with labels on padding and on first tokens, which predict or are predicted by nothing
    of their own sequence; trl sets those to -100 itself, other callers need not."""
    batch = packed(text(LENGTHS)) if way == "packed" else pad(text(LENGTHS), way)
    loss = learner(**batch, labels=batch["input_ids"]).loss
    assert loss.item() == pytest.approx(alone[0], rel=1e-5)
    assert_same_gradients(gradients(learner, loss), alone[1])


def test_num_items_in_batch_divides_the_sum(
    learner: HymbaForCausalLM, alone: tuple[float, Any], text: Text
) -> None:
    batch = packed(text(LENGTHS))
    loss = learner(**batch, labels=batch["input_ids"], num_items_in_batch=torch.tensor(10)).loss
    assert loss.item() == pytest.approx(alone[0] * (sum(LENGTHS) - len(LENGTHS)) / 10, rel=1e-5)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_keeps_gradients_exact(
    learner: HymbaForCausalLM, alone: tuple[float, Any], text: Text, name: str
) -> None:
    """With shared K/V: a block's keys and values are used again by later blocks."""
    enable = getattr(learner, f"{name}_enable", None)
    if enable is None:
        pytest.skip(f"this transformers has no {name}_enable")
    enable()
    calls, run = [], learner.model.decoder.checkpoint_blocks
    learner.model.decoder.checkpoint_blocks = lambda *a: calls.append(1) or run(*a)
    batch = packed(text(LENGTHS))
    loss = learner(**batch, labels=batch["input_ids"]).loss
    assert len(calls) == learner.config.num_hidden_layers
    assert_same_gradients(gradients(learner, loss), alone[1])
    getattr(learner, f"{name}_disable")()
    assert learner.model.decoder.checkpoint_blocks is None


def test_reentrant_checkpointing_is_refused(learner: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        learner.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_cache_is_made_where_no_gradients_flow(build: Build, text: Text) -> None:
    model, ids = build(), text(9)[None]
    assert model(ids).past_key_values is None  # gradients could flow
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, HymbaCache)
        assert model(ids, use_cache=False).past_key_values is None
        assert model(ids, labels=ids).past_key_values is None
        model.config.use_cache = False
        assert model(ids).past_key_values is None
    out = model(ids, use_cache=True)
    assert isinstance(out.past_key_values, HymbaCache)
    assert not out.logits.requires_grad
    assert not model(ids, labels=ids, use_cache=True).loss.requires_grad


def test_training_with_a_cache_is_refused(learner: HymbaForCausalLM, text: Text) -> None:
    ids = text(9)[None]
    with pytest.raises(InputError, match="pass False in training"):
        learner(ids, use_cache=True)
    with pytest.raises(InputError, match="leave it out in training"):
        learner(ids, past_key_values=HymbaCache(learner))
    with torch.no_grad():
        learner(ids, use_cache=True)


def test_logits_to_keep(model: HymbaForCausalLM, text: Text) -> None:
    ids = torch.stack(text([9, 9]))
    every = model(ids, labels=ids)
    for which, columns in ((2, [7, 8]), (torch.tensor([0, 5]), [0, 5])):
        kept = model(ids, logits_to_keep=which)
        torch.testing.assert_close(kept.logits, every.logits[:, columns], **CLOSE)
    last = model(ids, labels=ids, logits_to_keep=3).loss
    want = F.cross_entropy(every.logits[:, 6:8].flatten(0, 1), ids[:, 7:].flatten())
    torch.testing.assert_close(last, want, **CLOSE)


def test_tuples_where_asked(model: HymbaForCausalLM, text: Text) -> None:
    ids = text(9)[None]
    logits = model(ids, return_dict=False)[0]
    torch.testing.assert_close(logits, model(ids).logits)


def test_soft_prompts_get_gradients_from_a_frozen_model(build: Build, text: Text) -> None:
    model = build().requires_grad_(False)
    ids = text(9)[None]
    embeddings = model.get_input_embeddings()(ids).clone().requires_grad_(True)
    out = model(inputs_embeds=embeddings, labels=ids)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss)
    out.loss.backward()
    assert embeddings.grad is not None and embeddings.grad.abs().min(-1).values[0, 0] > 0


REFUSED: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "token id 61 is outside": lambda ids: {"input_ids": torch.tensor([[61]])},
    "token id -1 is outside": lambda ids: {"input_ids": torch.tensor([[-1]])},
    "the input is empty": lambda ids: {"input_ids": ids[:, :0]},
    "has 513 text tokens": lambda ids: {"input_ids": torch.ones(1, 513, dtype=torch.long)},
    "must be \\(batch, columns\\)": lambda ids: {"input_ids": ids[0]},
    "either input_ids or inputs_embeds": lambda ids: {},
    "inputs_embeds have shape": lambda ids: {"inputs_embeds": torch.zeros(1, 3, 31)},
    "no argument output_attentions": lambda ids: {"input_ids": ids, "output_attentions": True},
    "no argument cache_position": lambda ids: {"input_ids": ids, "cache_position": ids[0]},
    "not DynamicCache": lambda ids: {"input_ids": ids, "past_key_values": DynamicCache()},
    "documents cannot go into a cache": lambda ids: {
        **packed([ids[0], ids[0]]),
        "use_cache": True,
    },
    "longest document has 9": lambda ids: {**packed([ids[0], ids[0]]), "max_length_q": 3},
    "labels have shape": lambda ids: {"input_ids": ids, "labels": ids[:, 1:]},
    "a number or a 1D tensor": lambda ids: {"input_ids": ids, "logits_to_keep": ids},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line(
    model: HymbaForCausalLM, text: Text, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model(**REFUSED[message](text(9)[None]))
    assert "\n" not in str(caught.value)


def test_positions_beside_padding(model: HymbaForCausalLM, text: Text, pad: Pad) -> None:
    batch = pad(text(LENGTHS), "left")
    good = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    want = model(**batch).logits
    torch.testing.assert_close(model(**batch, position_ids=good).logits, want)
    with pytest.raises(InputError, match="position_ids of row 0"):
        model(**batch, position_ids=torch.arange(max(LENGTHS))[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(build: Build, text: Text, dtype: torch.dtype) -> None:
    """Against float32 with the same rounded weights, so that only the arithmetic is judged."""
    model, ids = build().to(dtype), text(20)[None]
    got = model(ids).logits
    assert got.dtype is dtype
    want = model.float()(ids).logits.double()
    off = ((got - want).norm() / want.norm()).item()
    assert off < {torch.bfloat16: 0.1, torch.float64: 1e-5}[dtype]
