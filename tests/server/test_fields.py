"""Every field of a call does what it says, or is refused in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


@pytest.fixture
def post(served: Any) -> Any:
    """post(path, **body) -> the JSON answer of a call that must succeed."""
    with served.client() as client:

        def ask(path: str, **body: Any) -> Any:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield ask


def text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def complete(post: Any, **body: Any) -> Any:
    return post("/v1/completions", **{"prompt": "the quick", "temperature": 0} | body)


def events(body: str) -> list[Any]:
    """The data lines of a stream."""
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_prompts_of_every_kind(post: Any, slow_loop: Any, tokenizer: Any) -> None:
    texts = ["the quick", "def"]
    ids = [tokenizer.encode(one, bos=True) for one in texts]
    want = [slow_loop(one, max_tokens=6).text for one in texts]
    for given in (texts, ids):
        answer = complete(post, prompt=given, max_tokens=6)
        assert [choice["text"] for choice in answer["choices"]] == want
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    for alone in (texts[0], ids[0]):
        assert text(complete(post, prompt=alone, max_tokens=6)) == want[0]


def test_length_and_defaults(post: Any) -> None:
    assert complete(post, ignore_eos=True)["usage"]["completion_tokens"] == 16
    answer = complete(post, max_tokens=10_000, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512  # the model's positions
    nulls = dict.fromkeys(("n", "stop", "seed", "logprobs", "stream", "logit_bias", "echo"))
    assert text(complete(post, **nulls)) == text(complete(post))


def test_echo(post: Any, tokenizer: Any) -> None:
    plain = text(complete(post, max_tokens=4))
    assert text(complete(post, max_tokens=4, echo=True)) == "the quick" + plain
    ids = tokenizer.encode("the quick", bos=True)
    assert text(complete(post, prompt=ids, max_tokens=4, echo=True)) == "the quick" + plain


def test_seeds_and_n(post: Any, slow_loop: Any) -> None:
    hot = {"temperature": 1.5, "max_tokens": 10, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
    one = complete(post, seed=5, n=3, **hot)
    again = complete(post, seed=5, n=3, **hot)
    texts = [choice["text"] for choice in one["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == slow_loop("the quick", seed=5, **hot).text
    assert complete(post, seed=6, **hot)["choices"][0]["text"] != texts[0]
    assert complete(post, seed=-1, **hot)["choices"]
    assert complete(post, top_k=-1)["choices"]


def test_stop(post: Any, slow_loop: Any) -> None:
    want = slow_loop("the quick", max_tokens=40).text
    stop = want[20:22]
    answer = complete(post, max_tokens=40, stop=stop)
    assert text(answer) == want[: want.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert text(complete(post, max_tokens=40, stop=["no such text", stop])) == text(answer)
    ids = slow_loop("the quick", max_tokens=40).tokens
    by_id = complete(post, max_tokens=40, stop_token_ids=[ids[3]])
    assert by_id["usage"]["completion_tokens"] == ids.index(ids[3])


def test_penalties_and_bias(post: Any, slow_loop: Any) -> None:
    for change in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.5},
    ):
        answer = text(complete(post, max_tokens=30, **change))
        assert answer == slow_loop("the quick", max_tokens=30, **change).text
    pushed = complete(post, max_tokens=3, logit_bias={"77": 100})
    assert text(pushed) == slow_loop("the quick", max_tokens=3, logit_bias={77: 100}).text


def test_completion_logprobs(post: Any) -> None:
    answer = complete(post, max_tokens=6, logprobs=2)
    found = answer["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 6
    assert all(len(top) == 2 for top in found["top_logprobs"])  # greedy: the likeliest is said
    assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])
    bare = complete(post, max_tokens=6, logprobs=0)["choices"][0]["logprobs"]
    assert bare["top_logprobs"] is None and bare["token_logprobs"] == found["token_logprobs"]


def test_offsets_do_not_count_special_tokens(post: Any) -> None:
    """They have a name but are not in the text."""
    answer = complete(post, max_tokens=3, logprobs=0, logit_bias={"1": 100})
    assert text(answer) == ""
    assert answer["choices"][0]["logprobs"]["tokens"] == ["<s>"] * 3
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_carry_logprobs(served: Any, path: str) -> None:
    chat = "chat" in path
    body = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body |= {"max_tokens": 5, "ignore_eos": True, "stream": True, "logprobs": True if chat else 1}
    with served.client() as client:
        answer = client.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    count = 0
    for event in events(answer.text):
        for choice in event["choices"]:
            found = choice["logprobs"] or {}
            count += len(found.get("content" if chat else "tokens", []))
    assert count == 5


def test_generation_config_decides_what_a_call_leaves_open(serve: Any, slow_loop: Any) -> None:
    served = serve(defaults={"temperature": 0.0}, eos_ids=(2,))
    with served.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "def", "max_tokens": 8})
        assert text(answer.json()) == slow_loop("def", max_tokens=8).text


def test_tokenize_and_back(post: Any, tokenizer: Any) -> None:
    found = post("/tokenize", prompt="the quick fox é")
    assert found["tokens"] == tokenizer.encode("the quick fox é", bos=True)
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 512
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == "the quick fox é"
    bare = post("/tokenize", prompt="the", add_special_tokens=False)["tokens"]
    assert bare == tokenizer.encode("the")
    talk = post("/tokenize", messages=[{"role": "user", "content": "a"}])["tokens"]
    assert talk == tokenizer.encode("a", bos=True)


def test_health_stats_metrics_and_page(served: Any, post: Any) -> None:
    complete(post, max_tokens=4)
    with served.client() as client:
        assert client.get("/health").json() == {"status": "ready"}
        live = client.get("/stats").json()
        assert live["model"] == "tiny" and live["generated_tokens"] > 0
        assert live["cache_bytes_total"] > 0 and live["tokens_per_second"] > 0
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        metrics = client.get("/metrics").text
        assert "hymba_request_seconds_count 0.0" not in metrics
    for name in (
        "hymba_requests_running 0.0",
        "hymba_requests_waiting 0.0",
        "hymba_time_to_first_token_seconds_count",
        "hymba_time_per_output_token_seconds_bucket",
        "hymba_request_seconds_count",
        "hymba_generated_tokens_total",
        "hymba_prefix_hits_total",
        "hymba_cache_bytes ",
        'hymba_http_requests_total{path="/v1/completions",status="200"}',
        'hymba_completions_total{finish="length"}',
    ):
        assert name in metrics, name
