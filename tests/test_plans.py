"""What a laboratory compares (tests/plans.py): every fusion and every kind of plan trains, decodes,
is served, saved and counted like the architectures that have names. That each computes what it is
defined to, gradients too, is in model/test_decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hymba import weights
from hymba.config import Config
from hymba.engine import Engine, Limits, Sampling
from hymba.model import accounting
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from tests.engine.playing import Play, alone, check_at_rest
from tests.plans import VARIANTS

Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
Text = Callable[..., list[Tensor]]

pytestmark = pytest.mark.parametrize("plan", VARIANTS)


def test_trains(plan: str, tiny: Tiny, text: Text) -> None:
    """From its first weights, on documents in one row: it learns them by heart, every parameter
    with it."""
    model, rows = LanguageModel(tiny(plan)).init_weights(seed=0), text([17, 1, 30])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.cat([torch.cat([x[1:], x.new_tensor([-100])]) for x in rows])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(12):
        hidden = model(torch.cat(rows), Batch.of([len(x) for x in rows]))
        loss = model.loss(hidden, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("rows", [2, 3], ids=["thin", "wide"])
def test_chunks_and_steps_are_one_forward(
    plan: str, rows: int, tiny: Tiny, lively: Lively, text: Text
) -> None:
    """Prompts on both sides of the window's edge, a second chunk, and tokens one by one round the
    ring; a step of few rows goes another way than one of many."""
    model, starts = lively(tiny(plan), dtype=torch.float64), [3, 14, 6][:rows]
    texts = text([n + 16 for n in starts])
    cache, done = model.new_cache(rows), [0] * rows
    found: list[list[Tensor]] = [[] for _ in starts]
    for lengths in [starts, [4] * rows, *([[1] * rows] * 12)]:
        new = [x[a : a + n] for x, a, n in zip(texts, done, lengths, strict=True)]
        hidden = model(torch.cat(new), Batch.of(lengths, done), cache)
        for row, part in zip(found, model.logits(hidden).split(lengths), strict=True):
            row.append(part)
        done = [a + n for a, n in zip(done, lengths, strict=True)]
    for tokens, parts in zip(texts, found, strict=True):
        with torch.no_grad():
            want = model.logits(model(tokens, Batch.of([len(tokens)])))
        torch.testing.assert_close(torch.cat(parts), want, atol=1e-9, rtol=1e-9)


@pytest.mark.usefixtures("unwritten_is_nan")
def test_the_engine_says_what_the_loop_says(
    plan: str, tiny: Tiny, lively: Lively, text: Text
) -> None:
    """More requests than slots, greedy and drawn, prompts in chunks; what is free is poisoned."""
    model = lively(tiny(plan))
    how = [Sampling(max_tokens=12), Sampling(max_tokens=9, temperature=1.0, seed=3)]
    asked = [(x.tolist(), how[i % 2]) for i, x in enumerate(text([1, 30, 9, 257, 4]))]
    play = Play(Engine(model, limits=Limits(max_sequences=3, step_tokens=40)))
    requests = [play.add(prompt, sampling) for prompt, sampling in asked]
    play.all()
    for request, (prompt, sampling) in zip(requests, asked, strict=True):
        want = alone(model, prompt, sampling)
        assert play.tokens(request) == [want.tokens]
    check_at_rest(play.engine)


def test_survives_a_file(plan: str, tiny: Tiny, lively: Lively, tmp_path: Path) -> None:
    model = lively(tiny(plan))
    weights.save(model, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == model.config
    tokens, batch = torch.arange(9), Batch.of([9])
    with torch.no_grad():
        assert torch.equal(again(tokens, batch), model(tokens, batch))
    names = [name for name, _ in model.named_parameters()]
    official = [weights.to_official(name) for name in names]
    assert len(set(official)) == len(names)
    assert [weights.to_ours(name) for name in official] == names
    assert not any("mixer" in name or "ssm" in name for name in official)


def test_costs_what_is_predicted(plan: str, tiny: Tiny, lively: Lively) -> None:
    """Parameters, FLOPs of every projection, bytes of the cache and of a step's weights."""
    config, model, tokens = tiny(plan), lively(tiny(plan)), 9
    found = sum(p.numel() for p in model.parameters())
    assert accounting.parameters(config)["total"] == found
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    more = accounting.forward_flops(config, 1) - 2 * sum(m.weight.numel() for m in linear)
    ssms = sum(layer.ssm for layer in config.layers) * config.inner_size
    more -= ssms * (2 * config.ssm_conv + accounting.SCAN_FLOPS * config.ssm_state)
    widths = [config.head_dim + config.value_dim(x) for x in config.layers if x.attention]
    assert more == 2 * config.num_heads * (1 + config.meta_tokens) * sum(widths)
    moved = accounting.step_bytes(config, tokens, weight_bytes=4)
    assert moved["weights"] == 4 * (found - config.meta_tokens * config.hidden_size)
    cache = model.new_cache(2)
    model(torch.arange(2 * tokens), Batch.of([tokens] * 2), cache)
    held = accounting.cache_bytes(config, tokens, kv_bytes=4)
    held = {kind: n if kind == "meta" else 2 * n for kind, n in held.items()}
    assert cache.nbytes() == held
