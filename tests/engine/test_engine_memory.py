"""What an engine does with a sequence's memory: out to the host and back, kept for whoever begins
alike, branched for several answers; and the one-request loop's tokens come of it all the same.

Everything free is poisoned before every step, see `playing.Play`.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from hymba.engine import Engine, Limits, Sampling
from hymba.engine.sampling_reference import sample_reference
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from tests.engine.playing import (
    FREE,
    PLANS,
    Ask,
    Play,
    Prompt,
    Twin,
    check_at_rest,
    paged_room,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# ---- preempted and resumed


@pytest.mark.parametrize(("ahead", "host_bytes"), [(0, 2**30), (1, 300_000), (1, 0)])
@pytest.mark.parametrize("plan", ["hymba", "llama"])
def test_preempted_and_resumed(
    model: Any, twin: Twin, prompt: Prompt, plan: str, ahead: int, host_bytes: int
) -> None:
    """Sequences grow beyond three pages: the youngest leave, to the host's memory or to be
    computed again, and their draws and penalties go on where they were."""
    limits = paged_room(model(plan), 3, 3, host_bytes=host_bytes, prefix_bytes=0, step_tokens=600)
    play = Play(Engine(model(plan), limits=limits, ahead=ahead))
    hows = [
        Sampling(max_tokens=20, stop_ids=()),
        Sampling(max_tokens=18, temperature=1.0, seed=8, stop_ids=(), frequency_penalty=1.0),
        Sampling(max_tokens=16, temperature=0.7, seed=1, stop_ids=(), repetition_penalty=1.2),
        Sampling(max_tokens=5, stop_ids=()),
    ]
    asked = list(zip([prompt(n) for n in (247, 244, 251, 256)], hows, strict=True))
    requests = [play.add(*each) for each in asked]
    play.all()
    assert play.engine.stats().preemptions >= 2
    for each, request in zip(asked, requests, strict=True):
        assert play.tokens(request) == [twin(plan, *each).tokens]
    work = sum(len(p) - 1 + how.max_tokens for p, how in asked)
    assert play.computed == work if host_bytes == 2**30 else play.computed >= work
    assert play.computed > work + 200 or host_bytes, "computed again where there is no room"
    check_at_rest(play.engine)


@pytest.mark.parametrize(("ahead", "host_bytes"), [(0, 2**30), (1, 400_000)])
def test_many_are_preempted(
    model: Any, twin: Twin, prompt: Prompt, ahead: int, host_bytes: int
) -> None:
    """So that they come back into others' slots and pages."""
    draw = random.Random(ahead)
    limits = paged_room(model("llama"), 6, 7, host_bytes=host_bytes, step_tokens=1500)
    play = Play(Engine(model("llama"), limits=limits, ahead=ahead))
    asks = []
    for i in range(14):
        length, room = draw.randrange(240, 256), draw.randrange(10, 40)
        how = Sampling(max_tokens=room, temperature=i % 3 / 2, seed=i, stop_ids=())
        at = draw.randrange(20)
        asks.append(Ask(prompt(length), how, at, None if i % 5 else at + draw.randrange(20)))
    for ask, request in zip(asks, play.load(asks), strict=True):
        (found,), want = play.tokens(request), twin("llama", ask.prompt, ask.sampling).tokens
        assert found == (want if ask.cancelled is None else want[: len(found)])
    assert play.engine.stats().preemptions >= 4
    check_at_rest(play.engine)


def test_preempted_beside_kept_beginnings(model: Any, twin: Twin, prompt: Prompt) -> None:
    """Kept beginnings go first, and a request that comes back may find its own."""
    limits = paged_room(model("hymba"), 3, 3, host_bytes=0, prefix_bytes=2**30, step_tokens=300)
    play = Play(Engine(model("hymba"), limits=limits))
    asked = [(prompt(n, 3)[:n], replace(FREE, max_tokens=16)) for n in (247, 250)]
    for _ in range(2):
        requests = [play.add(*each) for each in asked]
        play.all()
        for each, request in zip(asked, requests, strict=True):
            assert play.tokens(request) == [twin("hymba", *each).tokens]
    assert play.engine.stats().preemptions
    check_at_rest(play.engine)


def test_cancelled_while_preempted(model: Any, twin: Twin, prompt: Prompt) -> None:
    limits = paged_room(model("llama"), 2, 3, prefix_bytes=0)
    play = Play(Engine(model("llama"), limits=limits))
    how = replace(FREE, max_tokens=30)
    first, second = play.add(prompt(250), how), play.add(prompt(249), how)
    while not play.engine.stats().preemptions:
        play.step()
    assert play.engine._host_bytes > 0
    play.engine.cancel(second)
    assert play.engine._host_bytes == 0
    play.all()
    assert play.tokens(first) == [twin("llama", prompt(250), how).tokens]
    check_at_rest(play.engine)


def test_a_beginning_is_copied_before_its_pages_are_another_s(
    model: Any, twin: Twin, prompt: Prompt
) -> None:
    """Two come in at once, and the second needs the page of what the first begins with."""
    limits = paged_room(model("hymba"), 2, 3, prefix_bytes=2**30)
    play = Play(Engine(model("hymba"), limits=limits))
    play.one(prompt(60), FREE)
    more = [*prompt(60), 5]
    first, second = play.add(more, FREE), play.add(prompt(300), FREE)
    play.all()
    assert first.cached_tokens == 59
    assert play.tokens(first) == [twin("hymba", more, FREE).tokens]
    assert play.tokens(second) == [twin("hymba", prompt(300), FREE).tokens]
    check_at_rest(play.engine)


# ---- beginnings kept


@pytest.mark.parametrize(("first", "ahead"), [(40, 1), (250, 0)])
@pytest.mark.parametrize("plan", PLANS)
def test_a_second_turn_does_not_compute_the_first(
    model: Any, twin: Twin, prompt: Prompt, plan: str, first: int, ahead: int
) -> None:
    """Through the end of a page, too."""
    play = Play(Engine(model(plan), ahead=ahead))
    turn = prompt(first)
    for _ in range(2):
        answer = play.one(turn, FREE)
        assert answer.tokens == twin(plan, turn, FREE).tokens
        known, turn = len(turn) + 8 - 1, [*turn, *answer.tokens, *prompt(6)]
        before = play.chunked
        request = play.add(turn, FREE)
        play.all()
        assert request.cached_tokens == known
        assert play.chunked - before == len(turn) - 1 - known
        assert play.tokens(request) == [twin(plan, turn, FREE).tokens]
    assert play.engine.stats().prefix_hits == 2 + 1  # and each turn twice
    check_at_rest(play.engine)


def test_a_stop_id_that_the_next_turn_has(model: Any, twin: Twin, prompt: Prompt) -> None:
    """With a step ahead the stop id has been computed, and the next turn of a chat has it."""
    for ahead in (0, 1):
        play = Play(Engine(model("hymba"), ahead=ahead))
        long = twin("hymba", prompt(30), FREE).tokens
        stop = next(t for i, t in enumerate(long) if i > 2 and t not in long[:i])
        answer = play.one(prompt(30), Sampling(stop_ids=(stop,)))
        turn = [*prompt(30), *answer.tokens, stop, 4, 5]
        request = play.add(turn, FREE)
        play.all()
        assert request.cached_tokens == 30 + len(answer.tokens) + ahead
        assert play.tokens(request) == [twin("hymba", turn, FREE).tokens]


@pytest.mark.parametrize("length", [256, 300])
def test_a_shared_system_prompt(model: Any, twin: Twin, prompt: Prompt, length: int) -> None:
    """Two requests show where it ends, the third is served from it; pages are shared."""
    play = Play(Engine(model("hymba"), limits=Limits(step_tokens=400)))
    system = prompt(length)
    for number in range(4):
        asked = [*system, 50 + number, *prompt(20, number)]
        before = play.chunked
        request = play.add(asked, FREE)
        play.step()
        play.all()
        found = length if number >= 2 else 0
        assert request.cached_tokens == found
        assert play.chunked - before == length + 20 - found
        assert play.tokens(request) == [twin("hymba", asked, FREE).tokens]
    stats = play.engine.stats()
    assert (stats.prefix_hits, stats.prefix_hit_tokens) == (2, 2 * length)
    check_at_rest(play.engine)


def test_what_begins_alike_shares_full_pages(model: Any, twin: Twin, prompt: Prompt) -> None:
    """Two go on from one beginning at once, each in its own last page."""
    play = Play(Engine(model("hymba"), limits=Limits(step_tokens=400)))
    system, how = prompt(270), replace(FREE, max_tokens=20)
    play.one([*system, 1], how)
    asked = [[*system, 1], [*system, 1, 2], [*system, 1, 2]]
    requests = [play.add(each, how) for each in asked]
    before = play.engine.pages.used
    play.step()
    assert play.engine.pages.used == before + 3 + 1  # and the beginning of the second, kept
    play.all()
    for each, request in zip(asked, requests, strict=True):
        assert request.cached_tokens == 270
        assert play.tokens(request) == [twin("hymba", each, how).tokens]
    check_at_rest(play.engine)


def test_beginnings_are_exact_to_the_token(model: Any, twin: Twin, prompt: Prompt) -> None:
    """The same again computes nothing; one token less, or another one, is another beginning."""
    play = Play(Engine(model("samba"), limits=Limits(shortest_prefix=8)))
    asked = prompt(20)
    play.one(asked, FREE)
    other = [*asked[:10], (asked[10] + 1) % 61, *asked[11:]]
    for again, cached in ((asked, 19), (asked[:19], 0), (other, 0), (other, 19), (asked, 19)):
        request = play.add(again, FREE)
        play.all()
        assert request.cached_tokens == cached
        assert play.tokens(request) == [twin("samba", again, FREE).tokens]


def test_short_beginnings_are_not_kept(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("mamba"), limits=Limits(shortest_prefix=16)))
    how = Sampling(max_tokens=4, stop_ids=())
    for length, kept in ((12, 0), (13, 1), (17, 3)):  # its end; with the answer 15, 16, 20
        play.one(prompt(length), how)
        assert len(play.engine.prefixes) == kept


