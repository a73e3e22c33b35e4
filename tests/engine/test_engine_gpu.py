"""The engine on a GPU: CUDA graphs, reading one step late, sampling on the device. In float32 it
says what the one-request loop says there, and in steady decode the host waits for nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.engine import Engine, Limits, Sampling
from hymba.engine.runner import rounded_rows
from hymba.model.decoder import LanguageModel
from tests.engine.playing import Ask, Play, alone, check_at_rest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
HOW = [
    Sampling(max_tokens=20),
    Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=4),
    Sampling(max_tokens=16, temperature=1.0, top_k=9, seed=5, frequency_penalty=0.5),
    Sampling(max_tokens=18, temperature=1.2, min_p=0.05, seed=6, stop_ids=(7, 9), logprobs=2),
    Sampling(max_tokens=1),
]


@pytest.fixture
def model(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> Any:
    return lambda plan: lively(tiny(plan)).cuda()


def asks(text: Callable[..., torch.Tensor], count: int) -> list[Ask]:
    rng = random.Random(3)
    lengths = [rng.choice([1, 2, 9, 40, 255, 257, 300]) for _ in range(count)]
    prompts = [text(length, seed).tolist() for seed, length in enumerate(lengths)]
    return [Ask(prompt, HOW[i % len(HOW)], arrives=i // 2) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tight", [False, True])
def test_what_the_loop_says(plan: str, tight: bool, model: Any, text: Any) -> None:
    """Ragged arrivals; `tight`: so few pages that sequences are preempted and come back."""
    net, limits = model(plan), Limits(max_sequences=6, step_tokens=64, cache_bytes=2**28)
    if tight:
        sizes = Engine(net, limits=limits).room.sizes
        room = 7 * sizes.slot + 6 * sizes.page
        limits = Limits(max_sequences=6, step_tokens=64, cache_bytes=room)
    play, wanted = Play(Engine(net, limits=limits)), asks(text, 14)
    requests = play.load(wanted)
    for ask, request in zip(wanted, requests, strict=True):
        assert play.tokens(request) == [alone(net, ask.prompt, ask.sampling).tokens]
    check_at_rest(play.engine)


def test_a_beginning_is_found(model: Any, text: Any) -> None:
    play = Play(Engine(model("hymba"), limits=Limits(max_sequences=4, cache_bytes=2**28)))
    prompt = text(300).tolist()
    first = play.one(prompt, HOW[0])
    chunked, turn = play.chunked, [*prompt, *first.tokens, 5, 6, 7]
    second = play.one(turn, HOW[0])
    assert play.chunked - chunked <= 4
    assert second.tokens == alone(play.engine.model, turn, HOW[0]).tokens


def test_the_host_waits_for_nothing(model: Any, text: Any) -> None:
    """Decode steps, greedy and drawn, under CUDA's own watch (it sees most waits, not all)."""
    engine = Engine(model("hymba"), limits=Limits(max_sequences=8, cache_bytes=2**28))
    engine.warm_up()
    for index in range(5):
        how = Sampling(max_tokens=60, temperature=float(index % 2), seed=index, stop_ids=())
        engine.add(text(20, index).tolist(), how)
    for _ in range(6):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        said = [delta for _ in range(12) for delta in engine.step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(said) == 60


def test_a_graph_for_each_number_of_rows(model: Any) -> None:
    engine = Engine(model("hymba"), limits=Limits(max_sequences=9, cache_bytes=2**28))
    engine.warm_up()
    sizes = {rounded_rows(rows) for rows in range(1, 10)}
    assert set(engine.runner._captured) == sizes == {1, 2, 4, 6, 8, 12}
