"""Texts in, texts out: a model, its tokenizer and an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hymba.engine.engine import Engine
from hymba.engine.limits import Limits
from hymba.engine.request import Completion, Delta, Output, Request
from hymba.engine.sampling import Sampling
from hymba.errors import UserError
from hymba.hub import find
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.weights import load

Prompt = str | Sequence[int]


class LLM:
    """A model ready to answer, many prompts at a time.

        llm = LLM("folder or hub id")
        for output in llm.generate(["def fibonacci(n):"], Sampling(max_tokens=64)):
            print(output.text)

    Not for several threads at once: a server has `hymba.engine.service.Service`."""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        limits: Limits | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        """`device`: a GPU where there is one; `dtype`: the checkpoint's own. A model that is loaded
        already stays what and where it is; its tokenizer is in the folder it came from."""
        if isinstance(model, LanguageModel):
            folder = model.folder
        else:
            folder = find(model)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = load(folder, device, dtype)
        self.model = model
        self.tokenizer = tokenizer or _tokenizer_of(folder)
        self.engine = Engine(model, self.tokenizer, limits)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> Iterator[Output]:
        """Continue each prompt (text, or token ids); one `Sampling` for all or one each. Outputs
        come in the prompts' order, each as soon as it and those before it are done.

        Raises UserError before anything is computed where a prompt cannot be served."""
        if isinstance(prompts, str):
            raise UserError('prompts is a list: generate(["one prompt"])')
        each = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts but {len(each)} samplings: give one, or one each"
            )
        return self._generate([self.encode(prompt) for prompt in prompts], each)

    def _generate(
        self, prompts: list[list[int]], each: Sequence[Sampling | None]
    ) -> Iterator[Output]:
        todo = list(zip(prompts, each, strict=True))[::-1]
        outputs: dict[Request, Output] = {}
        try:
            while todo or outputs:
                while todo and len(self.engine.scheduler.waiting) < self.engine.limits.queue:
                    request = self.engine.add(*todo.pop())
                    outputs[request] = Output(
                        request.prompt, [Completion() for _ in range(request.sampling.n)]
                    )
                for delta in self.engine.step():
                    if delta.request in outputs:
                        outputs[delta.request].completions[delta.index].add(delta)
                while outputs and outputs[first := next(iter(outputs))].done:
                    yield _done(first, outputs.pop(first))
        finally:  # left early: nobody waits for the rest
            for request in outputs:
                self.engine.cancel(request)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None
    ) -> Output:
        """Answer a conversation in the model's own chat format."""
        return next(self._generate([self.tokenizer_or_error().chat(messages)], [sampling]))

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Delta]:
        """Continue one prompt, a delta at a time."""
        request = self.engine.add(self.encode(prompt), sampling)
        left = request.sampling.n
        try:
            while left:
                for delta in self.engine.step():
                    if delta.request is request:
                        left -= delta.finish is not None
                        yield delta
        finally:
            self.engine.cancel(request)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a text as prompts begin: with the model's first token, where it has one."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self.tokenizer_or_error()
        return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)

    def tokenizer_or_error(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: give token ids")
        return self.tokenizer


def _done(request: Request, output: Output) -> Output:
    output.cached_tokens = request.cached_tokens
    return output


def _tokenizer_of(folder: Path | None) -> Tokenizer | None:
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(folder)
