"""Several replicas of a model behind one address, kept alive by Ray Serve.

Ray starts the replicas, a process each with a model and an engine of its own, watches them and
replaces those that die. Its HTTP proxy is not used: calls come in at `front.py`, which sends them
through a Serve handle, with `Router` to choose. The only file that knows ray.

    with running(load, settings, Share(replicas=2, gpus=0, cpus=1)) as fleet:
        run(create_front(fleet, settings), bound, grace=30, started=lambda: None)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Ray reads these when it is imported. One front routes everything, so what it knows of the loads
# does not grow old; a replica on a busy CPU may take its time to say how much it has to do.
for _variable, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "86400",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # replicas without a GPU see what we see
    "RAY_DEDUP_LOGS": "0",
}.items():
    os.environ.setdefault(_variable, _value)
ADDRESS = os.environ.get("RAY_ADDRESS")  # of a cluster to join, else one of our own is started
if ADDRESS and (Path.home() / ".ray/auth_token").is_file():  # as `ray start` does, and `ray.init`
    os.environ.setdefault("RAY_AUTH_MODE", "token")

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import ProxyLocation, RequestRouterConfig
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    from hymba.errors import UserError

    raise UserError(f'--replicas needs ray: pip install "hymba[replicas]" ({error})') from None

from starlette.types import Message  # noqa: E402

from hymba.errors import UserError  # noqa: E402
from hymba.server.affinity import Places  # noqa: E402
from hymba.server.app import create_app  # noqa: E402
from hymba.server.front import REPLICA, Ask, Lost, Told  # noqa: E402
from hymba.server.settings import Settings  # noqa: E402

if TYPE_CHECKING:
    from hymba.engine.llm import LLM

log = logging.getLogger("hymba.server")

Load = Callable[[], "tuple[LLM, Settings]"]
Batch = list[Message]
STORE = 80 << 20  # bytes of Ray's object store, where large answers and bodies pass
ANSWER = 5.0  # seconds for replicas to tell of themselves
WATCH = 1.0  # seconds between two looks at who is there
HUNG = 30.0  # seconds without a sign of life until a replica is replaced
FAILED = "hymba.failed"  # instead of an answer, until Ray has looked at the replica's health
MANY = 1_000_000  # calls at one replica as far as Ray cares: the engine has a queue of its own


@dataclass(frozen=True)
class Share:
    """What each of the replicas gets."""

    replicas: int
    gpus: int = 0
    cpus: int = 1


# ---- in a replica's process


class Replica:
    """The application of one model, its calls and answers as ASGI messages."""

    async def __init__(self, load: Load) -> None:  # type: ignore[misc]  # Ray waits for it
        self._name = _name(serve.get_replica_context().replica_id)
        self._problem: str | None = None
        try:
            llm, settings = load()
        except UserError as error:  # to try again would not help: the front tells it and ends
            self._problem = str(error)
            return
        self._app = create_app(llm, replace(settings, cors_origins=()))  # the front's headers
        self._server = self._app.state.server
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        while self._server.service.state == "starting":
            await asyncio.sleep(0.01)

    def check_health(self) -> None:
        """Called by Ray; whoever raises is replaced."""
        if self._problem is None and self._server.service.state != "ready":
            raise RuntimeError(f"the engine is {self._server.service.state}")

    async def tell(self) -> Told:
        if self._problem is not None:
            return Told(self._name, self._problem)
        metrics = list(self._server.metrics.registry.collect())
        return Told(self._name, None, self._server.live(), metrics)

    async def answer(self, ask: Ask) -> AsyncIterator[Batch]:
        """What the application sends, as many messages at once as there are."""
        if self._server.service.state == "failed":
            yield [{"type": FAILED}]
            return
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        scope = ask.scope | {"type": "http", "asgi": {"version": "3.0"}}
        task = asyncio.create_task(self._run(scope, ask.body, messages))
        try:
            more = True
            while more:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                more = batch[-1] is not None
                yield [message for message in batch if message is not None]
        finally:  # the client may have gone
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(
        self, scope: dict[str, Any], body: bytes, messages: asyncio.Queue[Message | None]
    ) -> None:
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            return await asyncio.Future()  # a client that goes cancels all of this

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = str(getattr(scope.get("route"), "path", "other"))
                headers = [*message["headers"], (REPLICA.encode(), self._name.encode())]
                message = {**message, "route": route, "headers": headers}
            messages.put_nowait(message)

        try:
            await self._app(scope, receive, send)
        except Exception:  # an answer has been sent already
            log.debug("a call failed", exc_info=True)
        messages.put_nowait(None)


def _name(replica: ReplicaID) -> str:
    return replica.unique_id


# ---- in the front's process


class Router(RequestRouter):
    """Least load with affinity of beginnings (`Places`). Ray's own prefix router needs vLLM."""

    def initialize_state(self, **_: Any) -> None:
        self._places = Places()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none of these takes it
        there = {_name(one.replica_id): one for one in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(one.replica_id) or 0 for name, one in there.items()}
        ask = pending_request.args[0]
        return [[there[name]] for name in self._places.order(loads, ask.marks, ask.avoid)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        ask: Ask = pending_request.args[0]
        ask.replica = _name(replica_id)
        self._places.put(ask.marks, ask.replica)


class RayFleet:
    def __init__(self, handle: Any, wanted: int) -> None:
        self._handle, self.wanted = handle, wanted
        self._answers = handle.options(method_name="answer", stream=True)
        self.ready = 0
        self._known: list[Told] = []

    async def answer(self, ask: Ask) -> AsyncIterator[Message]:
        batches = self._answers.remote(ask)
        try:
            async for batch in batches:
                for message in batch:
                    if message["type"] == FAILED:
                        raise Lost("its engine has failed")
                    yield message
        except (RayError, RayServeException) as error:
            raise Lost(str(error).splitlines()[0]) from error
        finally:
            batches.cancel()  # nothing, where it has ended

    async def told(self) -> list[Told]:
        with contextlib.suppress(TimeoutError):  # then what was known before
            self._known = await self._ask_all()
        self.ready = sum(one.ready for one in self._known)
        return self._known

    async def _ask_all(self) -> list[Told]:
        try:
            found = await self._handle.broadcast("tell").results_async(
                timeout_s=ANSWER, return_exceptions=True
            )
        except RayServeException:  # none is there
            return []
        return sorted((one for one in found if isinstance(one, Told)), key=lambda one: one.replica)

    async def watch(self) -> AsyncIterator[None]:
        before: set[str] = set()
        while True:
            there = {one.replica for one in await self.told() if one.ready}
            for name in sorted(before - there):
                log.warning("replica %s has gone; another is started", name)
            for name in sorted(there - before):
                log.info("replica %s is ready (%d of %d)", name, self.ready, self.wanted)
            before = there
            yield
            await asyncio.sleep(WATCH)

    def wait(self, status: Callable[[], str]) -> None:
        """Until one replica is ready; raises UserError for what will never be."""
        while not self.ready:
            for one in asyncio.run(self.told()):
                if one.problem is not None:
                    raise UserError(one.problem)
            if status() in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError("the replicas do not start; what they wrote is above")
            time.sleep(0.1)


@contextlib.contextmanager
def running(load: Load, share: Share, name: str) -> Iterator[RayFleet]:
    """A fleet, at least one of whose replicas is ready. `name` tells it apart from other servers
    of a cluster. With RAY_ADDRESS the replicas are spread over that cluster's machines."""
    _connect(share)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_quiet())
        target = serve.RunTarget(_application(load, share), name=name, route_prefix=None)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        fleet = RayFleet(handle, share.replicas)
        fleet.wait(lambda: str(serve.status().applications[name].status.value))
        yield fleet
    finally:
        if ADDRESS:
            with contextlib.suppress(RayServeException):
                serve.delete(name)
        ray.shutdown()  # of a cluster of our own: all its processes


