"""The decoder against the definition, written a second time: one sequence, float64, dense masks,
a loop per token, meta tokens as plain embeddings in front of the text. Slow, and short enough to
be checked by eye. Outputs, the loss and the gradient of every parameter must be the same.
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

from hymba.config import Config, Layer
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.presets import hymba
from hymba.weights import to_official

PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
Text = Callable[..., list[Tensor]]
Weights = dict[str, Tensor]


# The definition


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, config: Config) -> Tensor:
    """x (T, heads, h): pairs (i, i + h/2) turned by position / base^(2i/h), in float32 tables."""
    base, width = config.rope_theta, x.shape[-1]
    if config.rope_type == "ntk":
        base *= (2 * config.max_positions / config.original_max_positions - 1) ** (
            width / (width - 2)
        )
    speeds = torch.tensor([base ** (-2 * i / width) for i in range(width // 2)]).float()
    angles = torch.arange(x.shape[0]).float()[:, None] * speeds
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex128)
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, meta: int) -> Tensor:
    """q (T, H, h), k (T, G, h), v (T, G, e) -> (T, H e)."""

    def hidden(i: int, j: int) -> bool:
        return j > i or (window is not None and i - j > window and j >= meta)

    mask = torch.tensor([[hidden(i, j) for j in range(len(q))] for i in range(len(q))])
    heads = []
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, group].T / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(mask, float("-inf")).softmax(-1) @ v[:, group])
    return torch.cat(heads, dim=-1)


def ssm(x: Tensor, gate: Tensor, w: Weights, config: Config) -> Tensor:
    """x, gate (T, E) -> (T, E); the state is zero before the first (meta) token."""
    taps = w["conv1d.weight"].shape[-1]
    before = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    u = sum(w["conv1d.weight"][:, 0, j] * before[j : j + len(x)] for j in range(taps))
    u = F.silu(u + w["conv1d.bias"])
    sizes = [config.ssm_dt_rank, config.ssm_state, config.ssm_state]
    parts = (u @ w["x_proj.0.weight"].T).split(sizes, dim=-1)
    names = ("dt", "B", "C")
    dt, B, C = (
        rms(part, w[f"{name}_layernorm.weight"], config.norm_eps)
        for name, part in zip(names, parts, strict=True)
    )
    dt = F.softplus(dt @ w["dt_proj.0.weight"].T + w["dt_proj.0.bias"])
    h, rows = x.new_zeros(x.shape[1], config.ssm_state), []
    for t in range(len(x)):
        decay = torch.exp(dt[t][:, None] * -torch.exp(w["A_log.0"]))
        h = decay * h + (dt[t] * u[t])[:, None] * B[t]
        rows.append(h @ C[t] + w["D.0"] * u[t])
    return torch.stack(rows) * F.silu(gate)


def mixer(x: Tensor, w: Weights, config: Config, layer: Layer, shared: tuple[Tensor, ...] | None):
    """The rows of in_proj are q | k | v | x | gate, without k and v where those are shared."""
    D, E, G, h = config.hidden_size, config.inner_size, config.num_kv_heads, config.head_dim
    e = (E if layer.ssm else D) // config.num_heads
    rows, taken, outs = x @ w["in_proj.weight"].T, 0, []

    def take(count: int) -> Tensor:
        nonlocal taken
        taken += count
        return rows[:, taken - count : taken]

    if layer.attention:
        q = rotate(take(D).unflatten(-1, (-1, h)), config)
        if shared is None:
            k = rotate(take(G * h).unflatten(-1, (G, h)), config)
            shared = k, take(G * e).unflatten(-1, (G, e))
        outs.append(attention(q, *shared, layer.window, config.meta_tokens))
    if layer.ssm:
        outs.append(ssm(take(E), take(E), w, config))
    if len(outs) == 2:
        norms = (w["pre_avg_layernorm1.weight"], w["pre_avg_layernorm2.weight"])
        outs = [rms(a, n, config.norm_eps) for a, n in zip(outs, norms, strict=True)]
    assert taken == rows.shape[1]
    return sum(outs) / len(outs) @ w["out_proj.weight"].T, shared


def mlp(x: Tensor, w: Weights, activation: str) -> Tensor:
    up = x @ w["up_proj.weight"].T
    inner = F.silu(x @ w["gate_proj.weight"].T) * up if activation == "silu" else F.relu(up) ** 2
    return inner @ w["down_proj.weight"].T


def definition(config: Config, weights: Weights, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one sequence, from weights by their official names."""

    def under(prefix: str) -> Weights:
        return {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}

    x = weights["model.embed_tokens.weight"][tokens]
    if config.meta_tokens:
        x = torch.cat([weights["model.memory_tokens"], x])
    kept: list[tuple[Tensor, ...] | None] = []
    for index, layer in enumerate(config.layers):
        w = under(f"model.layers.{index}.")
        mine = under(f"model.layers.{index}.mamba.")
        shared = None if layer.kv_from is None else kept[layer.kv_from]
        normed = rms(x, w["input_layernorm.weight"], config.norm_eps)
        out, shared = mixer(normed, mine, config, layer, shared)
        kept.append(shared)
        x = x + out
        if layer.mlp:
            normed = rms(x, w["pre_moe_layernorm.weight"], config.norm_eps)
            x = x + mlp(
                normed, under(f"model.layers.{index}.moe.experts.0."), config.mlp_activation
            )
    x = rms(x, weights["model.final_layernorm.weight"], config.norm_eps)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return x[config.meta_tokens :] @ head.T


