"""`hymba serve --replicas 2` as a process: two real engines on the CPU, Ray between them.

One cluster for the whole file; its processes are counted, and none may be left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray", reason="ray is not installed: hymba[replicas]")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

if not Path("/proc/self/stat").exists():
    pytest.skip("processes are found in /proc", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
REPLICA = "x-hymba-replica"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("replicas")]


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def command(pid: int) -> str:
    """Of a process that lives, else ""."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
    return "" if state == "Z" else line


def below(pid: int) -> set[int]:
    """The processes that a process started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


class Process:
    """The server, and all that it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "hymba", "serve", str(folder), "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self.started: set[int] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def ready(self) -> Process:
        def address() -> Any:
            self.started |= below(self.child.pid)
            assert self.child.poll() is None, self.text
            return re.search(r"serving \S+ at (\S+)", self.text)

        self.url = wait_for(address, 90)[1]
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        wait_for(lambda: len(self.names()) == 2, 60)
        self.started |= below(self.child.pid)
        return self

    def names(self) -> list[str]:
        """Of the replicas that are ready."""
        return self.client.get("/health").json()["replicas"]["names"]

    def workers(self) -> list[int]:
        self.started |= below(self.child.pid)
        return sorted(pid for pid in self.started if "ServeReplica" in command(pid))

    def left(self) -> list[str]:
        return [found for pid in self.started if (found := command(pid))]

    def kill(self) -> None:
        self.started |= below(self.child.pid)
        for pid in self.started | {self.child.pid}:
            if command(pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self.child.wait(20)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    process = Process(folder, "--replicas", "2", "--port", "0", "--max-sequences", "8")
    try:
        yield process.ready()
    finally:
        process.kill()


def ask(server: Process, prompt: str, count: int = 8, **more: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **more}
    return server.client.post("/v1/completions", json=body)


def metric(server: Process, name: str) -> dict[str, float]:
    """By replica."""
    text = server.client.get("/metrics").text
    return {
        found[1]: float(found[2])
        for found in re.finditer(rf'^{name}{{.*replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
    }


def test_both_answer_and_are_counted(server: Process, slow_loop: Any) -> None:
    before = metric(server, "hymba_generated_tokens_total")
    assert sorted(before) == server.names()
    prompts = [f"{i} the quick brown" for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        said = slow_loop(prompt, max_tokens=8, stop_ids=())
        assert answer.json()["choices"][0]["text"] == said.text
    used = [answer.headers[REPLICA] for answer in answers]
    assert set(used) == set(before)
    after = metric(server, "hymba_generated_tokens_total")
    assert {name: after[name] - before[name] for name in after} == {
        name: 8 * used.count(name) for name in after
    }
    text = server.client.get("/metrics").text
    assert 'hymba_http_requests_total{path="/v1/completions",status="200"} 24.0' in text
    stats = server.client.get("/stats").json()
    assert stats["generated_tokens"] == sum(after.values()) and stats["replicas"]["ready"] == 2


def test_openai_page_and_description(server: Process, slow_loop: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    options = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model=name, prompt="the fox", stream=True, **options)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == slow_loop("the fox", max_tokens=12, stop_ids=()).text
    assert "<html" in server.client.get("/").text
    assert "/v1/completions" in server.client.get("/openapi.json").json()["paths"]
    wrong = server.client.post("/v1/completions", content=b"{")
    assert wrong.status_code == 400 and wrong.json()["error"]


def test_a_conversation_stays_where_it_is(server: Process) -> None:
    for number in range(4):
        messages = [{"role": "user", "content": f"{number} def fibonacci(n): return n"}]
        places, cached = set(), []
        for _ in range(4):
            body = {"messages": messages, "max_tokens": 4, "temperature": 0}
            answer = server.client.post("/v1/chat/completions", json=body)
            places.add(answer.headers[REPLICA])
            usage = answer.json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "so"}]
        assert len(places) == 1
        assert any(cached), cached  # where the text of an answer is not its tokens, not each turn


def test_a_client_that_goes_frees_its_slot(server: Process) -> None:
    body = {"prompt": "fox", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_for(lambda: sum(metric(server, "hymba_completions_total").values()) > 0)
    wait_for(lambda: server.client.get("/stats").json()["running"] == 0, 2)
    text = server.client.get("/metrics").text
    assert re.search(r'hymba_completions_total{finish="cancelled",replica="\w+"} 1.0', text)


def test_a_replica_is_killed(server: Process, slow_loop: Any) -> None:
    """Every call ends with its right text or an error; others go on; another replica comes."""
    right = slow_loop("the quick", max_tokens=400, stop_ids=()).text
    before, workers = server.names(), server.workers()
    assert len(workers) == 2
    begun = threading.Barrier(9)  # eight streams and the murderer

    def stream(number: int) -> tuple[str, bool, bool]:
        """What was said, whether it ended well, whether an error was told."""
        body = {"prompt": "the quick", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        text, ended, failed, first = "", False, False, True
        with (
            httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer,
        ):
            assert answer.status_code == 200
            try:
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        failed |= "error" in event
                        text += "" if "error" in event else event["choices"][0]["text"]
                    if text and first:
                        first = False
                        begun.wait(30)
            except httpx.TransportError:
                failed = True
        return text, ended, failed

    with ThreadPoolExecutor(24) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        begun.wait(60)
        waiting = [pool.submit(ask, server, f"{i} fox", 200) for i in range(8)]
        time.sleep(0.1)
        os.kill(workers[0], signal.SIGKILL)
        since = time.monotonic()
        later = [pool.submit(ask, server, f"{i} dog") for i in range(8)]
        ends = [future.result(90) for future in streams]
        answers = [future.result(90) for future in waiting + later]
    for text, ended, failed in ends:
        assert ended != failed, "a silent end"
        assert right.startswith(text) and (failed or text == right)
    assert any(failed for *_, failed in ends) and any(ended for _, ended, _ in ends), ends
    for number, answer in enumerate(answers):
        prompt, count = (f"{number} fox", 200) if number < 8 else (f"{number - 8} dog", 8)
        if answer.status_code == 200:
            said = slow_loop(prompt, max_tokens=count, stop_ids=())
            assert answer.json()["choices"][0]["text"] == said.text
        else:
            assert answer.status_code >= 500 and answer.json()["error"]["message"]
    assert all(answer.status_code == 200 for answer in answers)  # another replica took them
    wait_for(lambda: len(server.names()) == 2 and set(server.names()) != set(before), 60)
    print(f"two replicas again after {time.monotonic() - since:.1f} s")
    assert workers[1] in server.workers() and len(server.workers()) == 2
    new = (set(server.names()) - set(before)).pop()
    wait_for(lambda: ask(server, f"{time.time()} x", 1).headers[REPLICA] == new)
    assert "another is started" in server.text


def test_what_is_wrong_is_told_in_a_line(server: Process, folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    second = Process(folder, "--replicas", "2", "--port", port)
    assert second.child.wait(60) == 2
    assert "Traceback" not in second.text and "try another --port" in second.text


def test_sigterm_drains_and_nothing_is_left(server: Process, slow_loop: Any) -> None:
    body = {"prompt": "the quick", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.child.send_signal(signal.SIGTERM)
        wait_for(lambda: "taking no new requests" in server.text)
        refused = ask(server, "x")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert server.client.get("/health").json()["status"] == "draining"
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert server.child.wait(30) == 0
    assert "Traceback" not in server.text
    wait_for(lambda: not server.left(), 30)
