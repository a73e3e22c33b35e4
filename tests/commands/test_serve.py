"""`hymba serve` as a process: what it prints, and what its signals do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from hymba.cli import main  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402
from hymba.weights import save  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "the quick", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tiny: Any, lively: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(["the quick brown fox"], 270)
    place = tmp_path_factory.mktemp("model") / "small"
    save(lively(replace(tiny("hymba"), vocab_size=tokenizer.vocab_size)), place, tokenizer)
    (place / "generation_config.json").write_text('{"temperature": 0.0, "use_cache": false}')
    return place


class Process:
    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "hymba", "serve", *arguments, "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        (address,) = self.until(r"serving \S+ at (\S+)").groups()
        self.client = httpx.Client(base_url=address, timeout=20, trust_env=False)
        self.until("is ready")

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(line)

    def until(self, pattern: str, seconds: float = 40) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, "".join(self.lines)):
                return found
            assert self.child.poll() is None, "".join(self.lines)
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in: {''.join(self.lines)}")

    def end(self) -> int:
        return self.child.wait(20)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def begin(*arguments: str, **options: Any) -> Process:
        running.append(Process(str(folder), *arguments, **options))
        return running[-1]

    yield begin
    for process in running:
        process.client.close()
        process.child.kill()
        process.child.wait()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_what_runs_finish(start: Any, sign: signal.Signals) -> None:
    server = start("--api-key", "k", "--cors", "https://example.org")
    assert any("no chat template" in line for line in server.lines)
    assert any("temperature 0" in line for line in server.lines)
    server.client.headers["authorization"] = "Bearer k"
    with server.client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.child.send_signal(sign)
        server.until(f"{sign.name}: taking no new requests")
        refused = server.client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert server.client.get("/health").json() == {"status": "draining"}
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
    assert server.end() == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.slow
def test_grace_ends_and_a_second_signal_stops_at_once(start: Any) -> None:
    first = start("--grace", "0.1", env={"HYMBA_API_KEY": "k"})
    first.client.headers["authorization"] = "Bearer k"
    body = LONG | {"n": 16}
    with first.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        first.child.terminate()
        text = "\n".join(lines)
    assert '"code":"engine_error"' in text or "[DONE]" in text  # it may have been quick
    assert first.end() == 0
    second = start()
    with second.client.stream("POST", "/v1/completions", json=LONG | {"n": 64}) as answer:
        lines = answer.iter_lines()  # kept: one that is dropped hangs up
        next(lines)
        second.child.terminate()
        second.until("again: stop now")
        second.child.terminate()
        began = time.monotonic()
        assert second.end() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 2
    assert "Traceback" not in "".join(second.lines)


def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            ([str(folder), "--port", port], f"port {port}"),
            ([str(folder), "--port", "99999"], "99999"),
            ([str(folder), "--queue", "0"], "--queue must be 1"),
            ([str(folder), "--timeout", "0"], "--timeout must be over 0"),
            ([str(folder), "--api-key", ""], "--api-key is empty"),
            ([str(folder), "--max-tokens", "-1"], "max_tokens must be"),
            ([str(folder), "--max-tokens", "1"], "max_tokens must be 2 or more"),
            ([str(folder / "none"), "--port", "0"], "none"),
        ):
            assert main(["serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1, error


def test_defaults_that_no_call_could_have_are_told_at_the_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (given, said) in enumerate(
        (('{"top_p": 7}', "top_p"), ('{"eos_token_id": [2, -4]}', "stop_ids"))
    ):
        other = shutil.copytree(folder, tmp_path / str(number))
        (other / "generation_config.json").write_text(given)
        assert main(["serve", str(other), "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert f"generation_config.json: {said} must be" in error and error.count("\n") == 1, error
