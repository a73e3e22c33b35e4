"""The one address in front of several replicas: `create_front(fleet, settings)`.

Key, sizes and drain are checked here, by the same guard that a single server has. A call that
passes goes to a replica as it is, and the replica's answer comes back as it is. /health, /stats and
/metrics are answered here, for all of them. A replica that is lost costs no call its end:

* where nothing has been sent yet, another replica gets the call;
* a stream that has begun ends with an error, and no [DONE];
* a body that has begun ends with a broken connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.types import Message, Receive, Scope, Send

import hymba
from hymba.engine.service import State, Unavailable
from hymba.server import errors, shapes
from hymba.server.affinity import beginnings
from hymba.server.app import PLAIN_CHAT
from hymba.server.errors import ApiError
from hymba.server.guard import Guard
from hymba.server.metrics import CONTENT_TYPE
from hymba.server.reply import event, until_gone
from hymba.server.settings import Settings

log = logging.getLogger("hymba.server")

TRIES = 2  # replicas that one call may lose: a call that kills its replica must not kill them all
HTTP = "hymba_http_requests"
REPLICA = "x-hymba-replica"
PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path")


class Lost(Exception):
    """The replica has gone before its answer was complete."""


@dataclass
class Ask:
    """A call on its way to a replica."""

    scope: dict[str, Any]
    body: bytes
    marks: list[bytes] = field(default_factory=list)
    avoid: set[str] = field(default_factory=set)  # replicas that this call has lost
    replica: str | None = None  # that has it now


@dataclass
class Told:
    """What a replica says of itself. `problem`: why it will never serve."""

    replica: str
    problem: str | None = None
    live: shapes.Live | None = None
    metrics: Sequence[Metric] = ()

    @property
    def ready(self) -> bool:
        return self.live is not None and self.live.status == "ready"


class Fleet(Protocol):
    """The replicas, as the front needs them."""

    wanted: int
    ready: int  # as far as is known just now

    def answer(self, ask: Ask) -> AsyncIterator[Message]:
        """ASGI messages of one replica; raises Lost where it goes before the last of them."""
        ...

    async def told(self) -> list[Told]:
        """By those that answer, in order of their names."""
        ...

    def watch(self) -> AsyncIterator[None]:
        """Keeps `ready` up to date while it is waited for."""
        ...


def create_front(fleet: Fleet, settings: Settings) -> FastAPI:
    front = Front(fleet, settings)
    app = FastAPI(
        version=hymba.__version__, openapi_url=None, docs_url=None, lifespan=front.lifespan
    )
    app.state.service = front  # what `run` drains
    _add_routes(app, front)
    app.mount("/", front.forward)
    errors.install(app)
    app.add_middleware(Guard, settings=settings, service=front, count=front.count)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", *PLAIN_CHAT, REPLICA],
        )
    return app


class Front:
    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self.fleet, self.settings = fleet, settings
        self.state: State = "ready"
        self._open: set[asyncio.Task[None]] = set()
        self._registry = CollectorRegistry()
        self._http = Counter(HTTP, "answers", ["path", "status"], registry=self._registry)

    def count(self, path: str, status: int) -> None:
        self._http.labels(path, status).inc()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async def watch() -> None:
            async for _ in self.fleet.watch():
                pass

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            await self.close()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def drain(self) -> None:
        """Take no new calls and wait for the ones that run."""
        self.state = "draining"
        while self._open:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End what runs with an error."""
        self.state = "closed"
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    # ---- for all replicas

    def status(self, told: Iterable[Told]) -> State:
        if self.state != "ready" or any(one.ready for one in told):
            return self.state
        return "starting"

    def live(self, told: Sequence[Told]) -> shapes.FleetLive:
        """The sums of the replicas' numbers."""
        lives = [one.live for one in told if one.live is not None]
        if not lives:
            raise Unavailable("no replica answers")
        first = lives[0].model_dump()
        sums = {
            name: sum(getattr(live, name) for live in lives)
            for name, value in first.items()
            if isinstance(value, int | float) and name not in ("chat_template", "max_model_len")
        }
        own = {"status": self.status(told), "replicas": self._replicas(told)}
        return shapes.FleetLive(**first | sums | own)

    def health(self, told: Sequence[Told]) -> shapes.FleetHealth:
        return shapes.FleetHealth(status=self.status(told), replicas=self._replicas(told))

    def _replicas(self, told: Sequence[Told]) -> shapes.Replicas:
        ready = [one.replica for one in told if one.ready]
        return shapes.Replicas(ready=len(ready), wanted=self.fleet.wanted, names=ready)

    def metrics(self, told: Sequence[Told]) -> bytes:
        """The replicas' own, each sample with its replica's name: what restarts counts from 0,
        which is told apart only so. Answers are counted here, where clients get them."""
        registry = CollectorRegistry()
        registry.register(_Merged(self.fleet.wanted, told))
        return generate_latest(registry) + generate_latest(self._registry)

    # ---- to one replica

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = (await receive()).get("body", b"")  # all of it: the guard has read it
        task = asyncio.create_task(self._forward(scope, body, send))
        self._open.add(task)
        try:
            await until_gone(task, receive)
        finally:
            self._open.discard(task)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        ask = Ask({name: scope[name] for name in PASSED_ON if name in scope}, body)
        ask.scope |= {"headers": list(scope["headers"]), "query_string": scope["query_string"]}
        if scope["path"].startswith("/v1/") and body:
            ask.marks = await asyncio.to_thread(beginnings, body)
        sent = _Sent(scope, send)
        try:
            async with asyncio.timeout(None) as limit:
                await self._try(ask, sent, limit)
        except asyncio.CancelledError:
            if self.state != "closed":  # the client has gone
                raise
            await sent.problem(Unavailable("the server has stopped before the end"))
        except Exception as error:
            await sent.problem(error)

    async def _try(self, ask: Ask, sent: _Sent, limit: asyncio.Timeout) -> None:
        """Answer, by another replica where one is lost before anything was sent."""
        now = asyncio.get_running_loop().time
        for left in reversed(range(TRIES)):
            if not self.fleet.ready:
                raise Unavailable("no replica is ready")
            limit.reschedule(now() + self.settings.timeout + 1)  # theirs comes first
            try:
                async for message in self.fleet.answer(ask):
                    await sent.send(message)
                    if sent.begun:
                        limit.reschedule(None)
                return
            except Lost as error:
                log.warning("%s %s: replica %s: %s", *_line(ask), ask.replica, error)
                if sent.begun or not left:
                    problem = "the replica that computed this answer has been lost"
                    raise ApiError(500, problem, code="engine_error") from error
                sent.start = None
                if ask.replica is not None:
                    ask.avoid.add(ask.replica)


