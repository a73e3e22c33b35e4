"""uvicorn under the application, and what a signal does.

The first SIGTERM or Ctrl-C drains: new calls are answered 503, running ones may finish for `grace`
seconds. The second stops at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from hymba.errors import UserError

log = logging.getLogger("hymba.server")

IDLE = 75  # seconds; longer than proxies keep connections, so that they never use a closed one
CLOSING = 5  # seconds for answers that are written to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address, not listening yet: whoever comes before the model is refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve at {host} port {port}: {error}; try another --port"
        ) from None
    bound.set_inheritable(True)
    return bound


def run(app: FastAPI, bound: socket.socket, grace: float, started: Callable[[], None]) -> None:
    """Serve until a signal; `started` is called when clients can connect."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=CLOSING,
    )
    _Server(config, app.state.service, grace, started).run(sockets=[bound])


class Drained(Protocol):
    """A `Service`, or the front of several."""

    async def drain(self) -> None: ...

    async def close(self) -> None: ...


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, service: Drained, grace: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._started = service, grace, started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._loop is None:
            self.should_exit = True
        elif self._signals == 1:
            name = signal.Signals(sig).name
            self._loop.call_soon_threadsafe(self._begin_to_drain, name)
        else:
            os._exit(128 + sig)  # as a shell counts; a step may be running on the engine's thread

    def _begin_to_drain(self, name: str) -> None:
        log.warning(
            "%s: taking no new requests, finishing those that run (at most %g s; again: stop now)",
            name,
            self._grace,
        )
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._grace):
                await self._service.drain()
        except TimeoutError:
            log.warning("the time to finish has passed: what still runs ends with an error")
            await self._service.close()
        self.should_exit = True
