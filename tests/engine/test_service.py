"""The asyncio bridge with the real engine: answers, leaving, refusing, draining, failing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from hymba.config import Config
from hymba.engine.engine import Engine, QueueFull
from hymba.engine.limits import Limits
from hymba.engine.loop import generate
from hymba.engine.sampling import Sampling
from hymba.engine.service import Service, Unavailable
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel

LONG = Sampling(max_tokens=400, stop_ids=())
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]) -> LanguageModel:
    return lively(replace(tiny("hymba"), eos_token_id=None))


@pytest.fixture
def run(model: LanguageModel) -> Run:
    """run(test, Limits(...)): an async test with a service that has started."""

    def begin(test: Callable[[Service], Awaitable[Any]], limits: Limits | None = None) -> Any:
        async def main() -> Any:
            service = Service(Engine(model, limits=limits or Limits(max_sequences=2)))
            service.start()
            await service.warm_up([1])
            try:
                async with asyncio.timeout(20):
                    return await test(service)
            finally:
                await service.close()

        return asyncio.run(main())

    return begin


async def answer(service: Service, prompt: list[int], sampling: Sampling) -> list[list[int]]:
    said: list[list[int]] = [[] for _ in range(sampling.n)]
    async with service.submit([prompt], sampling) as stream:
        async for deltas in stream:
            for delta in deltas:
                said[delta.index] += delta.tokens
    return said


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_many_at_once_are_what_they_are_alone(run: Run, model: LanguageModel) -> None:
    prompts = [[i, i + 1, 7] for i in range(1, 9)]
    sampling = Sampling(max_tokens=10)

    async def test(service: Service) -> Any:
        return await asyncio.gather(*(answer(service, prompt, sampling) for prompt in prompts))

    assert run(test) == [[said.tokens] for said in generate(model, prompts, sampling)]


def test_several_prompts_in_one_stream(run: Run, model: LanguageModel) -> None:
    prompts, sampling = [[1, 2], [3], [4, 5, 6]], Sampling(max_tokens=5, n=2)

    async def test(service: Service) -> Any:
        said = [[[], []] for _ in prompts]
        async with service.submit(prompts, sampling) as stream:
            async for deltas in stream:
                for delta in deltas:
                    said[stream.place(delta.request)][delta.index] += delta.tokens
        return said

    want = generate(model, prompts, Sampling(max_tokens=5))
    assert run(test) == [[one.tokens] * 2 for one in want]


def test_leaving_cancels(run: Run) -> None:
    async def test(service: Service) -> None:
        async with service.submit([[1], [2]], LONG) as stream:
            await anext(stream)
            assert service.stats.running + service.stats.waiting == 2
        await until(lambda: service.stats.running + service.stats.waiting == 0)
        assert service.stats.generated_tokens < 400

    run(test)


def test_a_cancelled_task_cancels_even_before_it_was_let_in(run: Run) -> None:
    async def test(service: Service) -> None:
        tasks = [asyncio.create_task(answer(service, [1], LONG)) for _ in range(6)]
        for pause, task in enumerate(tasks):
            await asyncio.sleep(0 if pause < 3 else 0.01)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: service.stats.running + service.stats.waiting == 0)

    run(test)


def test_all_prompts_or_none(run: Run) -> None:
    async def test(service: Service) -> None:
        for wrong, error in (([[1], []], UserError), ([[1]] * 9, QueueFull)):
            with pytest.raises(error):
                async with service.submit(wrong, LONG):
                    pass
            await until(lambda: service.stats.running + service.stats.waiting == 0)
        assert await answer(service, [1], Sampling(max_tokens=2))

    run(test, Limits(max_sequences=1, queue=4))


def test_drain_waits_and_refuses(run: Run) -> None:
    async def test(service: Service) -> None:
        running = asyncio.create_task(answer(service, [1], replace(LONG, max_tokens=100)))
        await until(lambda: service.stats.running == 1)
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        assert service.state == "draining" and not service.healthy
        with pytest.raises(Unavailable):
            await answer(service, [1], LONG)
        await drained
        assert [len(said) for said in await running] == [100]

    run(test)


def test_closing_ends_what_runs(run: Run) -> None:
    async def test(service: Service) -> None:
        async with service.submit([[1]], LONG) as stream:
            await anext(stream)
            await service.close()
            ends = [delta.finish async for deltas in stream for delta in deltas]
        assert ends[-1] == "error" and stream.failed
        with pytest.raises(Unavailable):
            await answer(service, [1], LONG)

    run(test)


def test_a_failing_step_ends_everything_and_hangs_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: Service) -> None:
        ready = service.submit([[2]], LONG)  # not entered yet
        async with service.submit([[1]], replace(LONG, n=2)) as stream:
            monkeypatch.setattr(service._engine, "step", lambda: 1 / 0)
            deltas = [delta async for deltas in stream for delta in deltas]
        assert sorted(d.index for d in deltas if d.finish == "error") == [0, 1]
        assert service.state == "failed" and "ZeroDivisionError" in caplog.text
        with pytest.raises(Unavailable):
            async with ready:
                pass
        await service.drain()

    run(test)


def test_a_first_answer_that_fails_leaves_it_not_ready(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = Engine(model, limits=Limits(max_sequences=1))
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        service = Service(engine)
        service.start()
        assert service.state == "starting"
        await service.warm_up([1])
        assert service.state == "failed"
        await service.close()

    asyncio.run(main())