# Against it


def official(model: LanguageModel) -> Weights:
    """Copies of the weights by official names; a tied head is not among them."""
    found = {to_official(name): p.detach().clone() for name, p in model.named_parameters()}
    return {name: p.requires_grad_() for name, p in found.items()}


VARIANTS = {
    "relu2": {"mlp_activation": "relu2"},
    "three taps": {"ssm_conv": 3},
    "one tap": {"ssm_conv": 1},
    "wider inner": {"ssm_expand": 3},
    "coarse eps": {"norm_eps": 1e-2},
    "untied": {"tie_embeddings": False},
}


def assert_is_the_definition(model: LanguageModel, tokens: Tensor) -> None:
    """1e-5: the rotary tables are float32 in both, but not rounded in the same places."""
    weights, config = official(model), model.config
    want = definition(config, weights, tokens)
    hidden = model(tokens, Batch.of([len(tokens)]))
    got = model.logits(hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    labels = torch.cat([tokens[1:], tokens.new_tensor([-100])])
    want_loss = F.cross_entropy(want[:-1], tokens[1:])
    loss = model.loss(hidden, labels)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    model.zero_grad()
    loss.backward()
    want_loss.backward()
    for name, parameter in model.named_parameters():
        want_grad = weights[to_official(name)].grad
        assert want_grad.norm() > 0, name
        torch.testing.assert_close(
            parameter.grad, want_grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


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


def test_init_weights_is_the_released_one(tiny: Tiny) -> None:
    """Every parameter by its kind; none is left as it was."""
    config = tiny("hymba").replace(initializer_range=0.05, tie_embeddings=False, pad_token_id=7)
    model = LanguageModel(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    assert model.init_weights(seed=0) is model
    for name, p in model.named_parameters():
        kind = name.split(".")[-1]
        if kind == "A_log":
            want = torch.arange(1.0, config.ssm_state + 1).log().expand_as(p)
            torch.testing.assert_close(p.detach(), want)
        elif kind == "D" or "norm." in name:
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


def test_a_model_without_special_tokens_can_be_made(tiny: Tiny) -> None:
    config = tiny("hymba").replace(pad_token_id=None)
    weight = LanguageModel(config).init_weights(0).decoder.embed_tokens.weight
    assert (weight.abs().sum(1) > 0).all()
