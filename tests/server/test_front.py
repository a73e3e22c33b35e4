"""The front of several replicas, with replicas that are played."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from prometheus_client.core import CounterMetricFamily  # noqa: E402

from hymba.errors import UserError  # noqa: E402
from hymba.server import Settings  # noqa: E402
from hymba.server.front import REPLICA, Ask, Lost, Told, create_front  # noqa: E402
from hymba.server.shapes import Live  # noqa: E402

NUMBERS = dict.fromkeys(Live.model_fields, 3)
LIVE = Live(**NUMBERS | {"model": "m", "status": "ready", "chat_template": False})  # type: ignore[arg-type]
Script = Callable[[Ask], AsyncIterator[Any]]


class Played:
    """Two replicas, "a" and "b"; a script says what a call gets."""

    wanted, ready = 2, 2

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Ask] = []

    async def answer(self, ask: Ask) -> AsyncIterator[Any]:
        self.asked.append(ask)
        ask.replica = next(name for name in "abc" if name not in ask.avoid)
        async for message in self.script(ask):
            yield message

    async def told(self) -> list[Told]:
        return [self._tell(name) for name in "ab"]

    def _tell(self, name: str) -> Told:
        tokens = CounterMetricFamily("hymba_tokens", "about", value=ord(name))
        http = CounterMetricFamily("hymba_http_requests", "about", value=99)
        return Told(name, None, LIVE, [tokens, http])

    async def watch(self) -> AsyncIterator[None]:
        yield


def start(kind: str, route: str = "/v1/x") -> dict[str, Any]:
    headers = [(b"content-type", kind.encode()), (REPLICA.encode(), b"b")]
    return {"type": "http.response.start", "status": 200, "headers": headers, "route": route}


def body(content: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def call(script: Script, **settings: Any) -> tuple[Any, Played]:
    """client(method, path) -> answer."""
    fleet = Played(script)
    app = create_front(fleet, Settings(model="m", **settings))

    def ask(method: str, path: str, **options: Any) -> Any:
        async def one() -> Any:
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, **options)

        return asyncio.run(one())

    ask.app = app  # type: ignore[attr-defined]
    return ask, fleet


async def whole(ask: Ask) -> AsyncIterator[Any]:
    yield start("application/json")
    yield body(ask.body + ask.scope["query_string"] + ask.scope["path"].encode())


def test_a_call_goes_on_as_it_is() -> None:
    ask, fleet = call(whole)
    answer = ask("POST", "/v1/x?y=1", content=b"{}", headers={"authorization": "Bearer z"})
    assert answer.status_code == 200 and answer.content == b"{}y=1/v1/x"
    assert answer.headers[REPLICA] == "b"
    assert (b"authorization", b"Bearer z") in fleet.asked[0].scope["headers"]


def test_guard_stands_in_front() -> None:
    ask, fleet = call(whole, api_key="k", max_body_bytes=5, cors_origins=("https://a.example",))
    refused = ask("POST", "/v1/x", headers={"origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    headers = {"authorization": "Bearer k"}
    assert ask("POST", "/v1/x", headers=headers, content=b"123456").status_code == 413
    assert ask("GET", "/metrics").status_code == 401
    assert ask("GET", "/health").status_code == 200
    ask.app.state.service.state = "draining"
    assert ask("POST", "/v1/x", headers=headers).json()["error"]["code"] == "draining"
    assert ask("GET", "/health").json()["status"] == "draining"
    assert fleet.asked == []


def test_lost_before_anything_was_sent_another_answers() -> None:
    async def script(ask: Ask) -> AsyncIterator[Any]:
        if ask.replica == "a":
            yield start("text/event-stream")
            raise Lost("died")
        async for message in whole(ask):
            yield message

    ask, fleet = call(script)
    answer = ask("POST", "/v1/x", content=b"{}")
    assert answer.status_code == 200 and answer.content == b"{}/v1/x"
    assert fleet.asked[-1].avoid == {"a"}


def test_a_call_that_kills_replicas_kills_two_of_them() -> None:
    async def script(ask: Ask) -> AsyncIterator[Any]:
        raise Lost("died")
        yield

    ask, fleet = call(script)
    answer = ask("POST", "/v1/x", content=b"{}")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"
    assert len(fleet.asked) == 2


def test_lost_in_a_stream_is_told_in_it() -> None:
    async def script(ask: Ask) -> AsyncIterator[Any]:
        yield start("text/event-stream")
        yield body(b"data: 1\n\n", more=True)
        raise Lost("died")

    ask, fleet = call(script)
    lines = ask("POST", "/v1/x").text.split()
    assert lines[:2] == ["data:", "1"] and '"code":"engine_error"' in "".join(lines)
    assert "[DONE]" not in lines and len(fleet.asked) == 1


def test_lost_in_a_body_breaks_the_connection() -> None:
    async def script(ask: Ask) -> AsyncIterator[Any]:
        yield start("application/json")
        yield body(b"{", more=True)
        raise Lost("died")

    ask, _ = call(script)
    with pytest.raises(Exception, match="already started"):  # uvicorn closes; here it comes through
        ask("POST", "/v1/x")


def test_no_replica_and_no_answer() -> None:
    async def silent(ask: Ask) -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield

    ask, fleet = call(silent, timeout=-0.9)
    late = ask("POST", "/v1/x")
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    fleet.ready = 0
    refused = ask("POST", "/v1/x")
    assert refused.status_code == 503 and refused.headers["retry-after"]


def test_close_ends_what_runs_with_an_error() -> None:
    async def endless(ask: Ask) -> AsyncIterator[Any]:
        yield start("text/event-stream")
        while True:
            yield body(b"data: 1\n\n", more=True)
            asyncio.get_running_loop().call_soon(asyncio.create_task, front.close())
            await asyncio.sleep(60)

    ask, _ = call(endless)
    front = ask.app.state.service
    text = ask("POST", "/v1/x").text
    assert '"code":"unavailable"' in text and "[DONE]" not in text


def test_numbers_of_all() -> None:
    ask, _ = call(whole)
    ask("POST", "/v1/x")
    assert ask("GET", "/health").json() == {
        "status": "ready",
        "replicas": {"wanted": 2, "ready": 2, "names": ["a", "b"]},
    }
    stats = ask("GET", "/stats").json()
    assert stats["running"] == 6 and stats["max_model_len"] == 3 and stats["status"] == "ready"
    lines = ask("GET", "/metrics").text.splitlines()
    assert 'hymba_tokens_total{replica="a"} 97.0' in lines
    assert 'hymba_tokens_total{replica="b"} 98.0' in lines
    assert "hymba_replicas_ready 2.0" in lines
    http = [line for line in lines if line.startswith("hymba_http_requests_total")]
    assert 'hymba_http_requests_total{path="/v1/x",status="200"} 1.0' in http
    assert not any("99" in line for line in http)
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_without_ray_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hymba.server.replicas", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "hymba\[replicas\]"'):
        importlib.import_module("hymba.server.replicas")
