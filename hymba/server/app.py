"""The routes. `create_app(llm, settings)` is a whole server for one model.

    uvicorn.run(create_app(LLM("runs/demo/hymba"), Settings(model="demo")))

An application owns the engine of its `llm`: from its start to its end nobody else may step it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

import hymba
from hymba.engine.service import Service
from hymba.server import errors, shapes
from hymba.server.answers import Chats, Completions
from hymba.server.errors import ApiError, ErrorBody
from hymba.server.guard import Guard
from hymba.server.metrics import CONTENT_TYPE, Metrics
from hymba.server.prompts import Prompt, Reader
from hymba.server.protocol import Ask, ChatAsk, CompletionAsk, DetokenizeAsk, TokenizeAsk
from hymba.server.reply import Call, Reply
from hymba.server.settings import Settings

if TYPE_CHECKING:
    from hymba.engine.llm import LLM

log = logging.getLogger("hymba.server")

PAGE = Path(__file__).parent / "page"
PLAIN_CHAT = {"X-Hymba-Chat": "plain-continuation"}  # on answers of a model without a template
_PROBLEMS = {
    400: "The call cannot be served as it is.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many calls wait; try again later.",
    500: "The server failed.",
    503: "Not ready, or shutting down.",
    504: "The call's time limit has passed.",
}
Responses = dict[int | str, dict[str, Any]]
PROBLEMS: Responses = {
    status: {"model": ErrorBody, "description": about} for status, about in _PROBLEMS.items()
}
KEY: Responses = {status: PROBLEMS[status] for status in (401, 500, 503)}


def create_app(llm: LLM, settings: Settings | None = None) -> FastAPI:
    server = Server(llm, settings or Settings())
    app = FastAPI(
        title="hymba",
        version=hymba.__version__,
        summary=f"OpenAI's API for {server.settings.model}",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=server.lifespan,
    )
    app.state.server, app.state.service = server, server.service
    _add_routes(app, server)
    errors.install(app)
    count = server.metrics.http.labels
    app.add_middleware(
        Guard,
        settings=server.settings,
        service=server.service,
        count=lambda path, status: count(path, status).inc(),
    )
    if server.settings.cors_origins:  # outermost: a preflight has no key, refusals need headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", *PLAIN_CHAT],
        )
    app.openapi = lambda: _described(app, server.settings)  # type: ignore[method-assign]
    return app


class Server:
    """One model behind the routes."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        config = llm.model.config
        if llm.tokenizer is None:
            raise errors.UserError("a server needs the model's tokenizer")
        self.settings, self.tokenizer = settings, llm.tokenizer
        self.service = Service(llm.engine)
        self.metrics = Metrics(self.service)
        self.positions = llm.engine.room.max_tokens
        self._queue = llm.engine.limits.queue
        own = self.tokenizer.eos_id if config.eos_token_id is None else config.eos_token_id
        eos = tuple({*settings.eos_ids} | ({own} if own is not None else set()))
        self.reader = Reader(self.tokenizer, settings, self.positions, config.vocab_size, eos)
        self._created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        if not self.tokenizer.has_chat_template:
            log.warning(
                "%s has no chat template: a chat is answered by plain continuation of its messages",
                self.settings.model,
            )
        self.service.start()
        warm = asyncio.create_task(self._warm_up())
        try:
            yield
        finally:
            await self.service.close()
            warm.cancel()
            await asyncio.gather(warm, return_exceptions=True)

    async def _warm_up(self) -> None:
        try:
            if self.tokenizer.has_chat_template:  # transformers takes seconds to import
                await asyncio.to_thread(self.tokenizer.prepare_chat)
            prompt = self.reader.encode("a")[: self.positions - 1]
            await self.service.warm_up(prompt or [0])
            log.info("%s is ready", self.settings.model)
        except Exception:
            log.exception("the first answer failed; the server stays not ready")

    def model(self) -> shapes.Model:
        return shapes.Model(
            id=self.settings.model,
            created=self._created,
            max_model_len=self.positions,
            chat_template=self.tokenizer.has_chat_template,
        )

    def check_model(self, name: str | None) -> None:
        ours = self.settings.model
        if name not in (None, ours):
            message = f"there is no model {name!r} here; this server has {ours!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def complete(self, ask: CompletionAsk) -> Reply:
        self.check_model(ask.model)
        prompts = await asyncio.to_thread(self.reader.completion, ask)
        echoes = [
            self.reader.echo(p) if ask.echo else "" for p in prompts for _ in range(ask.n or 1)
        ]
        writer = Completions(self.settings.model, self.tokenizer, ask.logprobs, echoes)
        return self._reply(ask, prompts, ask.logprobs, writer)

    async def chat(self, ask: ChatAsk) -> Reply:
        self.check_model(ask.model)
        prompts = await asyncio.to_thread(self.reader.chat, ask)
        top = (ask.top_logprobs or 0) if ask.logprobs else None
        writer = Chats(self.settings.model, self.tokenizer, top, [""] * (ask.n or 1))
        headers = {} if self.tokenizer.has_chat_template else PLAIN_CHAT
        return self._reply(ask, prompts, top, writer, headers)

    def _reply(
        self,
        ask: Ask,
        prompts: list[Prompt],
        logprobs: int | None,
        writer: Chats | Completions,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        if len(prompts) > self._queue:
            raise ApiError(400, f"at most {self._queue} prompts in one call", "prompt")
        call = Call(
            prompts=[prompt.ids for prompt in prompts],
            sampling=self.reader.sampling(ask, self.reader.room(ask, prompts), logprobs),
            streams=bool(ask.stream),
            usage=ask.stream_options is not None and ask.stream_options.include_usage,
            timeout=self.settings.timeout,
        )
        return Reply(call, writer, self.service, self.metrics, headers or {})

    async def tokenize(self, ask: TokenizeAsk) -> shapes.Tokens:
        self.check_model(ask.model)
        tokens = await asyncio.to_thread(self.reader.tokenized, ask)
        return shapes.Tokens(tokens=tokens, count=len(tokens), max_model_len=self.positions)

    def live(self) -> shapes.Live:
        stats = self.service.stats
        counters = shapes.Live.model_fields.keys() & vars(stats).keys()
        return shapes.Live(
            model=self.settings.model,
            status=self.service.state,
            chat_template=self.tokenizer.has_chat_template,
            max_model_len=self.positions,
            tokens_per_second=round(self.metrics.rate.now(), 2),
            **{name: getattr(stats, name) for name in counters},
        )


def _add_routes(app: FastAPI, server: Server) -> None:
    _add_openai(app, server)
    _add_ours(app, server)
    if (PAGE / "index.html").is_file():
        app.mount("/page", StaticFiles(directory=PAGE), name="page")

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")


def _add_openai(app: FastAPI, server: Server) -> None:
    line = {"data": {"type": "string"}}  # JSON of a chunk or an error, at last [DONE]
    event = {"type": "object", "properties": line, "required": ["data"]}
    events: dict[str, Any] = {"text/event-stream": {"itemSchema": event}}
    streams: Responses = {**PROBLEMS, 200: {"content": events}}

    @app.get("/v1/models", responses=KEY)
    async def models() -> shapes.Models:
        return shapes.Models(data=[server.model()])

    @app.get("/v1/models/{name:path}", responses=KEY | {404: PROBLEMS[404]})
    async def model(name: str) -> shapes.Model:
        server.check_model(name)
        return server.model()

    @app.post("/v1/completions", response_model=shapes.Completion, responses=streams)
    async def completions(ask: CompletionAsk) -> Response:
        return await server.complete(ask)

    @app.post("/v1/chat/completions", response_model=shapes.Chat, responses=streams)
    async def chat_completions(ask: ChatAsk) -> Response:
        return await server.chat(ask)


def _add_ours(app: FastAPI, server: Server) -> None:
    body: Responses = {status: PROBLEMS[status] for status in (400, 401, 404, 408, 413, 500, 503)}

    @app.post("/tokenize", responses=body)
    async def tokenize(ask: TokenizeAsk) -> shapes.Tokens:
        return await server.tokenize(ask)

    @app.post("/detokenize", responses=body)
    async def detokenize(ask: DetokenizeAsk) -> shapes.Text:
        server.check_model(ask.model)
        return shapes.Text(prompt=await asyncio.to_thread(server.tokenizer.decode, ask.tokens))

    @app.get("/health", responses={503: {"model": shapes.Health, "description": "Not ready."}})
    async def health(response: Response) -> shapes.Health:
        response.status_code = 200 if server.service.healthy else 503
        return shapes.Health(status=server.service.state)

    @app.get("/stats")
    async def stats() -> shapes.Live:
        return server.live()

    metrics_text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=KEY | metrics_text)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)


def _described(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """FastAPI's description, with the errors that are really sent: 400, never 422."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        parts = found.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        if settings.api_key is not None:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
