"""Under load: several hundred mixed calls, some cancelled, some malformed. Each gets its right
text or a proper error, and afterwards nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from hymba.engine.limits import Limits  # noqa: E402

CALLS = 300
PROMPTS = ["the quick", "def fibonacci(n):\n", "x", "brown fox " * 8, "return n " * 30]
WRONG = [b"{", b'{"prompt": 1}', b'{"prompt": "x", "n": 0}', b'{"prompt": "\\ud800"}', b"\x00" * 99]
HEADERS = {"content-type": "application/json"}


@pytest.mark.slow
def test_a_burst_of_everything(serve: Any, slow_loop: Any) -> None:
    served = serve(Limits(max_sequences=16, queue=32))
    want = {
        (prompt, count): slow_loop(prompt, max_tokens=count).text
        for prompt in PROMPTS
        for count in (1, 5, 12)
    }
    asyncio.run(_burst(served.url, want, 60, random.Random(1)))  # makes what stays
    assert served.idle()
    before = _left(served)
    results = asyncio.run(_burst(served.url, want, CALLS, random.Random(2)))
    assert served.idle()
    counts = {kind: results.count(kind) for kind in ("right", "cancelled", "refused")}
    assert sum(counts.values()) == CALLS and min(counts.values()) > 20, counts
    after = _left(served)
    assert after["resident"] < before["resident"] + 64 * 2**20  # allocators keep a little
    assert after["tasks"] <= before["tasks"] and after["streams"] == 0
    assert after["allocated"] == before["allocated"]
    assert after["used"] <= after["kept"]  # but for beginnings kept, which are bounded
    with served.client() as client:
        answer = client.post("/v1/completions", json=_body("x", 12))
        assert answer.json()["choices"][0]["text"] == want["x", 12]


def _left(served: Any) -> dict[str, int]:
    gc.collect()
    stats, service = served.stats, served.app.state.service
    count = asyncio.run_coroutine_threadsafe(_tasks(), served.loop).result(5)
    limits = served.llm.engine.room
    memory = Path("/proc/self/statm")  # pages; not every system has it
    pages = int(memory.read_text().split()[1]) if memory.exists() else 0
    return {
        "resident": pages * 4096,
        "tasks": count,
        "streams": len(service._open) + len(service._running),
        "allocated": stats.cache_bytes_total - stats.prefix_bytes,
        "used": stats.cache_bytes,
        "kept": stats.prefix_bytes + limits.sizes.slot,
    }


async def _tasks() -> int:
    await asyncio.sleep(0.3)  # connections that are closing
    return len(asyncio.all_tasks())


def _body(prompt: str, count: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0} | more


async def _burst(
    url: str, want: dict[tuple[str, int], str], calls: int, chance: random.Random
) -> list[str]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=url, timeout=60, limits=limits, trust_env=False
    ) as client:
        return await asyncio.gather(*(_one(client, want, chance) for _ in range(calls)))


async def _one(client: Any, want: dict[tuple[str, int], str], chance: random.Random) -> str:
    (prompt, count), kind = chance.choice(list(want)), chance.random()
    pause, leave = chance.random() * 2, chance.random() * 0.1
    stream = chance.random() < 0.5
    await asyncio.sleep(pause)
    if kind < 0.15:
        content = chance.choice(WRONG)
        answer = await client.post("/v1/completions", content=content, headers=HEADERS)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
        return "refused"
    if kind < 0.35:
        body = _body(prompt, 200, ignore_eos=True, stream=stream, n=chance.choice([1, 3]))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(leave):
                await client.post("/v1/completions", json=body)
        return "cancelled"
    n, status = chance.choice([1, 1, 2]), 429
    while status == 429:  # as clients do: come again
        body = _body(prompt, count, stream=stream, n=n)
        answer = await client.post("/v1/completions", json=body)
        status = answer.status_code
        if status == 429:
            assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "queue_full"
            await asyncio.sleep(0.1 + pause / 4)
    assert answer.status_code == 200, answer.text
    assert _texts(answer, stream, n) == [want[prompt, count]] * n
    return "right"


def _texts(answer: Any, stream: bool, n: int) -> list[str]:
    if not stream:
        return [choice["text"] for choice in answer.json()["choices"]]
    texts = [""] * n
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts
