"""The engine says what the one-request loop says, token for token, whatever happens to a request.

Everything free is poisoned before every step (`playing.Play`), and memory that nobody wrote is NaN.
float32, because that is the promise; the tiny models' logits are far enough apart.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from hymba.engine import Engine, Limits, QueueFull, Sampling
from hymba.errors import UserError
from hymba.model.accounting import cache_bytes
from hymba.model.batch import Batch
from hymba.tokenizer import Tokenizer
from tests.engine.playing import (
    FREE,
    PLANS,
    Ask,
    Play,
    Prompt,
    Twin,
    alone,
    check_at_rest,
    paged_room,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

ASKED = [
    Sampling(max_tokens=14),
    Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=4),
    Sampling(max_tokens=16, temperature=1.0, top_k=9, seed=5, frequency_penalty=0.5),
    Sampling(max_tokens=9, repetition_penalty=1.3, logit_bias={3: 1.0}),
    Sampling(max_tokens=18, temperature=1.2, min_p=0.05, seed=2**63, stop_ids=(7, 9)),
    Sampling(max_tokens=1),
    Sampling(max_tokens=10, presence_penalty=1.5, stop_ids=()),
]
LENGTHS = [1, 30, 255, 2, 256, 9, 257, 12, 300, 5, 40, 3]


# ---- any load


@pytest.mark.parametrize(("ahead", "slots", "step_tokens"), [(0, 4, 80), (1, 6, 600)])
@pytest.mark.parametrize("plan", PLANS)
def test_ragged_loads(
    model: Any, twin: Twin, prompt: Prompt, plan: str, ahead: int, slots: int, step_tokens: int
) -> None:
    """Arrivals and cancels at random steps, prompts around a page, rings that wrap many times."""
    draw = random.Random(f"{plan} {ahead}")
    asks = []
    for i, length in enumerate(LENGTHS):
        at = draw.randrange(25)
        gone = at + draw.randrange(1, 12) if i in (1, 6, 9) else None
        asks.append(Ask(prompt(length), ASKED[i % len(ASKED)], at, gone))
    limits = Limits(max_sequences=slots, step_tokens=step_tokens)
    play = Play(Engine(model(plan), limits=limits, ahead=ahead))
    for ask, request in zip(asks, play.load(asks), strict=True):
        found, want = play.said[request][0], twin(plan, ask.prompt, ask.sampling)
        if found.finish is None:
            assert ask.cancelled is not None
            assert found.tokens == want.tokens[: len(found.tokens)]
        else:
            assert (found.tokens, found.finish) == (want.tokens, want.finish)
    check_at_rest(play.engine)


@pytest.mark.parametrize("step_tokens", [1, 3, 17, 1000])
def test_budgets(model: Any, twin: Twin, prompt: Prompt, step_tokens: int) -> None:
    """However a prompt is cut: one token a step, or all at once."""
    limits = Limits(max_sequences=1 if step_tokens == 1 else 2, step_tokens=step_tokens)
    play = Play(Engine(model("hymba"), limits=limits))
    prompts = [prompt(13), prompt(22), prompt(1)]
    requests = [play.add(each, FREE) for each in prompts]
    most = 0
    while play.engine.busy:
        before = play.computed
        play.step()
        most = max(most, play.computed - before)
    assert most <= max(step_tokens, limits.max_sequences)
    for each, request in zip(prompts, requests, strict=True):
        assert play.tokens(request) == [twin("hymba", each, FREE).tokens]


@pytest.mark.parametrize("plan", ["hymba", "llama", "mamba"])
def test_many_more_requests_than_slots(model: Any, twin: Twin, prompt: Prompt, plan: str) -> None:
    play = Play(Engine(model(plan), limits=Limits(max_sequences=2)))
    asked = [(prompt(1 + i % 7), replace(ASKED[i % 4], max_tokens=5)) for i in range(16)]
    requests = [play.add(*each) for each in asked]
    assert play.engine.stats().waiting == 16
    play.all()
    for each, request in zip(asked, requests, strict=True):
        assert play.tokens(request) == [twin(plan, *each).tokens]
    check_at_rest(play.engine)


def test_two_engines_on_one_model(model: Any, twin: Twin, prompt: Prompt) -> None:
    plays = [Play(Engine(model("hymba"), limits=Limits(max_sequences=n))) for n in (1, 3)]
    prompts = [prompt(20, seed) for seed in range(3)]
    requests = [[play.add(each, FREE) for each in prompts] for play in plays]
    while any(play.engine.busy for play in plays):
        for play in plays:
            play.step()
    for play, own in zip(plays, requests, strict=True):
        for each, request in zip(prompts, own, strict=True):
            assert play.tokens(request) == [twin("hymba", each, FREE).tokens]


# ---- ends


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("plan", ["hymba", "mamba"])
def test_the_last_position(model: Any, twin: Twin, prompt: Prompt, plan: str, ahead: int) -> None:
    play = Play(Engine(model(plan), ahead=ahead))
    how = Sampling(max_tokens=50, stop_ids=())
    for length, says in ((505, 7), (511, 1)):
        found = play.one(prompt(length), how)
        assert (len(found.tokens), found.finish) == (says, "length")
        assert found.tokens == twin(plan, prompt(length), how).tokens
    check_at_rest(play.engine)


def test_sequences_longer_than_two_pages(lively: Any, tiny: Any, prompt: Prompt) -> None:
    """Three pages, and beside one of a page, in chunks and in steps: its row of the table does not
    end in pages that a sequence before it had in its slot."""
    model = lively(replace(tiny("hymba-no-meta"), max_positions=1024))
    sizes = Engine(model).room.sizes
    kept = 2 * (sizes.slot + sizes.page)  # of the short one, not of the long ones
    limits = Limits(max_sequences=2, step_tokens=700, prefix_bytes=kept)
    play = Play(Engine(model, limits=limits))
    short = [*prompt(60), 5, *prompt(20)]
    for prompts in ([prompt(60)], [prompt(600), prompt(610)], [prompt(760), short]):
        requests = [play.add(each, FREE) for each in prompts]
        play.all()
        for each, request in zip(prompts, requests, strict=True):
            assert play.tokens(request) == [alone(model, each, FREE).tokens]
    assert requests[1].cached_tokens == 59


@pytest.mark.parametrize("ahead", [0, 1])
def test_stop_ids(model: Any, twin: Twin, prompt: Prompt, ahead: int) -> None:
    """The stop id is not part of the answer, and what was computed behind it does not show."""
    play = Play(Engine(model("hymba"), ahead=ahead))
    long = twin("hymba", prompt(9), FREE).tokens
    stop = next(t for i, t in enumerate(long) if i > 2 and t not in long[:i])
    found = play.one(prompt(9), Sampling(stop_ids=(stop,)))
    assert (found.tokens, found.finish) == (long[: long.index(stop)], "stop")
    check_at_rest(play.engine)


def test_the_model_s_own_end(model: Any, prompt: Prompt, lively: Any, tiny: Any) -> None:
    """stop_ids=None is the config's eos_token_id, and a model without one does not stop."""
    said = alone(model("llama"), prompt(6), FREE).tokens
    config = tiny("llama")
    for eos, finish in ((said[4], "stop"), (None, "length")):
        engine = Engine(lively(replace(config, eos_token_id=eos)))
        found = Play(engine).one(prompt(6), Sampling(max_tokens=8))
        assert found.finish == finish
        assert found.tokens == (said if eos is None else said[: said.index(eos)])


