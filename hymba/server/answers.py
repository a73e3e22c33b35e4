"""Deltas of the engine made into answers: whole bodies, and chunks of a stream.

A `Writer` shapes what a call has said so far; `Chats` and `Completions` differ in nothing but
OpenAI's two ways to say it. No HTTP here.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

from pydantic import BaseModel

from hymba.engine.request import Completion, Logprob
from hymba.server import shapes
from hymba.tokenizer import Tokenizer


class Writer:
    """One call's answer. `index` counts choices: prompt by prompt, n for each."""

    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, top: int | None, echoes: Sequence[str]):
        """`top` likeliest tokens are told beside each token's log-probability; None: neither is.
        `echoes` stand in front of each choice's text."""
        self._tokenizer, self._top, self._echoes = tokenizer, top, echoes
        self._lengths = [len(echo) for echo in echoes]  # characters told, for offsets
        self._readers = [codecs.getincrementaldecoder("utf-8")("replace") for _ in echoes]
        self._begun: set[int] = set()
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, said: Sequence[Completion], usage: shapes.Usage) -> BaseModel:
        raise NotImplementedError

    def chunk(self, index: int, said: Completion) -> BaseModel | None:
        """What `said` adds to a stream; None where nothing can be shown yet."""
        first = index not in self._begun
        if not (first or said.text or said.finish or (said.logprobs and self._top is not None)):
            return None
        self._begun.add(index)
        return self._chunk(index, said, first)

    def last(self, usage: shapes.Usage) -> BaseModel:
        """The chunk that ends a stream with `include_usage`."""
        raise NotImplementedError

    def _chunk(self, index: int, said: Completion, first: bool) -> BaseModel:
        raise NotImplementedError

    # ---- tokens as text

    def _shown(self, token: int) -> str:
        """A token's text; where it is half a character its bytes, so that no two look alike."""
        content = self._tokenizer.token_bytes(token)
        if not content:
            return f"token_id:{token}"
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Completions(Writer):
    prefix = "cmpl"

    def whole(self, said: Sequence[Completion], usage: shapes.Usage) -> shapes.Completion:
        choices = [self._choice(i, one, first=True) for i, one in enumerate(said)]
        return shapes.Completion(**self._head, choices=choices, usage=usage)

    def last(self, usage: shapes.Usage) -> shapes.Completion:
        return shapes.Completion(**self._head, choices=[], usage=usage)

    def _chunk(self, index: int, said: Completion, first: bool) -> shapes.Completion:
        return shapes.Completion(**self._head, choices=[self._choice(index, said, first)])

    def _choice(self, index: int, said: Completion, first: bool) -> shapes.CompletionChoice:
        return shapes.CompletionChoice(
            index=index,
            text=(self._echoes[index] if first else "") + said.text,
            logprobs=None if self._top is None else self._logprobs(index, said.logprobs),
            finish_reason=cast(shapes.Finish | None, said.finish),
        )

    def _logprobs(self, index: int, logprobs: Iterable[Logprob]) -> shapes.CompletionLogprobs:
        shown = shapes.CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._top else None, text_offset=[]
        )
        for one in logprobs:
            text = self._shown(one.token)
            shown.tokens.append(text)
            shown.token_logprobs.append(one.logprob)
            shown.text_offset.append(self._lengths[index])
            if one.token not in self._tokenizer.special_ids:  # those are not in the text
                content = self._tokenizer.token_bytes(one.token)
                self._lengths[index] += len(self._readers[index].decode(content))
            if shown.top_logprobs is not None:
                likeliest = {self._shown(token): value for token, value in one.top}
                shown.top_logprobs.append(likeliest | {text: one.logprob})
        return shown


class Chats(Writer):
    prefix = "chatcmpl"

    def whole(self, said: Sequence[Completion], usage: shapes.Usage) -> shapes.Chat:
        choices = [
            shapes.ChatChoice(
                index=index,
                message=shapes.ChatMessage(content=one.text),
                logprobs=self._logprobs(one.logprobs),
                finish_reason=cast(shapes.Finish, one.finish),
            )
            for index, one in enumerate(said)
        ]
        return shapes.Chat(**self._head, choices=choices, usage=usage)

    def last(self, usage: shapes.Usage) -> shapes.ChatChunk:
        return shapes.ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, index: int, said: Completion, first: bool) -> shapes.ChatChunk:
        text = said.text if said.text or first else None
        choice = shapes.ChatDeltaChoice(
            index=index,
            delta=shapes.ChatDelta(role="assistant" if first else None, content=text),
            logprobs=self._logprobs(said.logprobs) if said.logprobs else None,
            finish_reason=cast(shapes.Finish | None, said.finish),
        )
        return shapes.ChatChunk(**self._head, choices=[choice])

    def _logprobs(self, logprobs: Iterable[Logprob]) -> shapes.ChatLogprobs | None:
        if self._top is None:
            return None
        content = []
        for one in logprobs:
            top = [self._top_logprob(token, value) for token, value in one.top[: self._top]]
            shown = self._top_logprob(one.token, one.logprob).model_dump()
            content.append(shapes.TokenLogprob(**shown, top_logprobs=top))
        return shapes.ChatLogprobs(content=content)

    def _top_logprob(self, token: int, logprob: float) -> shapes.TopLogprob:
        return shapes.TopLogprob(
            token=self._shown(token),
            logprob=logprob,
            bytes=list(self._tokenizer.token_bytes(token)),
        )
