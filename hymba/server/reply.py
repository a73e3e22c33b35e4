"""An answer that is made while it is sent: the call enters the engine, and leaves it at its end,
when its time is up, or at once when the client goes.

Admission, sending and leaving are one block of code, so no way out can leave a sequence running.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from hymba.engine.request import Completion, Delta
from hymba.engine.sampling import Sampling
from hymba.engine.service import Service, Stream
from hymba.server import shapes
from hymba.server.answers import Writer
from hymba.server.errors import ApiError, explained
from hymba.server.metrics import Metrics, Watch

PING = 15.0  # seconds of silence until a stream says it is still there: proxies close silent ones
EVENTS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True)
class Call:
    """What a client asked for, in the engine's words."""

    prompts: list[list[int]]
    sampling: Sampling
    streams: bool
    usage: bool  # at the end of a stream
    timeout: float


class Reply(Response):
    def __init__(
        self,
        call: Call,
        writer: Writer,
        service: Service,
        metrics: Metrics,
        headers: dict[str, str],
    ) -> None:
        super().__init__()
        self._call, self._writer, self._service = call, writer, service
        self._metrics, self._extra = metrics, headers
        self._begun = False  # whether the status is out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(asyncio.create_task(self._answer(scope, receive, send)), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, watch = self._call, self._metrics.watch()
        try:
            async with (
                asyncio.timeout(call.timeout),
                self._service.submit(call.prompts, call.sampling) as stream,
            ):
                if call.streams:
                    await self._send_events(stream, watch, send)
                else:
                    said = await self._collect(stream, watch)
                    body = self._writer.whole(said, self._usage(stream, said))
                    whole = Response(body.model_dump_json(), 200, self._extra, "application/json")
                    self._begun = True
                    await whole(scope, receive, send)
            watch.ended("done")
        except asyncio.CancelledError:  # the client has gone
            watch.ended("cancelled")
            raise
        except Exception as error:
            problem = explained(error)
            watch.ended("error")
            if not self._begun:
                await problem.response()(scope, receive, send)
            else:
                await send(_body(event(problem.body), more=False))

    async def _collect(self, stream: Stream, watch: Watch) -> list[Completion]:
        said = self._silence()
        async for deltas in stream:
            for index, part in self._parts(stream, deltas).items():
                watch.saw(index, part)
                _join(said[index], part)
        return said

    async def _send_events(self, stream: Stream, watch: Watch, send: Send) -> None:
        headers = [(k.encode(), v.encode()) for k, v in (EVENTS | self._extra).items()]
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        said = self._silence()
        async for deltas in _patient(stream):
            events = [] if deltas else [b": still here\n\n"]
            for index, part in self._parts(stream, deltas).items():
                watch.saw(index, part)
                said[index].tokens += part.tokens
                chunk = self._writer.chunk(index, part)
                events += [] if chunk is None else [event(chunk)]
            if events:
                await send(_body(b"".join(events)))
        last = [event(self._writer.last(self._usage(stream, said)))] if self._call.usage else []
        await send(_body(b"".join([*last, b"data: [DONE]\n\n"]), more=False))

    def _silence(self) -> list[Completion]:
        return [Completion() for _ in range(len(self._call.prompts) * self._call.sampling.n)]

    def _parts(self, stream: Stream, deltas: list[Delta]) -> dict[int, Completion]:
        """Deltas joined by choice: a slow reader gets few large pieces."""
        parts: dict[int, Completion] = {}
        for delta in deltas:
            if delta.finish == "error":
                raise ApiError(500, "the engine stopped before the end", code="engine_error")
            index = stream.place(delta.request) * self._call.sampling.n + delta.index
            parts.setdefault(index, Completion()).add(delta)
        return parts

    def _usage(self, stream: Stream, said: list[Completion]) -> shapes.Usage:
        prompt = sum(map(len, self._call.prompts))
        answer = sum(len(one.tokens) for one in said)
        cached = sum(request.cached_tokens for request in stream.requests)
        return shapes.Usage(
            prompt_tokens=prompt,
            completion_tokens=answer,
            total_tokens=prompt + answer,
            prompt_tokens_details=shapes.CachedTokens(cached_tokens=cached),
        )


async def until_gone(answer: asyncio.Task[None], receive: Receive) -> None:
    """Wait for the answer; cancel it where the client goes first, or whoever waits here."""
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _patient(stream: Stream) -> AsyncIterator[list[Delta]]:
    """The stream's lists, and an empty one after each PING seconds of silence."""
    while True:
        try:
            async with asyncio.timeout(PING):
                deltas = await anext(stream)
        except TimeoutError:
            deltas = []
        except StopAsyncIteration:
            return
        yield deltas


def _join(said: Completion, part: Completion) -> None:
    said.tokens += part.tokens
    said.text += part.text
    said.logprobs += part.logprobs
    said.finish = part.finish


def event(content: BaseModel) -> bytes:
    return b"data: " + content.model_dump_json().encode() + b"\n\n"


def _body(content: bytes, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": content, "more_body": more}
