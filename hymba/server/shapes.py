"""What clients are answered, field by field as OpenAI names them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, model_serializer

from hymba.engine.service import State

# "stop": a stop id or string; "length": max_tokens or the model's last position
Finish = Literal["stop", "length"]


class CachedTokens(BaseModel):
    cached_tokens: int  # of the prompt, found in the prefix cache


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hymba"
    max_model_len: int  # positions for prompt and answer
    chat_template: bool  # without one a chat is plain continuation of its messages


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


# ---- /v1/completions


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(BaseModel):
    """Whole, or a chunk of a stream; the chunk with `usage` has no choices."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# ---- /v1/chat/completions


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None  # in a choice's first chunk
    content: str | None = None

    @model_serializer
    def _without_none(self) -> dict[str, str]:
        both = {"role": self.role, "content": self.content}
        return {name: value for name, value in both.items() if value is not None}


class ChatDeltaChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDeltaChoice]
    usage: Usage | None = None


# ---- our own


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: State


class Replicas(BaseModel):
    wanted: int
    ready: int
    names: list[str]  # of the ready ones; /metrics and the header x-hymba-replica have them too


class FleetHealth(Health):
    replicas: Replicas


class Live(BaseModel):
    """For the page: what the engine does just now."""

    model: str
    status: State
    chat_template: bool
    max_model_len: int
    running: int
    waiting: int
    tokens_per_second: float
    cache_bytes: int
    cache_bytes_total: int
    prefix_bytes: int
    prefix_hits: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int


class FleetLive(Live):
    """The sums over all replicas."""

    replicas: Replicas
