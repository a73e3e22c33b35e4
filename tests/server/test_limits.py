"""Who may ask, how much, and what a client that goes leaves behind: nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from hymba.engine.limits import Limits  # noqa: E402

LONG = {"prompt": "the quick", "max_tokens": 480, "ignore_eos": True, "temperature": 0}


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# ---- the key


def test_key(serve: Any) -> None:
    served = serve(api_key="sécret")
    with served.client() as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", content=b"{").status_code == 401
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 401
        for open_path in ("/health", "/stats", "/"):
            assert client.get(open_path).status_code == 200
        for wrong in ("sécre", "sécret2", "", "\x00"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            with contextlib.suppress(httpx.LocalProtocolError, httpx.RemoteProtocolError):
                assert client.get("/v1/models", headers=headers).status_code in (400, 401)
        for header in ("Bearer sécret", "bearer sécret"):
            found = client.get("/v1/models", headers={"authorization": header.encode()})
            assert found.status_code == 200
    plain = serve(api_key="secret")
    assert [model.id for model in plain.openai(api_key="secret").models.list()] == ["tiny"]


# ---- other origins


def test_other_origins_are_refused_unless_named(served: Any, serve: Any) -> None:
    there = {"origin": "https://example.org"}
    ask = there | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with served.client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=there).headers
        assert client.options("/v1/completions", headers=ask).status_code == 405
    other = serve(cors_origins=("https://example.org",), api_key="k")
    with other.client() as client:
        before = client.options("/v1/completions", headers=ask)  # a preflight brings no key
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://example.org"
        refused = client.post("/v1/completions", headers=there)
        assert refused.status_code == 401  # which the page can read
        assert refused.headers["access-control-allow-origin"] == "https://example.org"
        stranger = client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


# ---- sizes


def test_body_size(serve: Any) -> None:
    served = serve(max_body_bytes=1000)

    def pieces() -> Any:
        for _ in range(100):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    with served.client() as client:
        for content in (b" " * 1001, pieces()):
            answer = client.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
        fits = b'{"prompt": "x", "max_tokens": 1' + b" " * 960 + b"}"
        assert client.post("/v1/completions", content=fits, headers=headers).status_code == 200


def test_a_body_that_does_not_arrive(serve: Any) -> None:
    served = serve(body_timeout=0.3)
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b"408" in slow.recv(1000).split(b"\r\n")[0]


def test_prompt_length(serve: Any) -> None:
    with serve(max_prompt_tokens=5).client() as client:
        answer = client.post("/v1/completions", json={"prompt": [5] * 6})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        fits = client.post("/v1/completions", json={"prompt": [5] * 5, "max_tokens": 1})
        assert fits.status_code == 200


def test_a_full_queue_is_told(serve: Any) -> None:
    served = serve(Limits(max_sequences=1, queue=1))
    with served.client() as client, contextlib.ExitStack() as streams:
        for _ in range(2):  # one runs, one waits
            body = LONG | {"stream": True}
            streams.enter_context(client.stream("POST", "/v1/completions", json=body))
            time.sleep(0.1)
        for stream in (True, False):
            full = client.post("/v1/completions", json=LONG | {"stream": stream})
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["code"] == "queue_full"
        both = client.post("/v1/completions", json=LONG | {"prompt": ["a", "b"]})
        assert both.status_code == 400  # these never fit
    assert served.idle()


def test_time_limit(serve: Any) -> None:
    served = serve(timeout=0.2)
    long = LONG | {"n": 4}
    with served.client() as client:
        late = client.post("/v1/completions", json=long)
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        stream = client.post("/v1/completions", json=long | {"stream": True})
        assert stream.status_code == 200
        assert '"code":"timeout"' in stream.text.splitlines()[-2]
        assert "[DONE]" not in stream.text
    assert served.idle(1)


# ---- clients that go


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(serve: Any, stream: bool) -> None:
    served = serve(Limits(max_sequences=1))
    steps = []
    with served.client() as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                lines = answer.iter_lines()  # kept: one that is dropped hangs up
                next(lines)
                assert served.stats.running == 1
        else:
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json=LONG, timeout=0.15)
        assert served.idle(1)  # long before 480 tokens
        steps.append(served.stats.generated_tokens)
        assert steps[0] < 480
        time.sleep(0.1)
        assert served.stats.generated_tokens == steps[0]
        next_one = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert next_one.status_code == 200
        assert 'hymba_completions_total{finish="cancelled"} 1.0' in client.get("/metrics").text


def test_a_client_that_goes_while_it_waits(serve: Any) -> None:
    served = serve(Limits(max_sequences=1))
    with served.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as first:
            lines = first.iter_lines()  # kept: one that is dropped hangs up
            next(lines)
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json=LONG, timeout=0.05)
            wait_for(lambda: served.stats.waiting == 0, 2)
            assert served.stats.running == 1
    assert served.idle()


# ---- what takes long


def test_a_large_schema_keeps_nobody_else_waiting(served: Any) -> None:
    pytest.importorskip("xgrammar")
    names = {f"p{i}": {"type": "integer"} for i in range(2000)}
    form = {"schema": {"type": "object", "properties": names}}
    large = {"response_format": {"type": "json_schema", "json_schema": form}}
    took = {}

    def ask(name: str, **more: Any) -> None:
        with served.client() as client:
            body = {"prompt": "x", "max_tokens": 2, **more}
            began = time.monotonic()
            assert client.post("/v1/completions", json=body).status_code == 200
            took[name] = time.monotonic() - began

    ask("first")
    slow = threading.Thread(target=ask, args=("large",), kwargs=large)
    slow.start()
    time.sleep(0.2)
    ask("other")
    assert slow.is_alive(), "the schema is too quick for this test"
    slow.join()
    assert took["other"] < took["large"] / 2


# ---- when the engine fails


def test_a_step_that_fails_ends_what_runs(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    real, left = served.llm.engine.step, [5]

    def step() -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        return real()

    monkeypatch.setattr(served.llm.engine, "step", step)
    answers: dict[bool, Any] = {}

    def ask(stream: bool) -> None:
        with served.client() as client:
            answers[stream] = client.post("/v1/completions", json=LONG | {"stream": stream})

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers[False].status_code == 500
    assert answers[False].json()["error"]["code"] == "engine_error"
    assert answers[True].status_code == 500 or '"error"' in answers[True].text
    assert "out of memory" not in answers[False].text  # for the log
    assert "the engine failed" in caplog.text and "out of memory" in caplog.text
    with served.client() as client:
        health = client.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert client.get("/metrics").status_code == 200