# ---- log-probabilities and constraints


@pytest.mark.parametrize("ahead", [0, 1])
def test_logprobs_are_the_plain_forward_s(model: Any, prompt: Prompt, ahead: int) -> None:
    """Beside requests that ask for others or none; of the model, whatever sampling makes of it."""
    play = Play(Engine(model("hymba"), ahead=ahead))
    hows = [
        Sampling(max_tokens=6, stop_ids=(), logprobs=3),
        Sampling(max_tokens=7, stop_ids=()),
        Sampling(max_tokens=5, stop_ids=(), logprobs=0, temperature=1.0, top_k=3, seed=1),
        Sampling(max_tokens=5, stop_ids=(), logprobs=20, logit_bias={4: 5.0}),
    ]
    requests = [play.add(prompt(9 + i), how) for i, how in enumerate(hows)]
    play.all()
    for i, (request, how) in enumerate(zip(requests, hows, strict=True)):
        found = play.said[request][0]
        if how.logprobs is None:
            assert found.logprobs == []
            continue
        tokens = torch.tensor([*prompt(9 + i), *found.tokens])
        with torch.no_grad():
            logits = model("hymba").logits(model("hymba")(tokens, Batch.of([len(tokens)])))
        want = logits.log_softmax(-1)[9 + i - 1 : -1]
        assert [said.token for said in found.logprobs] == found.tokens
        for said, row in zip(found.logprobs, want, strict=True):
            assert said.logprob == pytest.approx(row[said.token].item(), abs=1e-4)
            best = row.topk(how.logprobs)
            assert [token for token, _ in said.top] == best.indices.tolist()
            assert [x for _, x in said.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tiny models' 61 ids are its first: specials and printing characters."""
    return Tokenizer.train(["abc"], vocab_size=300)


@pytest.mark.parametrize("ahead", [0, 1])
def test_constrained_beside_free(
    model: Any, twin: Twin, prompt: Prompt, tokenizer: Tokenizer, ahead: int
) -> None:
    pytest.importorskip("xgrammar")
    hows = [
        Sampling(max_tokens=20, regex="[A-C]{4}[0-9]+X"),
        FREE,
        Sampling(max_tokens=9, regex="[0-9]+", temperature=1.0, seed=5),
        Sampling(max_tokens=9, regex="ABC", stop_ids=()),
        Sampling(max_tokens=9, temperature=1.0, seed=5),
        Sampling(max_tokens=9, regex="(A{0})"),
    ]
    limits = Limits(max_sequences=4)
    play = Play(Engine(model("hymba"), tokenizer, limits, ahead=ahead))
    requests = [play.add(prompt(5 + i), how) for i, how in enumerate(hows)]
    play.all()
    for i, (request, how) in enumerate(zip(requests, hows, strict=True)):
        found, want = play.said[request][0], twin("hymba", prompt(5 + i), how, tokenizer)
        assert (found.tokens, found.finish) == (want.tokens, want.finish)
        assert found.text == want.text == tokenizer.decode(found.tokens)
    assert play.said[requests[3]][0].text == "ABC"
    check_at_rest(play.engine)


def test_several_constrained_answers(model: Any, prompt: Prompt, tokenizer: Tokenizer) -> None:
    """Each stands at its own place in the grammar."""
    pytest.importorskip("xgrammar")
    play = Play(Engine(model("mamba"), tokenizer, Limits(max_sequences=2)))
    how = Sampling(max_tokens=20, regex="[A-C]{4,9}X", temperature=1.0, seed=1, n=3)
    request = play.add(prompt(9), how)
    play.all()
    found = [completion.text for completion in play.said[request]]
    assert len(set(found)) == 3 and all(re.fullmatch("[A-C]{4,9}X", text) for text in found)


def test_constrained_and_preempted(
    model: Any, twin: Twin, prompt: Prompt, tokenizer: Tokenizer
) -> None:
    """Where an answer stands in its grammar is not lost with its slot."""
    pytest.importorskip("xgrammar")
    play = Play(Engine(model("llama"), tokenizer, paged_room(model("llama"), 2, 3), ahead=1))
    how = Sampling(max_tokens=30, regex="([0-9][A-F]){9}")
    asked = [(prompt(250), replace(FREE, max_tokens=30)), (prompt(249), how)]
    requests = [play.add(*each) for each in asked]
    play.all()
    assert play.engine.stats().preemptions
    for each, request in zip(asked, requests, strict=True):
        assert play.tokens(request) == [twin("llama", *each, tokenizer).tokens]


@pytest.mark.parametrize("ahead", [0, 1])
def test_stop_strings(
    model: Any, twin: Twin, prompt: Prompt, tokenizer: Tokenizer, ahead: int
) -> None:
    play = Play(Engine(model("hymba"), tokenizer, ahead=ahead))
    how = Sampling(max_tokens=30, temperature=1.0, seed=3, stop_ids=())
    free = twin("hymba", prompt(7), how, tokenizer)
    for stop in ((free.text[7:9], free.text[6:9]), (free.text[3:5], "never"), ("\ufffd",)):
        asked = replace(how, stop=stop)
        found, want = play.one(prompt(7), asked), twin("hymba", prompt(7), asked, tokenizer)
        assert (found.text, found.tokens, found.finish) == (want.text, want.tokens, want.finish)


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], None, "the prompt is empty"),
        ([1, 61], None, r"token id 61 is outside the vocabulary \(0 to 60\)"),
        ([-1], None, "token id -1 is outside"),
        ([1] * 512, None, "the prompt has 512 tokens; sequences may have 512 here"),
        ([1], Sampling(stop="x"), "stop strings need a tokenizer"),
        ([1], Sampling(regex="x", n=3), "constraints need a tokenizer"),
        ([1], Sampling(logit_bias={61: 1}), "logit_bias: token id 61 is outside"),
    ],
)
def test_what_is_refused(model: Any, prompt: Any, sampling: Any, message: str) -> None:
    engine = Engine(model("hymba"))
    with pytest.raises(UserError, match=message):
        engine.add(prompt, sampling)
    check_at_rest(engine)
    assert engine.stats().prompt_tokens == 0 and engine.step() == []