def _connect(share: Share) -> None:
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "namespace": "hymba"}
    if not ADDRESS:
        options |= {"object_store_memory": STORE, "include_dashboard": False}
        options["num_cpus"] = max(os.cpu_count() or 1, share.cpus * share.replicas)
    try:
        ray.init(ADDRESS or "local", **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UserError(f"ray does not start: {str(error).splitlines()[0]}") from error
    there = ray.cluster_resources()
    for kind, needed in (("GPU", share.gpus), ("CPU", share.cpus)):
        most = int(there.get(kind, 0)) // needed if needed else share.replicas
        if most < share.replicas:
            ray.shutdown()
            raise UserError(
                f"there are {kind}s for {most} replicas, not for {share.replicas}: "
                f"fewer --replicas, or {'--device cpu' if kind == 'GPU' else 'fewer --threads'}"
            )


def _application(load: Load, share: Share) -> serve.Application:
    return (
        serve.deployment(Replica)
        .options(
            num_replicas=share.replicas,
            max_ongoing_requests=MANY,
            max_constructor_retry_count=3,
            ray_actor_options={"num_gpus": share.gpus, "num_cpus": share.cpus},
            request_router_config=RequestRouterConfig(request_router_class=Router),
            health_check_period_s=WATCH,
            health_check_timeout_s=HUNG,
            graceful_shutdown_timeout_s=1,
            logging_config=_quiet(),
        )
        .bind(load)
    )


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level="ERROR", enable_access_log=False)
