"""The decoder against the definition in definition.py: outputs, the loss and the gradient of every
parameter must be the same. And the rest of its contract.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymba.config import FUSIONS, Config
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.presets import hymba
from tests.model.definition import assert_is_the_definition, definition, official
from tests.plans import VARIANTS as OTHER_PLANS

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba", *OTHER_PLANS]
Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
Text = Callable[..., list[Tensor]]

VARIANTS = {
    "relu2": {"mlp_activation": "relu2"},
    "three taps": {"ssm_conv": 3},
    "one tap": {"ssm_conv": 1},
    "wider inner": {"ssm_expand": 3},
    "coarse eps": {"norm_eps": 1e-2},
    "untied": {"tie_embeddings": False},
    **{name: {"fusion": name} for name in FUSIONS},
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    assert_is_the_definition(lively(tiny(plan), dtype=torch.float64), text(23))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_config(name: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    config = tiny("hymba").replace(layers=tiny("hymba").layers[:3], **VARIANTS[name])
    assert_is_the_definition(lively(config, dtype=torch.float64), text(14))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_texts_shorter_than_the_convolution(
    length: int, tiny: Tiny, lively: Lively, text: Text
) -> None:
    model, tokens = lively(tiny("hymba"), dtype=torch.float64), text(length)
    want = definition(model.config, official(model), tokens)
    with torch.no_grad():
        got = model.logits(model(tokens, Batch.of([length])))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_shared_kv_from_far_away(lively: Lively, text: Text) -> None:
    """A producer needs not be the neighbour, and groups may be interleaved."""
    config = hymba(
        hidden_size=32, num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=24,
        window=4, global_layers=(0, 5), meta_tokens=2, vocab_size=61, ssm_state=4,
        share=[[0, 5], [1, 4], [2, 3]],
    )  # fmt: skip
    assert_is_the_definition(lively(config, dtype=torch.float64), text(17))


@pytest.mark.parametrize("meta", [1, 7])
def test_few_meta_tokens(meta: int, tiny: Tiny, lively: Lively, text: Text) -> None:
    """Fewer than the convolution is long, and more than the window."""
    config = tiny("hymba").replace(meta_tokens=meta, layers=tiny("hymba").layers[:4])
    model = lively(config, dtype=torch.float64)
    assert_is_the_definition(model, text(14))
    tokens, cache, found = text(14), model.new_cache(1), []
    for first, last in pairwise([0, 2, 3, 11, 14]):
        hidden = model(tokens[first:last], Batch.of([last - first], [first]), cache)
        found.append(model.logits(hidden))
    want = definition(config, official(model), tokens).detach()
    torch.testing.assert_close(torch.cat(found), want, atol=1e-5, rtol=1e-5)


# The rest of the contract


def test_embeddings_in_place_of_tokens(tiny: Tiny, lively: Lively, text: Text) -> None:
    model, tokens = lively(tiny("hymba")), text(9)
    batch = Batch.of([4, 5])
    assert torch.equal(model(tokens, batch), model(model.decoder.embed_tokens(tokens), batch))


@pytest.mark.parametrize("plan", ["hymba", "samba"])
def test_activation_checkpointing(plan: str, tiny: Tiny, lively: Lively, text: Text) -> None:
    """Recomputed blocks give the same gradients, through shared K/V and meta states too; without
    gradients nothing is wrapped."""
    model, tokens = lively(tiny(plan), dtype=torch.float64), text(19)
    calls: list[int] = []

    def wrap(block: nn.Module, *args: object) -> object:
        calls.append(1)
        return checkpoint(block, *args, use_reentrant=False)

    found = []
    for run in (None, wrap):
        model.decoder.checkpoint_blocks = run
        model.zero_grad()
        model.loss(model(tokens, Batch.of([12, 7])), tokens).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == len(model.decoder.layers)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        model(tokens, Batch.of([19]))
    model(tokens, Batch.of([19]), model.new_cache(1))
    assert len(calls) == len(model.decoder.layers)


def test_a_cache_means_no_gradients(tiny: Tiny, lively: Lively, text: Text) -> None:
    model = lively(tiny("hymba"))
    assert not model(text(5), Batch.of([5]), model.new_cache(1)).requires_grad
    assert model(text(5), Batch.of([5])).requires_grad


def test_loss_is_the_mean_of_what_counts(tiny: Tiny, lively: Lively, text: Text) -> None:
    model, tokens = lively(tiny("hymba")), text(9)
    hidden = model(tokens, Batch.of([9]))
    labels = tokens.clone()
    labels[[0, 4]] = -100
    want = F.cross_entropy(model.logits(hidden), labels)
    torch.testing.assert_close(model.loss(hidden, labels), want, atol=1e-5, rtol=1e-5)
    total = model.loss(hidden, labels, reduction="sum")
    torch.testing.assert_close(total, 7 * want, atol=1e-4, rtol=1e-5)
    assert model.loss(hidden, torch.full_like(labels, -100)).item() == 0
    z = model.logits(hidden)[labels != -100].logsumexp(-1).square().mean()
    got = model.loss(hidden, labels, z_loss=0.1)
    torch.testing.assert_close(got, want + 0.1 * z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head(tied: bool, tiny: Tiny) -> None:
    model = LanguageModel(tiny("hymba").replace(tie_embeddings=tied))
    assert (model.lm_head.weight is model.decoder.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)
    cast = model.to(torch.bfloat16)
    assert (cast.lm_head.weight is cast.decoder.embed_tokens.weight) == tied
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_bfloat16_is_near(tiny: Tiny, lively: Lively, text: Text) -> None:
    """With and without a cache: only the mean error is judged, rounding is all it may be."""
    tokens, config = text(40), tiny("hymba")
    low, high = lively(config, dtype=torch.bfloat16), lively(config)
    high.load_state_dict(low.state_dict())  # the same rounded weights, computed in float32
    with torch.no_grad():
        exact = high.logits(high(tokens, Batch.of([40])))
        whole = low.logits(low(tokens, Batch.of([40]))).float()
    cache, found = low.new_cache(1), []
    for past in range(40):
        hidden = low(tokens[past : past + 1], Batch.of([1], [past]), cache)
        found.append(low.logits(hidden).float())
    for got in (whole, torch.cat(found)):
        assert 0.001 < (got - exact).abs().mean() < 0.15 * exact.abs().mean()


def test_training_under_autocast(tiny: Tiny, lively: Lively, text: Text) -> None:
    """Float32 weights, bfloat16 products: how transformers' Trainer runs `bf16=True`."""
    tokens, found = text(19), []
    for enabled in (False, True):
        model = lively(tiny("hymba"))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(model(tokens, Batch.of([12, 7])), tokens)
        loss.backward()
        found.append((loss.item(), model.decoder.meta_tokens.weight.grad))
    (want, want_grad), (got, grad) = found
    assert got == pytest.approx(want, rel=0.02)
    assert F.cosine_similarity(grad.flatten(), want_grad.flatten(), dim=0) > 0.8


