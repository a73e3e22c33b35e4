"""The engine for asyncio: a thread that owns it, and streams of what it says.

Only that thread touches the engine. What others want arrives in its inbox between two steps; what a
step gives goes back to the event loop in one call, however many streams it is for.

    service = Service(engine)
    service.start()                                   # in a running event loop
    async with service.submit([prompt], sampling) as stream:
        async for deltas in stream:                   # all that came since it last asked
            ...

Leaving the block, in whatever way, cancels what still runs, so a client that has gone costs no
further step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from hymba.engine.request import Delta, Request
from hymba.engine.sampling import Sampling
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine.engine import Engine, Stats

log = logging.getLogger("hymba.service")

State = Literal["starting", "ready", "draining", "failed", "closed"]
COMPILERS = 2  # schemas and expressions compiled at once
Deliveries = dict["Stream", list[Delta]]


class Unavailable(UserError):
    """No new requests: the service has not started, is draining, has failed or is closed."""


class Service:
    """`state` is "starting" until `warm_up` got an answer, then "ready", "draining", "failed" (a
    step raised: what ran has ended with "error", and nothing new is taken) or "closed"."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[Request, Stream] = {}  # the thread's
        self._open: set[Stream] = set()  # the event loop's
        # Large schemas take seconds to compile: here nobody else waits for them but other schemas.
        self.compilers = ThreadPoolExecutor(COMPILERS, "hymba-compiler")
        self.prepare = engine.prepare  # for any thread
        self.state: State = "starting"
        self.stats: Stats = engine.stats()  # as of the last step; here no thread runs yet

    @property
    def healthy(self) -> bool:
        return self.state == "ready"

    def start(self) -> None:
        """Begin to serve the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="hymba-engine", daemon=True)
        self._thread.start()

    async def warm_up(self, prompt: Sequence[int]) -> None:
        """Answer something, so that what is slow the first time is behind us; then be ready."""
        self._inbox.put(self._engine.warm_up)
        async with Stream(self, [prompt], Sampling(max_tokens=2, stop_ids=())) as stream:
            async for _ in stream:
                pass
        if self.state == "starting" and not stream.failed:
            self.state = "ready"

    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Stream:
        """All of the prompts or none: entering the stream raises UserError for what cannot be
        served, QueueFull where too many wait, Unavailable where nothing is taken."""
        self.check_open(draining=True)
        return Stream(self, prompts, sampling)

    def check_open(self, draining: bool = False) -> None:
        """Raises Unavailable where nothing new is taken."""
        if self.state in ("failed", "closed") or (draining and self.state == "draining"):
            raise Unavailable(f"no new requests are taken: the engine is {self.state}")

    async def drain(self) -> None:
        """Take no new requests and wait for the ones that run."""
        if self.state in ("starting", "ready"):
            self.state = "draining"
        while self._open:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End what runs with "error", stop the thread and wait for it."""
        if self._thread is None or self.state == "closed":
            return
        self.state = "closed"
        self._inbox.put(lambda: None)  # wakes the thread
        await asyncio.to_thread(self._thread.join)
        self.compilers.shutdown(wait=False, cancel_futures=True)

    # ---- on the engine's thread

    def _serve(self) -> None:
        try:
            while self.state != "closed":
                self._obey()
                if self._engine.busy:
                    self._step()
        except Exception:
            log.exception("the engine failed; what ran ends with an error, nothing new is taken")
            self.state = "failed"
            self._fail_all()
            while self.state != "closed":  # who comes now is refused, not left waiting
                self._inbox.get()()
        self._fail_all()
        while not self._inbox.empty():
            self._inbox.get()()

    def _obey(self) -> None:
        """Do what the inbox asks; wait for it where the engine has nothing to do."""
        wait = not self._engine.busy
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            command()
            self.stats = self._engine.stats()
            wait = False

    def _step(self) -> None:
        deliveries: Deliveries = {}
        for delta in self._engine.step():
            stream = self._running.get(delta.request)
            if stream is not None:
                deliveries.setdefault(stream, []).append(delta)
                self._count(stream, delta)
        self.stats = self._engine.stats()
        if deliveries:
            self._post(_hand_out, deliveries)

    def _count(self, stream: Stream, delta: Delta) -> None:
        if delta.finish is not None:
            stream.unfinished[delta.request].discard(delta.index)
            if not stream.unfinished[delta.request]:
                del self._running[delta.request]

    def _admit(self, stream: Stream) -> None:
        try:
            self.check_open()
            for prompt in stream.prompts:
                stream.requests.append(self._engine.add(prompt, stream.sampling))
        except Exception as error:
            for request in stream.requests:
                self._engine.cancel(request)
            stream.requests.clear()
            return self._post(stream.answered, error)
        for request in stream.requests:
            stream.unfinished[request] = set(range(stream.sampling.n))
            self._running[request] = stream
        self._post(stream.answered, None)

    def _leave(self, stream: Stream) -> None:
        for request in stream.requests:
            if self._running.pop(request, None) is not None and self.state != "failed":
                self._engine.cancel(request)

    def _fail_all(self) -> None:
        """Every completion that has no end gets one."""
        deliveries: Deliveries = {}
        for request, stream in self._running.items():
            ends = [Delta(request, i, finish="error") for i in stream.unfinished[request]]
            deliveries.setdefault(stream, []).extend(ends)
            if self.state != "failed":
                self._engine.cancel(request)
        self._running.clear()
        self._post(_hand_out, deliveries)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended: nobody listens any more
            log.debug("an answer came after the event loop had ended")


def _hand_out(deliveries: Deliveries) -> None:
    for stream, deltas in deliveries.items():
        stream.arrived(deltas)


class Stream:
    """One call's completions: `async with` enters and leaves, `async for` gives lists of deltas.

    `place(request)` tells which prompt a delta belongs to."""

    def __init__(
        self, service: Service, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        self.prompts, self.sampling = [list(prompt) for prompt in prompts], sampling
        self.requests: list[Request] = []  # in the prompts' order, once entered
        self.unfinished: dict[Request, set[int]] = {}  # the thread's
        self.failed = False
        self._service = service
        self._left = len(self.prompts) * sampling.n  # completions without an end
        self._waiting: list[Delta] = []
        self._news = asyncio.Event()
        self._admitted: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Stream:
        service = self._service
        service.check_open()
        loop = asyncio.get_running_loop()
        self._admitted = loop.create_future()
        service._open.add(self)
        try:
            if self.sampling.constrained:
                await loop.run_in_executor(service.compilers, service.prepare, self.sampling)
            service._inbox.put(lambda: service._admit(self))
            await self._admitted
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Delta]:
        if not self._waiting:
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        deltas, self._waiting = self._waiting, []
        self._left -= sum(delta.finish is not None for delta in deltas)
        return deltas

    def place(self, request: Request) -> int:
        return self.requests.index(request)

    # ---- called on the event loop

    def answered(self, error: Exception | None) -> None:
        """The engine took the prompts, or why not."""
        assert self._admitted is not None
        if self._admitted.done():  # whoever asked has gone
            return
        if error is None:
            self._admitted.set_result(None)
        else:
            self._admitted.set_exception(error)

    def arrived(self, deltas: list[Delta]) -> None:
        self._waiting += deltas
        self.failed |= any(delta.finish == "error" for delta in deltas)
        self._news.set()

    def _close(self) -> None:
        self._service._open.discard(self)
        self._service._inbox.put(lambda: self._service._leave(self))
