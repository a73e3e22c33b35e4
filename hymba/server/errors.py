"""Mistakes in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hymba.engine.engine import QueueFull
from hymba.engine.service import Unavailable
from hymba.errors import UserError

log = logging.getLogger("hymba.server")

RETRY_AFTER = "1"  # seconds; a slot is freed whenever any sequence ends
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Problem


class ApiError(Exception):
    """An answer other than 200. `param` names the field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self._headers = headers or {}

    @property
    def body(self) -> ErrorBody:
        kind = TYPES.get(self.status, "server_error")
        return ErrorBody(
            error=Problem(message=str(self), type=kind, param=self.param, code=self.code)
        )

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": RETRY_AFTER, **self._headers}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else dict(self._headers)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def explained(error: Exception) -> ApiError:
    """Any exception as an answer; what is no user's mistake is logged and not told."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="queue_full")
        case Unavailable():
            return ApiError(503, str(error), code="unavailable")
        case UserError():
            return ApiError(400, " ".join(str(error).split()))
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case TimeoutError():
            return ApiError(504, "the time limit of a request has passed", code="timeout")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server made a mistake; its log tells more", code="internal_error")


def install(app: FastAPI) -> None:
    async def explain(_: Request, error: Exception) -> JSONResponse:
        return explained(error).response()

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()).response()

    for kind in (ApiError, UserError, HTTPException, TimeoutError, Exception):
        app.add_exception_handler(kind, explain)
    app.add_exception_handler(RequestValidationError, refuse)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, in a line."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    param = ".".join(str(part) for part in place) or None
    match first["type"]:
        case "json_invalid":
            detail = first.get("ctx", {}).get("error", "")
            return ApiError(400, f"the body is not JSON (at {param}): {detail}")
        case "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}"
            return ApiError(400, message, param, "unknown_parameter")
        case "missing":
            return ApiError(400, f"{param or 'a JSON body'} is missing", param, "missing")
        case "model_attributes_type":
            message = "the body must be a JSON object, sent with Content-Type: application/json"
            return ApiError(400, message)
    said = str(first["msg"]).removeprefix("Value error, ")
    others = [error for error in errors[1:] if error["loc"][:2] == first["loc"][:2]]
    if others:  # one field that may be of several types, and is of none
        param = str(place[0])
        said = "; or ".join(dict.fromkeys(str(error["msg"]) for error in (first, *others)))
    return ApiError(400, f"{param}: {said}" if param else said, param, "invalid_value")
