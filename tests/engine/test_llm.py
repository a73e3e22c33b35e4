"""Texts in, texts out: what the loop says, in order, in pieces, in turns, and in a conversation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.engine import LLM, Completion, Limits, Sampling, generate
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.presets import hymba
from hymba.tokenizer import Tokenizer
from hymba.weights import save

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["def f(x):", "naïve café", "", "a", "the quick brown fox " * 4]
HOW = Sampling(max_tokens=14, temperature=1.0, seed=3, stop_ids=())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x): return x", "naïve café"], vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, lively: Callable[..., LanguageModel]) -> LanguageModel:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"intermediate_size": 40, "window": 5, "meta_tokens": 2, "max_positions": 256}
    return lively(hymba(num_layers=3, vocab_size=tokenizer.vocab_size, share=False, **sizes))


@pytest.fixture
def llm(model: LanguageModel, tokenizer: Tokenizer) -> LLM:
    return LLM(model, limits=Limits(max_sequences=3), tokenizer=tokenizer)


def twin(model: LanguageModel, tokenizer: Tokenizer, prompt: str, how: Sampling) -> Completion:
    ids = tokenizer.encode(prompt, bos=True)
    return generate(model, [ids], [how], tokenizer=tokenizer)[0]


def test_generate_is_the_loop_in_order(
    llm: LLM, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Half characters, short answers behind long ones, more prompts than slots."""
    hows = [Sampling(max_tokens=3 + 5 * (i % 3), temperature=1.0, seed=i) for i in range(5)]
    outputs = list(llm.generate(PROMPTS, hows))
    for prompt, how, output in zip(PROMPTS, hows, outputs, strict=True):
        want = twin(model, tokenizer, prompt, how)
        assert list(output.prompt) == tokenizer.encode(prompt, bos=True)
        assert (output.tokens, output.finish) == (want.tokens, want.finish)
        assert output.text == tokenizer.decode(want.tokens)
    assert [one.tokens for one in llm.generate(PROMPTS[:2], HOW)] == [
        twin(model, tokenizer, prompt, HOW).tokens for prompt in PROMPTS[:2]
    ]
    assert not llm.engine.busy and list(llm.generate([])) == []


def test_ids_and_text_may_be_mixed(llm: LLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a", bos=True)
    first, second = llm.generate(["a", ids], HOW)
    assert first.tokens == second.tokens


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    (want,) = llm.generate(["def"], HOW)
    joined = Completion()
    for delta in llm.stream("def", HOW):
        assert delta.index == 0
        joined.add(delta)
    assert (joined.tokens, joined.finish) == (want.tokens, want.finish)
    assert joined.text == want.text


def test_several_answers(llm: LLM) -> None:
    how = Sampling(max_tokens=9, temperature=1.0, seed=3, n=4, stop_ids=())
    (output,) = llm.generate(["def f"], how)
    assert len({completion.text for completion in output.completions}) > 1
    pieces = [Completion() for _ in range(4)]
    for delta in llm.stream("def f", how):
        pieces[delta.index].add(delta)
    assert [one.tokens for one in pieces] == [one.tokens for one in output.completions]


def test_streams_in_turns(llm: LLM, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Each one's steps gave the others' pieces away, and the others waited for ever."""
    found = [Completion(), Completion()]
    for pair in zip(llm.stream("a", HOW), llm.stream("def", HOW), strict=False):
        for completion, delta in zip(found, pair, strict=True):
            completion.add(delta)
    for prompt, completion in zip(("a", "def"), found, strict=True):
        assert completion.tokens == twin(model, tokenizer, prompt, HOW).tokens


def test_a_question_within_a_batch(llm: LLM, model: LanguageModel, tokenizer: Tokenizer) -> None:
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, HOW), strict=True):
        assert output.tokens == twin(model, tokenizer, prompt, HOW).tokens
        (inner,) = llm.generate(["x"], HOW)
        assert inner.tokens == twin(model, tokenizer, "x", HOW).tokens


def test_who_leaves_early_leaves_nothing(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, HOW)
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    stream = llm.stream("a", HOW)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.busy and llm.engine.stats().running == 0


def test_more_prompts_than_may_wait(model: LanguageModel) -> None:
    llm = LLM(model, limits=Limits(max_sequences=2, queue=1))
    outputs = list(llm.generate([[i + 3] for i in range(7)], Sampling(max_tokens=2, stop_ids=())))
    assert [list(output.prompt) for output in outputs] == [[i + 3] for i in range(7)]
    assert all(len(output.tokens) == 2 for output in outputs)


@pytest.fixture(scope="module")
def folder(
    model: LanguageModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("llm") / "model"
    chatty = Tokenizer(tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()})
    save(model, place, chatty)
    return place


def test_a_conversation_from_a_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """The second turn begins with all that was said in the first, and does not compute it."""
    llm = LLM(folder, "cpu", limits=Limits(shortest_prefix=4))
    messages = [{"role": "user", "content": "def f(x): return x, please"}]
    how = Sampling(max_tokens=10, logit_bias={i: -100.0 for i in range(3)})
    first = llm.chat(messages, how)
    asked = tokenizer.encode("user: def f(x): return x, please</s>assistant: ", special=True)
    assert list(first.prompt) == asked and first.cached_tokens == 0
    assert first.tokens == generate(llm.model, [asked], how)[0].tokens
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "a"}]
    second = llm.chat(messages, how)
    assert second.cached_tokens >= len(asked) - 1
    assert second.tokens == generate(llm.model, [list(second.prompt)], how)[0].tokens
    assert llm.chat(messages, how).cached_tokens == len(second.prompt) - 1


def test_what_is_told(model: LanguageModel, llm: LLM) -> None:
    bare = LLM(model)
    with pytest.raises(UserError, match="this model has no tokenizer: give token ids"):
        bare.encode("text")
    with pytest.raises(UserError, match="this model has no tokenizer"):
        bare.chat([{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="prompts is a list"):
        llm.generate("text")
    with pytest.raises(UserError, match="2 prompts but 1 samplings"):
        llm.generate(["a", "b"], [HOW])
    with pytest.raises(UserError, match="no chat template"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="the prompt is empty"):
        list(llm.generate(["a", []]))
    for wrong in (b"abc", 5, None, [1.5], [True], ["a"], [[1]]):
        with pytest.raises(UserError, match="a text or a list of token ids"):
            llm.generate([wrong])  # type: ignore[list-item]
    for how in ({"max_tokens": 2}, {}, 5):
        with pytest.raises(UserError, match="sampling must be a Sampling"):
            list(llm.generate(["a"], how))  # type: ignore[arg-type]
    assert llm.encode(torch.tensor([5, 6])) == llm.encode((5, 6)) == [5, 6]  # type: ignore[arg-type]
    assert not llm.engine.busy


def test_several_threads_share_one(llm: LLM) -> None:
    """Each thread steps for all: nobody takes another's words, nobody waits for ever."""
    prompts = [[1, 2, 3 + i] for i in range(4)]
    how = Sampling(max_tokens=12, stop_ids=())
    want = [output.tokens for output in llm.generate(prompts, how)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lambda p=p: next(llm.generate([p], how)).tokens) for p in prompts * 3]
        assert [each.result(timeout=60) for each in asked] == want * 3
