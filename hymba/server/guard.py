"""What stands before every route: who may ask, how large a body may be, how long it may take.

Plain ASGI, since a body must be refused before anything reads it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hymba.engine.service import State
from hymba.server.errors import ApiError
from hymba.server.settings import Settings

# The page asks its user for the key, so it must come without one; health is for machines.
OPEN = ("/", "/health", "/stats")
OPEN_FOLDER = "/page/"
ANSWERED_WHILE_DRAINING = (*OPEN, "/metrics")


class Stateful(Protocol):
    state: State


class Guard:
    def __init__(
        self, app: ASGIApp, settings: Settings, service: Stateful, count: Callable[[str, int], None]
    ) -> None:
        self._app, self._settings, self._service, self._count = app, settings, service, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(_route(scope), message["status"])
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), counted)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        if path not in OPEN and not path.startswith(OPEN_FOLDER):
            self._check_key(headers.get("authorization", ""))
        if self._service.state == "draining" and path not in ANSWERED_WHILE_DRAINING:
            raise ApiError(503, "the server is shutting down", code="draining")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _check_key(self, authorization: str) -> None:
        if self._settings.api_key is None:
            return
        kind, _, given = authorization.partition(" ")
        # latin-1 is how headers were read; compared in constant time
        key = self._settings.api_key.encode()
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key)
        if kind.lower() != "bearer" or not same:
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None where the client went before it was there."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._settings.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        most = self._settings.max_body_bytes
        return ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already, then what comes after it: the client leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _route(scope: Scope) -> str:
    """The route's own path: a label a client cannot choose."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
