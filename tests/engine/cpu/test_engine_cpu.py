"""The engine over a packed model: what it says is what it says by torch, whoever comes and goes,
and also after Ctrl-C and in a forked child."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.engine import Engine, Limits, Sampling
from hymba.engine.interrupt import between_steps
from hymba.model.decoder import LanguageModel
from hymba.ops.backend import forget
from tests.engine.cpu.packing import Pair, pair
from tests.engine.playing import FREE, Ask, Play, check_at_rest, paged_room

pytest.importorskip("numba")

PLANS = ["hymba", "samba", "mamba", "llama-meta"]


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> Any:
    pairs: dict[str, Pair] = {}

    def make(plan: str) -> Pair:
        if plan not in pairs:
            pairs[plan] = pair(lively, tiny(plan), "int8")
        return pairs[plan]

    return make


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Or tokens would differ by the rounding of activations."""
    from hymba.ops.cpu import tiles

    monkeypatch.delenv("HYMBA_BACKEND", raising=False)
    monkeypatch.setenv("HYMBA_EXACT", "1")
    forget()
    tiles.exact_asked.cache_clear()
    yield
    tiles.exact_asked.cache_clear()


def asks() -> list[Ask]:
    """Fifteen at once and one after the other, some of which leave in the middle."""
    found = []
    for number in range(15):
        prompt = [(7 * number + 3 * place) % 61 for place in range(1 + 5 * (number % 4))]
        how = Sampling(max_tokens=6 + number, stop_ids=(), temperature=0.7 * (number % 2), seed=5)
        found.append(Ask(prompt, how, number // 3, 9 if number == 7 else None))
    return found


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("plan", PLANS)
def test_says_what_torch_says(plan: str, kv_dtype: str | None, made: Any) -> None:
    packed, wide = made(plan)
    plays = []
    for model in packed, wide:
        play = Play(Engine(model, limits=Limits(max_sequences=10, kv_dtype=kv_dtype)))
        store = play.engine.store
        kept = {x.dtype for x in (*store.rings, *store.paged)}
        assert kept <= {getattr(torch, kv_dtype or "float32")}
        assert (play.engine.runner.program is not None) == (model is packed)
        plays.append([play.tokens(request) for request in play.load(asks())])
        check_at_rest(play.engine)
    assert plays[0] == plays[1]


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16"])
def test_pages_run_out(kv_dtype: str | None, made: Any) -> None:
    """Who is sent away and comes back goes on with the same tokens."""
    packed, wide = made("hymba")
    how = Sampling(max_tokens=300, stop_ids=())
    tight = Play(Engine(packed, limits=paged_room(packed, 3, 4, kv_dtype=kv_dtype)))
    ample = Play(Engine(packed, limits=Limits(max_sequences=3, kv_dtype=kv_dtype)))
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    said = [[play.tokens(r) for r in play.load([Ask(p, how) for p in prompts])]
            for play in (tight, ample)]  # fmt: skip
    assert tight.engine.stats().preemptions and said[0] == said[1]


def test_torch_on_request(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = made("llama-meta")
    monkeypatch.setenv("HYMBA_BACKEND", "torch")
    forget()
    try:
        assert Engine(packed, limits=Limits(max_sequences=1)).runner.program is None
    finally:
        monkeypatch.delenv("HYMBA_BACKEND")
        forget()


# ---- Ctrl-C and fork -----------------------------------------------------------------------


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_step(made: Any) -> None:
    packed, _ = made("hymba")
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    undisturbed = Play(Engine(packed, limits=Limits(max_sequences=3)))
    want = [undisturbed.tokens(r) for r in undisturbed.load([Ask(p, FREE) for p in prompts])]

    play = Play(Engine(packed, limits=Limits(max_sequences=3)))
    requests = [play.add(prompt, FREE) for prompt in prompts]
    program = play.engine.runner.program
    assert program is not None
    inner, calls, stopped = program.step, 0, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2:
            press()
        logits = inner(*args)
        return logits

    program.step = interrupted  # type: ignore[method-assign]
    while play.engine.busy:
        try:
            play.step()
        except KeyboardInterrupt:
            stopped += 1
    for _ in range(2):  # the last step's, if it was stopped
        play.step()
    assert stopped >= 3 and [play.tokens(request) for request in requests] == want


def test_a_second_ctrl_c_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), between_steps():
        press()
        reached.append(1)
        press()
        reached.append(2)
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt):
        press()
        signal.getsignal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_in_a_forked_child(made: Any) -> None:
    packed, _ = made("samba")
    engine = Engine(packed, limits=Limits(max_sequences=2))
    want = Play(engine).one([1, 2, 3], FREE).tokens
    child = os.fork()
    if not child:  # threads of the parent are not there
        os._exit(0 if Play(engine).one([1, 2, 3], FREE).tokens == want else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
