"""The model written a second time, from the definition: one sequence, float64, dense masks, a loop
per token, meta tokens as plain embeddings in front of the text. Slow, and short enough to be
checked by eye.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.config import Config, Layer
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.weights import to_official

Weights = dict[str, Tensor]


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
    assert taken == rows.shape[1]
    joined = join(*outs, w, config) if len(outs) == 2 else outs[0]
    return joined @ w["out_proj.weight"].T, shared


def join(a: Tensor, s: Tensor, w: Weights, config: Config) -> Tensor:
    """What attention and SSM made of the rows, normed and joined."""
    a = rms(a, w["pre_avg_layernorm1.weight"], config.norm_eps)
    s = rms(s, w["pre_avg_layernorm2.weight"], config.norm_eps)
    if config.fusion == "scalars":
        alpha, beta = w["fusion_scales.weight"]
        return (alpha * a + beta * s) / 2
    return {"mean": (a + s) / 2, "subtract": (a - s) / 2, "concat": torch.cat([a, s], -1)}[
        config.fusion
    ]


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