def test_a_constraint_that_cannot_be_followed(
    model: Any, tokenizer: Tokenizer, prompt: Prompt
) -> None:
    pytest.importorskip("xgrammar")
    engine = Engine(model("hymba"), tokenizer)
    for refuse in (lambda how: engine.add(prompt(30), how), engine.prepare):
        with pytest.raises(UserError, match="regex cannot be followed"):
            refuse(Sampling(regex="(", n=2))
    check_at_rest(engine)
    assert Play(engine).one(prompt(3), FREE).finish == "length"


def test_a_full_queue(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("mamba"), limits=Limits(max_sequences=1, queue=3)))
    for _ in range(3):
        play.add(prompt(4), FREE)
    with pytest.raises(QueueFull, match="3 requests wait already"):
        play.engine.add(prompt(4), FREE)
    play.step()
    play.add(prompt(4), FREE)
    play.all()
    assert all(completion.finish for (completion,) in play.said.values())
    check_at_rest(play.engine)


def test_longest_sequences_of_a_small_cache(model: Any, prompt: Prompt) -> None:
    """One page is 256 tokens for prompt and answer together, and the message says so."""
    play = Play(Engine(model("llama"), limits=paged_room(model("llama"), 1, 1)))
    with pytest.raises(UserError, match="the prompt has 256 tokens; sequences may have 256 here"):
        play.engine.add(prompt(256), FREE)
    found = play.one(prompt(250), FREE)
    assert (len(found.tokens), found.finish) == (6, "length")


