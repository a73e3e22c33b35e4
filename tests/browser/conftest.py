"""A real browser, and real servers of a tiny model for it to talk to.

Imports stand inside: pytest reads this file where playwright or the server's packages are missing
too, and the test files say what is missing.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hymba.presets import hymba
from hymba.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No sandbox in a container; nothing that reaches for a network by itself.
FLAGS = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
PATIENCE = 20_000  # milliseconds: machines may be busy with other tests
POSITIONS = 20_000  # an answer of so many tokens takes long enough to be stopped


def _chromium() -> str | None:
    return os.environ.get("HYMBA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    path = _chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} on the PATH, HYMBA_CHROMIUM not set")
    with sync_playwright() as playwright:
        flags = [f"--{flag}" for flag in [*FLAGS.split(), "no-first-run"]]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, lively: Callable[..., Any]) -> Path:
    """A model without a chat template that never ends by itself."""
    tokenizer = Tokenizer.train(["to be or not to be, that is the question\n"] * 9, 300)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "ssm_state": 4}
    heads = {"num_heads": 4, "num_kv_heads": 2, "window": 16, "meta_tokens": 3, "ssm_dt_rank": 3}
    vocabulary = {"vocab_size": tokenizer.vocab_size, "eos_token_id": None}
    config = hymba(num_layers=2, max_positions=POSITIONS, **sizes, **heads, **vocabulary)
    from hymba.weights import save

    folder = tmp_path_factory.mktemp("model")
    save(lively(config), folder, tokenizer)
    return folder


class Running:
    """A server in a thread; its url, and `stop`, as sudden as a kill."""

    def __init__(self, app: Any, port: int = 0) -> None:
        import uvicorn

        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        sockets = {"sockets": [self._socket]}
        self._thread = threading.Thread(target=self._server.run, kwargs=sockets, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=20)
        self._socket.close()


@pytest.fixture(scope="session")
def serve(folder: Path) -> Iterator[Callable[..., Running]]:
    """serve(port=0, **settings) -> a server; all end with the tests."""
    from hymba.engine import LLM, Limits
    from hymba.server import Settings, create_app

    running: list[Running] = []

    def start(port: int = 0, **settings: Any) -> Running:
        llm = LLM(folder, device="cpu", limits=Limits(max_sequences=4))
        running.append(Running(create_app(llm, Settings(model="tiny", **settings)), port))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(serve: Callable[..., Running]) -> Running:
    return serve()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """visit(url, **context) -> a page in a fresh profile. No script may fail, and nothing may be
    asked of anybody but the server."""
    contexts, wrong = [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: "Content Security" in m.text and wrong.append(m.text))
        ours = (url, "data:", f"blob:{url}")
        page.on("request", lambda r: r.url.startswith(ours) or wrong.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(visit: Callable[..., Page], server: Running) -> Page:
    return visit(server.url)
