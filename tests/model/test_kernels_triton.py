"""The whole model on kernels against the whole model in plain PyTorch: wiring, strides, states.

On a CPU in Triton's interpreter, so the model and the texts are tiny there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.config import Config, Layer
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops.backend import forget
from hymba.presets import hymba

SIZES = {"hidden_size": 32, "vocab_size": 61, "num_heads": 4, "num_kv_heads": 2, "ssm_state": 8}
LENGTHS = (9, 4)


def tiny_pair() -> Config:
    """A global layer, a window layer and one that reads its keys."""
    return hymba(
        **SIZES,
        num_layers=3,
        intermediate_size=40,
        max_positions=512,
        ssm_dt_rank=3,
        window=3,
        meta_tokens=2,
        global_layers=(0,),
        share=[[1, 2]],
    )


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """on("triton"), on("torch"): which implementations serve from now on."""

    def choose(name: str) -> None:
        monkeypatch.setenv("HYMBA_BACKEND", name)
        forget()

    yield choose
    forget()


def close(got: Tensor, want: Tensor, name: str) -> None:
    off = (got.double() - want.double()).norm() / want.double().norm()
    assert off < 1e-4, f"{name} is off by {off:.1e}"


def test_loss_and_gradients(
    device: str, on: Callable[[str], None], lively: Callable[..., LanguageModel]
) -> None:
    model = lively(tiny_pair()).to(device)
    ids = torch.arange(sum(LENGTHS), device=device) * 7 % 61
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("torch", "triton"):
        on(name)
        hidden = model(ids, Batch.of(LENGTHS, device=device))
        loss = model.loss(hidden, ids.roll(-1))
        names, weights = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, weights)
        found[name] = dict(zip(names, grads, strict=True)) | {"loss": loss.detach()}
    for name, want in found["torch"].items():
        close(found["triton"][name], want, name)


@torch.no_grad()
def test_chunks_and_decode(
    device: str, on: Callable[[str], None], lively: Callable[..., LanguageModel]
) -> None:
    """A prompt, a chunk behind it and single tokens, past the window's edge, for two sequences."""
    model = lively(tiny_pair()).to(device)
    ids = torch.arange(40, device=device) * 5 % 61
    found: dict[str, list[Tensor]] = {"torch": [], "triton": []}
    for name, outs in found.items():
        on(name)
        cache, past, used = model.new_cache(2), (0, 0), 0
        for lengths in ((6, 2), (3, 4), (1, 1), (1, 1)):
            batch = Batch.of(lengths, past=past, device=device)
            outs.append(model(ids[used : used + sum(lengths)], batch, cache))
            past = tuple(a + b for a, b in zip(past, lengths, strict=True))
            used += sum(lengths)
    for step, (got, want) in enumerate(zip(found["triton"], found["torch"], strict=True)):
        close(got, want, f"step {step}")


@pytest.mark.parametrize("fusion", ["scalars", "concat"])
def test_other_fusions(
    fusion: str, device: str, on: Callable[[str], None], lively: Callable[..., LanguageModel]
) -> None:
    """Gradients, and a step: on kernels it is a product with what stands around it."""
    config = tiny_pair().replace(layers=(Layer(),), meta_tokens=0, fusion=fusion)
    model, ids = lively(config).to(device), torch.arange(7, device=device) * 5 % 61
    found: dict[str, list[Tensor]] = {}
    for name in ("torch", "triton"):
        on(name)
        loss = model.loss(model(ids, Batch.of((4, 3), device=device)), ids.roll(-1))
        found[name] = list(torch.autograd.grad(loss, list(model.parameters())))
        cache = model.new_cache(2)
        model(ids[:5], Batch.of((3, 2), device=device), cache)
        found[name].append(model(ids[5:], Batch.of((1, 1), (3, 2), device=device), cache))
    for i, (got, want) in enumerate(zip(found["triton"], found["torch"], strict=True)):
        close(got, want, f"number {i}")


def test_a_block_is_one_graph(
    device: str, on: Callable[[str], None], lively: Callable[..., LanguageModel]
) -> None:
    """Nothing in a block makes a compiler stop, and compiled it is the same block."""
    on("triton")
    model = lively(tiny_pair()).to(device)
    ids, batch = torch.arange(13, device=device) * 7 % 61, Batch.of(LENGTHS, device=device)
    want = model(ids, batch)
    for block in model.decoder.layers:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    close(model(ids, batch), want, "hidden states")


@torch.no_grad()
def test_autocast_may_begin_after_the_cache(
    device: str, on: Callable[[str], None], lively: Callable[..., LanguageModel]
) -> None:
    """What the meta tokens left is float32 then, and the rows' keys are not."""
    model = lively(tiny_pair()).to(device)
    ids, batch = torch.arange(13, device=device) * 7 % 61, Batch.of(LENGTHS, device=device)
    outs = []
    for name in ("torch", "triton"):
        on(name)
        cache = model.new_cache(2)
        with torch.autocast(device, torch.bfloat16):
            outs.append(model(ids, batch, cache).float())
    assert (outs[0] - outs[1]).norm() < 0.05 * outs[0].norm()