def _line(ask: Ask) -> tuple[str, str]:
    return ask.scope["method"], ask.scope["path"]


class _Sent:
    """What a client has got of an answer. The status waits for the first piece of the body, so
    that until then another replica may answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.start: Message | None = None
        self.begun = False
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            self._scope["route"] = SimpleNamespace(path=message.pop("route"))  # for the guard
            self._streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
            return
        if not self.begun and self.start is not None:
            self.begun = True
            await self._send(self.start)
        await self._send(message)

    async def problem(self, error: Exception) -> None:
        told = errors.explained(error)
        if not self.begun:
            self._scope.setdefault("route", SimpleNamespace(path="other"))
            await told.response()(self._scope, _silent, self._send)
        elif self._streams:
            last = {"type": "http.response.body", "body": event(told.body), "more_body": False}
            await self._send(last)
        else:
            raise error  # uvicorn closes the connection: the body is not whole


async def _silent() -> Message:
    return {"type": "http.disconnect"}


class _Merged(Collector):
    def __init__(self, wanted: int, told: Sequence[Told]) -> None:
        self._wanted, self._told = wanted, told

    def collect(self) -> Iterator[Metric]:
        ready = sum(one.ready for one in self._told)
        yield GaugeMetricFamily("hymba_replicas", "replicas asked for", value=self._wanted)
        yield GaugeMetricFamily("hymba_replicas_ready", "replicas that answer", value=ready)
        merged: dict[str, Metric] = {}
        for one in self._told:
            for family in one.metrics:
                if family.name != HTTP:
                    self._add(merged, family, one.replica)
        yield from merged.values()

    def _add(self, merged: dict[str, Metric], family: Metric, replica: str) -> None:
        new = Metric(family.name, family.documentation, family.type)
        kept = merged.setdefault(family.name, new).samples
        kept += [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]


def _add_routes(app: FastAPI, front: Front) -> None:
    @app.get("/health")
    async def health(response: Response) -> shapes.FleetHealth:
        found = front.health(await front.fleet.told())
        response.status_code = 200 if found.status == "ready" else 503
        return found

    @app.get("/stats")
    async def stats() -> shapes.FleetLive:
        return front.live(await front.fleet.told())

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(front.metrics(await front.fleet.told()), media_type=CONTENT_TYPE)