@pytest.mark.parametrize("plan", ["hymba", "mamba"])
def test_beginnings_stay_within_their_bytes(
    model: Any, twin: Twin, prompt: Prompt, plan: str
) -> None:
    """The least recently used goes; computed again, it is there again."""
    sizes = Engine(model(plan)).room.sizes
    limit = 4 * (sizes.slot + sizes.page) + 1
    play = Play(Engine(model(plan), limits=Limits(prefix_bytes=limit)))

    def ask(seed: int) -> int:
        request = play.add(prompt(20 + seed, seed), FREE)
        while play.engine.busy:
            play.step()
            assert play.engine.stats().prefix_bytes <= limit
        want = twin(plan, prompt(20 + seed, seed), FREE)
        assert play.tokens(request) == [want.tokens]
        return request.cached_tokens

    assert [ask(0), ask(1), ask(0), ask(2), ask(0), ask(1)] == [0, 0, 19, 0, 19, 0]
    assert [ask(1), ask(3), ask(4), ask(5), ask(0), ask(0)] == [20, 0, 0, 0, 0, 19]
    check_at_rest(play.engine)


def test_none_are_kept_where_none_may_be(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("hymba"), limits=Limits(prefix_bytes=0)))
    for _ in range(2):
        request = play.add(prompt(40), replace(FREE, n=3))
        play.all()
        assert request.cached_tokens == 0
        assert play.engine.stats().cache_bytes == play.engine.stats().prefix_hits == 0


# ---- several answers to one prompt


@torch.no_grad()
def branch(model: LanguageModel, prompt: list[int], how: Sampling, index: int) -> list[int]:
    """Answer `index` of several, each token from one whole forward."""
    said: list[int] = []
    while len(said) < how.max_tokens:
        tokens = torch.tensor([*prompt, *said])
        logits = model.logits(model(tokens, Batch.of([len(tokens)])))[-1]
        said.append(sample_reference(logits, how, how.some_seed(), index, prompt, said))
    return said


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_answers_branch_from_one_prompt(model: Any, prompt: Prompt, plan: str, ahead: int) -> None:
    """More of them than slots, and the prompt is computed once."""
    how = Sampling(max_tokens=8, temperature=1.0, seed=3, n=4, stop_ids=())
    play = Play(Engine(model(plan), limits=Limits(max_sequences=3), ahead=ahead))
    request = play.add(prompt(30), how)
    play.all()
    assert play.tokens(request) == [branch(model(plan), prompt(30), how, i) for i in range(4)]
    assert len({tuple(tokens) for tokens in play.tokens(request)}) > 1
    assert play.chunked == 29 and play.computed == 29 + 4 * 8
    assert request.cached_tokens == 0, "its own prompt was not found, it was computed"
    assert play.engine.stats().prompt_tokens == 30
    check_at_rest(play.engine)


def test_several_answers_to_a_prompt_of_one_token(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("hymba")))
    how = Sampling(max_tokens=6, temperature=1.0, seed=3, n=3, stop_ids=())
    request = play.add([9], how)
    play.all()
    assert play.tokens(request) == [branch(model("hymba"), [9], how, i) for i in range(3)]
    play.one([8], FREE)
    assert play.engine.stats().prefix_hits == 0, "nothing is no beginning"
    check_at_rest(play.engine)


def test_several_answers_where_pages_are_few(model: Any, twin: Twin, prompt: Prompt) -> None:
    """They wait for each other, are preempted, and give what they give alone."""
    limits = paged_room(model("llama"), 3, 3, prefix_bytes=2**30, step_tokens=600)
    play = Play(Engine(model("llama"), limits=limits))
    how = replace(FREE, max_tokens=20, n=4)
    request, other = play.add(prompt(250), how), play.add(prompt(260), FREE)
    play.all()
    want = twin("llama", prompt(250), replace(how, n=1)).tokens
    assert play.tokens(request) == [want] * 4
    assert play.tokens(other) == [twin("llama", prompt(260), FREE).tokens]
    check_at_rest(play.engine)


def test_several_answers_are_cancelled_together(model: Any, prompt: Prompt) -> None:
    for steps in range(5):
        play = Play(Engine(model("mamba"), limits=Limits(max_sequences=2, prefix_bytes=0)))
        request = play.add(prompt(30), replace(FREE, n=4))
        for _ in range(steps):
            play.step()
        play.engine.cancel(request)
        play.engine.cancel(request)  # twice is nothing
        assert play.engine.step() == []
        check_at_rest(play.engine)


def test_no_delta_after_a_cancel(model: Any, prompt: Prompt) -> None:
    """Not even of the step that was launched before it."""
    play = Play(Engine(model("hymba"), ahead=1))
    kept, gone = play.add(prompt(5), FREE), play.add(prompt(6), FREE)
    for _ in range(4):
        play.step()
    said = len(play.tokens(gone)[0])
    play.engine.cancel(gone)
    play.all()
    assert len(play.tokens(gone)[0]) == said and len(play.tokens(kept)[0]) == 8
