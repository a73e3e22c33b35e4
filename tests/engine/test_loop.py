"""The simple loop: every row says what it says alone, and every way to end is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba.config import Config
from hymba.engine import Sampling, generate, stream
from hymba.engine.sampling_reference import sample_reference
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer

Text = Callable[..., list[Tensor]]

ASKED = [
    Sampling(max_tokens=20),
    Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=4),
    Sampling(max_tokens=25, temperature=1.0, top_k=9, seed=5, frequency_penalty=0.5),
    Sampling(max_tokens=9, repetition_penalty=1.3, logit_bias={3: 1.0}),
]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> LanguageModel:
    return lively(tiny("hymba"), dtype=torch.float64)  # so that no rounding turns a choice


@pytest.fixture
def prompts(text: Text) -> list[list[int]]:
    return [x.tolist() for x in text([7, 1, 30, 12])]


@torch.no_grad()
def whole(model: LanguageModel, prompt: list[int], how: Sampling) -> list[int]:
    """The same without a cache, a batch or a chunk: every token from one whole forward."""
    said: list[int] = []
    while len(said) < how.max_tokens:
        tokens = torch.tensor([*prompt, *said])
        logits = model.logits(model(tokens, Batch.of([len(tokens)])))[-1]
        token = sample_reference(logits, how, how.some_seed(), 0, prompt, said)
        if token == model.config.eos_token_id:
            break
        said.append(token)
    return said


def test_beside_each_other_as_alone(model: LanguageModel, prompts: list[list[int]]) -> None:
    """Whatever stands beside a prompt, and however it is cut into chunks."""
    want = [whole(model, prompt, how) for prompt, how in zip(prompts, ASKED, strict=True)]
    for step_tokens in (1024, 5):
        found = generate(model, prompts, ASKED, step_tokens=step_tokens)
        assert [one.tokens for one in found] == want
    order = [2, 0, 3, 1]
    found = generate(model, [prompts[i] for i in order], [ASKED[i] for i in order])
    assert [one.tokens for one in found] == [want[i] for i in order]


def test_seeds(model: LanguageModel, prompts: list[list[int]]) -> None:
    def said(seed: int | None) -> list[int]:
        how = Sampling(max_tokens=20, temperature=1.0, seed=seed)
        return generate(model, prompts[:1], how)[0].tokens

    assert said(1) == said(1) != said(2)
    assert said(None) != said(None)


def test_stream_is_generate(model: LanguageModel, prompts: list[list[int]]) -> None:
    completions = generate(model, prompts, ASKED)
    found: list[list[int]] = [[] for _ in prompts]
    ends: list[str | None] = [None] * len(prompts)
    for index, token, finish in stream(model, prompts, ASKED):
        assert ends[index] is None, "nothing comes after the end"
        found[index] += [] if token is None else [token]
        ends[index] = finish
    assert found == [one.tokens for one in completions]
    assert ends == [one.finish for one in completions]


def test_ends(model: LanguageModel, prompts: list[list[int]]) -> None:
    """A stop id is not part of the answer; () never stops; the last position ends all."""
    free = Sampling(max_tokens=20, stop_ids=())
    long = generate(model, prompts[:1], free)[0]
    assert (len(long.tokens), long.finish) == (20, "length")
    at = next(i for i, token in enumerate(long.tokens) if i and token not in long.tokens[:i])
    stopped = generate(model, prompts[:1], Sampling(stop_ids=(long.tokens[at],)))[0]
    assert (stopped.tokens, stopped.finish) == (long.tokens[:at], "stop")
    full = [1] * (model.config.max_positions - 3)
    assert [len(one.tokens) for one in generate(model, [full], free)] == [3]


def test_stop_strings(model: LanguageModel, prompts: list[list[int]]) -> None:
    """The text ends where the first of them begins. Here the model's 61 ids are the first of a
    trained tokenizer: specials and printing characters."""
    tokenizer = Tokenizer.train(["abc"], vocab_size=300)
    how = Sampling(max_tokens=30, temperature=1.0, seed=3, stop_ids=())
    (free,) = generate(model, prompts[:1], how, tokenizer=tokenizer)
    assert free.text == tokenizer.decode(free.tokens) and len(free.text) > 12
    late, early = free.text[7:9], free.text[6:9]  # complete at the same token
    (cut,) = generate(
        model,
        prompts[:1],
        Sampling(max_tokens=30, temperature=1.0, seed=3, stop_ids=(), stop=(late, early)),
        tokenizer=tokenizer,
    )
    assert cut.finish == "stop" and cut.text == free.text[: free.text.index(early)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[]], None, "prompt 0 is empty"),
        ([[1], [61]], None, r"prompt 1: token id 61 is outside the vocabulary \(0 to 60\)"),
        ([[1] * 512], None, "prompt 0 has 512 tokens; the model has 512 positions"),
        ([[1]], [Sampling()] * 2, "1 prompts but 2 samplings"),
        ([[1]], Sampling(n=2), "one completion a prompt"),
        ([[1]], Sampling(stop="x"), "stop strings and constraints need a tokenizer"),
        ([[1]], Sampling(regex="x"), "stop strings and constraints need a tokenizer"),
        ([[1]], Sampling(logit_bias={61: 1}), "logit_bias: token id 61 is outside"),
    ],
)
def test_what_is_refused(
    model: LanguageModel, prompts: list[list[int]], sampling: Sampling, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, sampling)
