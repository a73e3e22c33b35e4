"""What a call means for the engine: token ids and a `Sampling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hymba.engine.sampling import Sampling
from hymba.server.errors import ApiError
from hymba.server.protocol import Ask, ChatAsk, CompletionAsk, Message, TokenizeAsk, Tool
from hymba.server.settings import MAX_CHOICES, Settings
from hymba.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on while there is room


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None  # where it came as one


@dataclass(frozen=True)
class Reader:
    """Reads calls for one model: its tokenizer, its positions, the server's settings."""

    tokenizer: Tokenizer
    settings: Settings
    positions: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    # ---- prompts

    def completion(self, ask: CompletionAsk) -> list[Prompt]:
        given = self._prompts(ask.prompt)
        if len(given) * (ask.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"at most {MAX_CHOICES} completions in one call (prompts x n)", "n")
        return [Prompt(self._fitting(ids, "prompt"), text) for ids, text in given]

    def _prompts(self, prompt: str | Sequence[Any]) -> list[Prompt]:
        if isinstance(prompt, str):
            return [Prompt(self.encode(prompt), prompt)]
        if isinstance(prompt[0], int):
            return [Prompt([int(token) for token in prompt], None)]
        if len(prompt) > MAX_CHOICES:
            raise ApiError(400, f"at most {MAX_CHOICES} prompts in one call", "prompt")
        return [one for part in prompt for one in self._prompts(part)]

    def echo(self, prompt: Prompt) -> str:
        return self.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text

    def chat(self, ask: ChatAsk) -> list[Prompt]:
        tools = None if ask.tool_choice == "none" else ask.tools
        return [Prompt(self._fitting(self.conversation(ask.messages, tools), "messages"), None)]

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """Ids of a conversation: by the folder's template, or else as plain text."""
        plain = [_plain(message) for message in messages]
        if self.tokenizer.has_chat_template:
            described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
            return self.tokenizer.chat(plain, tools=described)
        return self.encode(_continued(plain))

    def tokenized(self, ask: TokenizeAsk) -> list[int]:
        if ask.messages is not None:
            return self.conversation(ask.messages, ask.tools)
        text = ask.prompt or ""
        return self.encode(text) if ask.add_special_tokens else self.tokenizer.encode(text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None)

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        most = min(self.positions - 1, self.settings.max_prompt_tokens or self.positions)
        if not ids:
            raise ApiError(400, f"{param} is empty: a sequence begins with a token", param)
        if len(ids) > most:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens; this server takes {most} (the model has"
                f" {self.positions} positions for prompt and answer)",
                param,
                "context_length_exceeded",
            )
        bad = next((token for token in ids if token >= self.vocab_size), None)
        if bad is not None:
            raise ApiError(
                400, f"token id {bad} is outside the vocabulary (0 to {self.vocab_size - 1})", param
            )
        return ids

    # ---- sampling

    def sampling(self, ask: Ask, max_tokens: int, logprobs: int | None) -> Sampling:
        """The call's fields, else the folder's generation_config.json's, else OpenAI's."""
        chosen: dict[str, Any] = {"temperature": 1.0} | dict(self.settings.defaults)
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
        given = {name: getattr(ask, name) for name in names}
        chosen |= {name: value for name, value in given.items() if value is not None}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # -1 is another way to say "all"
        return Sampling(
            max_tokens=max_tokens,
            n=ask.n or 1,
            presence_penalty=ask.presence_penalty or 0.0,
            frequency_penalty=ask.frequency_penalty or 0.0,
            logit_bias=self._bias(ask.logit_bias or {}),
            seed=None if ask.seed is None else ask.seed % (1 << 63),
            stop=(ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop or ()),
            stop_ids=self._stop_ids(ask),
            logprobs=logprobs,
            **_grammar(ask),
            **chosen,
        )

    def _bias(self, bias: Mapping[str, float]) -> dict[int, float]:
        wrong = next((token for token in bias if int(token) >= self.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"token id {wrong} is outside the vocabulary", "logit_bias")
        return {int(token): value for token, value in bias.items()}

    def _stop_ids(self, ask: Ask) -> tuple[int, ...]:
        return (*(() if ask.ignore_eos else self.eos_ids), *(ask.stop_token_ids or ()))

    def room(self, ask: Ask, prompts: Sequence[Prompt]) -> int:
        """How many tokens a call asks for."""
        if isinstance(ask, ChatAsk):
            longest = self.positions - len(prompts[0].ids)
            return ask.max_completion_tokens or ask.max_tokens or longest
        return ask.max_tokens or COMPLETION_TOKENS


def _continued(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as one text to be continued; no format is made up. An answer goes on where
    its message ended, as it was said; whatever else is said begins a line."""
    text = ""
    for message in messages:
        line = "\n" if text and message["role"] != "assistant" else ""
        text += line + message["content"]
    return text


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: its content is a text."""
    fields = message.model_dump(exclude_none=True, exclude={"refusal"})
    if not isinstance(message.content, str):
        fields["content"] = "".join(part.text for part in message.content or ())
    if message.role == "developer":  # the newer name
        fields["role"] = "system"
    return fields


def _grammar(ask: Ask) -> dict[str, Any]:
    if ask.regex is not None:
        return {"regex": ask.regex}
    match ask.response_format:
        case None:
            return {}
        case form if form.type == "json_object":
            return {"json_object": True}
        case form if form.json_schema is not None:
            return {"json_schema": form.json_schema.schema_}
    return {}