# ---- counts


@pytest.mark.parametrize("plan", PLANS)
def test_bytes_are_as_predicted(model: Any, plan: str) -> None:
    """Allocated is what Room says, and what the accounting says of a sequence."""
    engine = Engine(model(plan), limits=Limits(max_sequences=3))
    room, config = engine.room, engine.model.config
    predicted = cache_bytes(config, room.max_tokens, kv_bytes=4, state_bytes=4)
    assert engine.store.nbytes()["total"] == room.cache_bytes == engine.stats().cache_bytes_total
    assert room.sizes.slot + room.sizes.page * (2 if room.pages else 0) == predicted["total"]
    assert engine.stats().meta_bytes == predicted["meta"]
    tensors = [*engine.store.rings, *engine.store.paged, *engine.store.states]
    assert sum(x.nbytes for x in tensors) == room.cache_bytes


def test_stats_add_up(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("hymba"), limits=Limits(max_sequences=2)))
    sizes = play.engine.room.sizes
    requests = [play.add(prompt(n), FREE) for n in (20, 300, 8)]
    steps = 0
    while play.engine.busy:
        play.step()
        steps += 1
        stats = play.engine.stats()
        going = [r for r in requests if play.said[r][0].finish is None]
        assert stats.running + stats.waiting == len(going) and stats.running <= 2
        assert stats.generated_tokens == sum(len(play.tokens(r)[0]) for r in requests)
        used = stats.running * sizes.slot + play.engine.pages.used * sizes.page
        assert stats.cache_bytes == used + len(play.engine.prefixes) * sizes.slot
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (steps, 328, 24)
    assert (stats.preemptions, stats.prefix_hits) == (0, 0)
    check_at_rest(play.engine)


def test_seeds(model: Any, prompt: Prompt) -> None:
    play = Play(Engine(model("hymba")))

    def said(seed: int | None) -> list[int]:
        return play.one(prompt(5), replace(FREE, temperature=1.0, seed=seed)).tokens

    assert said(1) == said(1) != said(2)
    assert said(None) != said(None)