def test_generation_under_autocast(tiny: Tiny, lively: Lively, text: Text) -> None:
    model, tokens = lively(tiny("hymba")), text(12)
    with torch.no_grad():
        want = model.logits(model(tokens, Batch.of([12])))
    with torch.autocast("cpu", torch.bfloat16):
        cache, found = model.new_cache(1), []
        for first, last in pairwise([0, 9, 10, 11, 12]):
            hidden = model(tokens[first:last], Batch.of([last - first], [first]), cache)
            found.append(model.logits(hidden).float())
    assert (torch.cat(found) - want).abs().mean() < 0.1 * want.abs().mean()


# The first weights


@pytest.mark.parametrize("fusion", FUSIONS)
def test_init_weights_is_the_released_one(fusion: str, tiny: Tiny) -> None:
    """Every parameter by its kind; none is left as it was."""
    changes = {"initializer_range": 0.05, "tie_embeddings": False, "pad_token_id": 7}
    config = tiny("hymba").replace(fusion=fusion, **changes)
    model = LanguageModel(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    assert model.init_weights(seed=0) is model
    for name, p in model.named_parameters():
        kind = name.split(".")[-1]
        if kind == "A_log":
            want = torch.arange(1.0, config.ssm_state + 1).log().expand_as(p)
            torch.testing.assert_close(p.detach(), want)
        elif kind == "D" or "norm." in name or "scales." in name:
            assert (p == 1).all(), name
        elif kind in ("bias", "dt_bias"):
            assert (p == 0).all(), name
        else:
            std, slack = (1.0 if "meta" in name else 0.05), 4 / p.numel() ** 0.5
            assert p.std().item() == pytest.approx(std, rel=slack), name
            assert abs(p.mean().item()) < slack * std, name
    embedding = model.decoder.embed_tokens.weight
    assert (embedding[7] == 0).all() and (embedding[6] != 0).all()


def test_init_weights_is_repeatable(tiny: Tiny) -> None:
    make = partial(LanguageModel, tiny("hymba"))
    one, same, other = (make().init_weights(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["decoder.embed_tokens.weight"], other["decoder.embed_tokens.weight"])


def test_dt_may_start_elsewhere(tiny: Tiny) -> None:
    """Evenly in its logarithm; all other weights are what they are without it."""
    make = partial(LanguageModel, tiny("hymba"))
    plain, other = (
        make().init_weights(3).state_dict(),
        make().init_weights(3, (1e-3, 0.1)).state_dict(),
    )
    starts = []
    for name, p in other.items():
        if name.endswith("dt_bias"):
            starts.append(F.softplus(p).log10())
        else:
            assert torch.equal(p, plain[name]), name
    found = torch.cat(starts)
    assert found.min() > -3.001 and found.max() < -0.999
    assert found.mean().item() == pytest.approx(-2, abs=4 * 2 / (12 * len(found)) ** 0.5)
    for wrong in ((0.0, 0.1), (0.1, 0.01), (1e-50, 1e-45), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="dt must start between"):
            make().init_weights(3, wrong)


def test_shapes_alone(tiny: Tiny) -> None:
    """On the meta device, which has no autocast."""
    batch = Batch.of((9,), device="meta")
    with torch.device("meta"):
        model = LanguageModel(tiny("llama"))
        assert len(model(torch.zeros(9, dtype=torch.long), batch)) == 9


def test_a_model_without_special_tokens_can_be_made(tiny: Tiny) -> None:
    config = tiny("hymba").replace(pad_token_id=None)
    weight = LanguageModel(config).init_weights(0).decoder.embed_tokens.weight
    assert (weight.abs().sum(1) > 0).all()
