"""The official client, as its users write it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

GREEDY = {"model": "tiny", "temperature": 0}
TALK = [{"role": "system", "content": "the quick"}, {"role": "user", "content": "brown fox"}]


def test_models(served: Any) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512


def test_completion_is_the_loops(served: Any, slow_loop: Any) -> None:
    answer = served.openai().completions.create(prompt="def fib", max_tokens=12, **GREEDY)
    want = slow_loop("def fib", max_tokens=12)
    assert answer.choices[0].text == want.text
    assert answer.choices[0].finish_reason == want.finish
    assert answer.usage.completion_tokens == len(want.tokens)
    assert answer.object == "text_completion" and answer.model == "tiny"


def test_stream_joins_to_the_same_text(served: Any, slow_loop: Any) -> None:
    client = served.openai()
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            prompt="the quick", max_tokens=12, stream=True, stream_options=options, **GREEDY
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == slow_loop("the quick", max_tokens=12).text
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_without_a_template_continues_the_messages(served: Any, slow_loop: Any) -> None:
    client = served.openai()
    raw = client.chat.completions.with_raw_response.create(messages=TALK, max_tokens=9, **GREEDY)
    assert raw.headers["x-hymba-chat"] == "plain-continuation"
    answer = raw.parse()
    assert answer.choices[0].message.content == slow_loop("the quick\nbrown fox", max_tokens=9).text
    assert answer.choices[0].message.role == "assistant"
    assert not client.models.retrieve("tiny").chat_template


def test_chat_stream(served: Any, slow_loop: Any) -> None:
    stream = served.openai().chat.completions.create(
        messages=TALK, max_completion_tokens=9, stream=True, n=2, **GREEDY
    )
    texts, roles, ends = ["", ""], ["", ""], ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
            ends[choice.index] += choice.finish_reason or ""
    assert texts == [slow_loop("the quick\nbrown fox", max_tokens=9).text] * 2
    assert roles == ["assistant"] * 2 and ends == ["length"] * 2


def test_chat_with_a_template_and_tools(serve: Any, slow_loop: Any, with_template: Any) -> None:
    served = serve(tokenizer=with_template)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    said = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    raw = served.openai().chat.completions.with_raw_response.create(
        messages=said, tools=[tool], max_tokens=6, **GREEDY
    )
    assert "x-hymba-chat" not in raw.headers
    ids = with_template.encode("<tool> look </tool>\nsystem: x\nuser: hi\nassistant:", special=True)
    answer = raw.parse()
    assert answer.choices[0].message.content == slow_loop(ids, max_tokens=6).text
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens == len(ids)
    none = served.openai().chat.completions.create(
        messages=said, tools=[tool], tool_choice="none", max_tokens=1, **GREEDY
    )
    assert none.usage.prompt_tokens < len(ids)
    with served.client() as client:
        body = {"messages": said, "tools": [tool]}
        assert client.post("/tokenize", json=body).json()["tokens"] == ids


def test_second_turn_of_a_chat_is_not_computed_again(serve: Any) -> None:
    client = serve().openai()
    talk = [{"role": "user", "content": "the quick brown fox " * 5}]
    first = client.chat.completions.create(messages=talk, max_tokens=8, **GREEDY)
    talk.append({"role": "assistant", "content": first.choices[0].message.content})
    talk.append({"role": "user", "content": "and then"})
    again = client.chat.completions.create(messages=talk, max_tokens=2, **GREEDY)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 1


def test_async_client_many_at_once(served: Any, slow_loop: Any) -> None:
    prompts = [f"the quick {i}" for i in range(12)]

    async def ask(client: Any, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, max_tokens=8, stream=True, **GREEDY)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def main() -> list[str]:
        async with served.openai("AsyncOpenAI") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(main()) == [slow_loop(prompt, max_tokens=8).text for prompt in prompts]


def test_chat_logprobs(served: Any) -> None:
    answer = served.openai().chat.completions.create(
        messages=TALK, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)  # greedy
        assert one.token == one.top_logprobs[0].token
    said = b"".join(bytes(one.bytes) for one in content)
    assert said.decode(errors="replace") == answer.choices[0].message.content


def test_structured_answers(served: Any) -> None:
    pytest.importorskip("xgrammar")
    client = served.openai()
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "boolean"}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    answer = client.chat.completions.create(
        messages=TALK, response_format=form, max_tokens=200, temperature=1, seed=3, model="tiny"
    )
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content)
    assert found["name"] in ("fox", "dog") and isinstance(found["legs"], bool)
    regex = client.completions.create(
        prompt="x", max_tokens=50, extra_body={"regex": "(yes|no)"}, **GREEDY
    )
    assert regex.choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "model_not_found"),
        ({"temperature": -1}, "BadRequestError", "invalid_value"),
        ({"prompt": "x" * 5000}, "BadRequestError", "context_length_exceeded"),
        ({"extra_body": {"temprature": 1}}, "BadRequestError", "unknown_parameter"),
    ],
)
def test_errors_are_the_clients_own(served: Any, change: Any, error: str, code: str) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        served.openai().completions.create(**{"prompt": "x", **GREEDY, **change})
    assert caught.value.code == code
