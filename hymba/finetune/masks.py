"""Examples as token ids, and which of them are learnt: what the assistant says and how it ends.

    <extra_id_0>System .. <extra_id_1>User \n hi \n <extra_id_1>Assistant \n yes </s>
    -100 ...........................................................-100     yes </s>

A chat is rendered whole, as inference renders it, and the answers are found in the text: by the
template's own `{% generation %}` marks, or, where it has none, between two renderings that
inference makes, the prompt of a turn and the chat after it. Where those are no beginnings of the
whole text (a template that rewrites earlier turns) the line is refused: a mask that is nearly right
would teach to speak for the user.

An answer ends with its end-of-turn token. Where a template writes none (NVIDIA's own), the end of
text is put behind the last answer of a chat, as that model was trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hymba.finetune.lines import Example, Message, Part
from hymba.finetune.settings import FinetuneError
from hymba.finetune.template import MARK
from hymba.tokenizer import Tokenizer

IGNORE = -100  # a label that is not learnt
Span = tuple[int, int]  # characters of a rendered chat: from, to


class Learnt(NamedTuple):
    """ids and labels, equally long; a label is its own id, or IGNORE."""

    ids: list[int]
    labels: list[int]


class Pair(NamedTuple):
    """A prompt and two ways to go on."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Encoder:
    """Turns examples into tokens, exactly as `hymba chat` and the server will."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hf = _for_transformers(tokenizer)
        template = self.hf.chat_template
        self._marked = isinstance(template, str) and MARK.search(template) is not None
        self.ends: set[int] = set()  # tokens that the answers of chats were seen to end with

    def learnt(self, example: Example) -> Learnt:
        """The example with its first answer to learn. FinetuneError names the line."""
        try:
            return self._learnt(example.prompt, example.answers[0], example.tools)
        except FinetuneError as error:
            raise FinetuneError(f"{example.where}: {error}") from None

    def pair(self, example: Example) -> Pair:
        """A preference. FinetuneError names the line."""
        try:
            both = [self._learnt(example.prompt, a, example.tools) for a in example.answers]
            sides = [_cut(one) for one in both]
            if sides[0][0] != sides[1][0]:
                raise FinetuneError("the prompt's tokens depend on the answer")
            if not example.is_preference:
                raise FinetuneError("there is no rejected answer")
        except FinetuneError as error:
            raise FinetuneError(f"{example.where}: {error}") from None
        return Pair(sides[0][0], sides[0][1], sides[1][1])

    # ---- text, without a template

    def _learnt(self, prompt: Part, answer: Part, tools: Any) -> Learnt:
        if isinstance(prompt, str) and isinstance(answer, str):
            asked = self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
            said = [*self._continued(prompt, answer), self._eos()]
            return Learnt(asked + said, [IGNORE] * len(asked) + said)
        assert isinstance(prompt, list) and isinstance(answer, list)
        return self._chat(prompt, answer, tools)

    def _continued(self, prompt: str, answer: str) -> list[int]:
        """Ids of `answer` as it goes on behind `prompt`, whose own ids stay what they are."""
        before, whole = (self.tokenizer.encode(text) for text in (prompt, prompt + answer))
        if whole[: len(before)] == before:
            return whole[len(before) :]
        # A token of the whole reaches over the border, but generation starts behind the prompt.
        # Encoded behind another text, because some tokenizers put a space before the first word.
        before, whole = (self.tokenizer.encode(text) for text in ("\n", "\n" + answer))
        if whole[: len(before)] != before:
            raise FinetuneError("prompt and completion share a token: move the space between them")
        return whole[len(before) :]

    def _eos(self) -> int:
        if self.tokenizer.eos_id is None:
            raise FinetuneError("the tokenizer names no eos_token in tokenizer_config.json")
        return self.tokenizer.eos_id

    # ---- chats

    def _chat(self, prompt: list[Message], answer: list[Message], tools: Any) -> Learnt:
        messages = prompt + answer
        text, spans = (
            self._marks(messages, tools) if self._marked else self._between(messages, tools)
        )
        if prompt:
            asked = self._render(prompt, tools, reply=True)
            if not text.startswith(asked):
                raise FinetuneError("the chat template renders the prompt alone in another way")
            spans = [(a, b) for a, b in spans if a >= len(asked)]
        spans = [(a, b) for a, b in spans if text[a:b].strip()]
        if not spans:
            raise FinetuneError("the chat template shows no answer")
        return self._tokens(text, spans)

    def _marks(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        """The chat and its answers, as the template marks them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.hf.chat_template,
                return_assistant_tokens_mask=True,
                **self.hf.special_tokens_map,
            )
        return texts[0], [(a, b) for a, b in spans[0]]

    def _between(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        """The chat and its answers: each from the end of its prompt to the end of its turn."""
        text = self._render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], tools, reply=True)
            after = text if i + 1 == len(messages) else self._render(messages[: i + 1], tools)
            if not (text.startswith(before) and text.startswith(after)):
                raise FinetuneError(
                    "the tokenizer's chat template writes a turn in another way once others follow,"
                    " so answers cannot be found in it: put {% generation %} marks around them in"
                    " the template, or give one answer a line"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: list[Message], tools: Any, reply: bool = False) -> str:
        with _refusals():
            text: str = self.hf.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=reply
            )
        return text

    def _tokens(self, text: str, spans: Sequence[Span]) -> Learnt:
        """Ids of `text`, learnt where a token lies in a span and not behind its end of turn."""
        spans = [self._without_rest(text, span) for span in spans]
        closed = self._ends_itself(text, spans[-1])
        if not closed:
            text = text[: spans[-1][1]]
        ids, offsets = self._encode(text)
        labels = [IGNORE] * len(ids)
        for start, end in spans:
            if any(a < start < b for a, b in offsets):
                raise FinetuneError("a token reaches from the prompt into the answer")
            for i, (a, b) in enumerate(offsets):
                if start <= a and b <= end and a < b:
                    labels[i] = ids[i]
        if not closed:
            ids, labels = [*ids, self._eos()], [*labels, self._eos()]
        self.ends.add(next(label for label in reversed(labels) if label != IGNORE))
        return Learnt(ids, labels)

    def _without_rest(self, text: str, span: Span) -> Span:
        """A span up to its end of turn: its last special token, or its last visible character. A
        template whose marks stop just before the end of text means that too."""
        start, end = span
        eos = self.hf.eos_token
        if eos and text.startswith(eos, end):
            return start, end + len(eos)
        ids, offsets = self._encode(text[start:end])
        special = [b for i, (_, b) in zip(ids, offsets, strict=True) if self._is_special(i)]
        return start, start + (special[-1] if special else len(text[start:end].rstrip()))

    def _ends_itself(self, text: str, span: Span) -> bool:
        ids, _ = self._encode(text[span[0] : span[1]])
        return self._is_special(ids[-1])

    def _is_special(self, token: int) -> bool:
        return token in self.tokenizer.special_ids or token == self.tokenizer.eos_id

    def _encode(self, text: str) -> tuple[list[int], list[Span]]:
        found = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]


def _cut(one: Learnt) -> tuple[list[int], list[int]]:
    """Prompt and answer of an example whose last part is its only learnt one."""
    first = next(i for i, label in enumerate(one.labels) if label != IGNORE)
    last = max(i for i, label in enumerate(one.labels) if label != IGNORE)
    if IGNORE in one.labels[first : last + 1]:
        raise FinetuneError("chosen and rejected must each be one answer: put the rest in prompt")
    return one.ids[:first], one.ids[first : last + 1]


def _for_transformers(tokenizer: Tokenizer) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return AutoTokenizer.from_pretrained(folder)


class _refusals:
    """What a template refuses, or breaks on, as one line: it is code of its folder."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from jinja2 import TemplateError

        if isinstance(error, (TemplateError, TypeError, ValueError)):
            raise FinetuneError(f"the chat template refuses it: {error}") from None


def longest(examples: Iterable[Learnt | Pair]) -> int:
    """Tokens of the longest one, 0 of none."""
    return max(map(length, examples), default=0)


def length(example: Learnt | Pair) -> int:
    """Tokens of an example; of a pair those of its longer side."""
    if isinstance(example, Pair):
        return len(example.prompt) + max(len(example.chosen), len(example.rejected))
    return len(example.ids)
