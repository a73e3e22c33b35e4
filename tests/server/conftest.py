"""A real server on a free port: real engine, tiny lively model, tokenizer trained here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.engine.limits import Limits
from hymba.engine.loop import generate
from hymba.engine.sampling import Sampling
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.weights import save

TEXTS = ["def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)\n", "the quick brown fox"]
TEMPLATE = (
    "{% for tool in tools or [] %}<tool> {{ tool.function.name }} </tool>\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="session")
def model(
    tokenizer: Tokenizer, tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> LanguageModel:
    return lively(replace(tiny("hymba"), vocab_size=tokenizer.vocab_size, eos_token_id=2))


@pytest.fixture(scope="session")
def folder(
    model: LanguageModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("served") / "tiny"
    save(model, place, tokenizer)
    return place


@pytest.fixture(scope="session")
def slow_loop(model: LanguageModel, tokenizer: Tokenizer) -> Callable[..., Any]:
    """slow_loop("text" or ids, max_tokens=8, ...) -> what the simple loop answers."""

    def answer(prompt: str | list[int], **options: Any) -> Any:
        ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        said = generate(model, [ids], Sampling(**options), tokenizer=tokenizer)[0]
        said.text = said.text or tokenizer.decode(said.tokens)
        return said

    return answer


@dataclass
class Served:
    """A running server and what is behind it."""

    port: int
    app: Any
    llm: Any
    loop: Any = None
    stop: Callable[[], None] = field(default=lambda: None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> Any:
        import httpx

        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def openai(self, kind: str = "OpenAI", **options: Any) -> Any:
        import openai

        given = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return getattr(openai, kind)(**given | options)

    @property
    def stats(self) -> Any:
        return self.app.state.service.stats

    def idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs or waits, now or soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.stats.running == self.stats.waiting == 0:
                return True
            time.sleep(0.01)
        return False


def start(model: LanguageModel, tokenizer: Tokenizer, limits: Limits, settings: Any) -> Served:
    import uvicorn

    from hymba.engine.llm import LLM
    from hymba.server import create_app

    torch.set_num_threads(1)
    llm = LLM(model, tokenizer=tokenizer, limits=limits)
    app = create_app(llm, settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(
        app, port=port, log_level="error", timeout_keep_alive=75, timeout_graceful_shutdown=2
    )
    server, served = uvicorn.Server(config), Served(port, app, llm)

    async def run() -> None:
        served.loop = asyncio.get_running_loop()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

    served.stop = stop
    _wait_until_ready(served)
    return served


def _wait_until_ready(served: Served) -> None:
    import httpx

    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{served.url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("the server did not become ready")


@pytest.fixture(scope="session")
def with_template(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()})


@pytest.fixture
def serve(model: LanguageModel, tokenizer: Tokenizer) -> Iterator[Callable[..., Served]]:
    """serve(Limits(...), api_key=...) -> a server of this test's own."""
    from hymba.server import Settings

    running: list[Served] = []

    def begin(limits: Limits | None = None, **settings: Any) -> Served:
        vocabulary = settings.pop("tokenizer", tokenizer)
        limits = limits or Limits(max_sequences=4)
        name = settings.pop("name", "tiny")
        served = start(model, vocabulary, limits, Settings(model=name, **settings))
        running.append(served)
        return served

    yield begin
    for served in running:
        served.stop()


@pytest.fixture(scope="module")
def served(model: LanguageModel, tokenizer: Tokenizer) -> Iterator[Served]:
    """One server for a file's tests; its model has no chat template."""
    from hymba.server import Settings

    running = start(model, tokenizer, Limits(max_sequences=4), Settings(model="tiny"))
    yield running
    running.stop()
