"""Texts in, texts out: a model, its tokenizer and an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from numbers import Integral
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

    Several threads may share one: each steps for all. (A server has a thread for that,
    `hymba.engine.service.Service`.)"""

    def __init__(
        self,
        model: str | Path | LanguageModel,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        limits: Limits | None = None,
        tokenizer: Tokenizer | None = None,
        quantize: str | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
    ):
        """`device`: a GPU where there is one; `dtype`, `quantize`, `progress`: as `hymba.load` has
        them. A model that is loaded already stays what and where it is; its tokenizer is in the
        folder it came from."""
        if isinstance(model, LanguageModel):
            folder = model.folder
        else:
            folder = find(model)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = load(folder, device, dtype, quantize, progress)
        self.model = model
        self.tokenizer = tokenizer or _tokenizer_of(folder)
        self.engine = Engine(model, self.tokenizer, limits)
        # What was said and not yet taken, so that several generators may be read in turns, and in
        # several threads.
        self._said: dict[Request, list[Delta]] = {}
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> Iterator[Output]:
        """Continue each prompt (text, or token ids); one `Sampling` for all or one each. Outputs
        come in the prompts' order, each as soon as it and those before it are done.

        Raises UserError where a prompt cannot be served: no output after it is given."""
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
        with closing(self.run(zip(prompts, each, strict=True))) as found:
            yield from in_order(found)

    def run(
        self,
        asked: Iterable[tuple[Prompt, Sampling | None]],
        after_step: Callable[[], object] | None = None,
    ) -> Generator[tuple[int, Output | UserError], None, None]:
        """Continue prompts of any number, taken as the engine has room for them: (place in
        `asked`, output), each as soon as it is done. One that cannot be served has its UserError
        there, and the others go on. `after_step` is called between the engine's steps, where it
        may end the run with an exception."""
        source, running = enumerate(asked), dict[Request, tuple[int, Output]]()
        # As many may wait as run: then no place is empty, and each step looks at few.
        most = max(1, min(self.engine.limits.queue, self.engine.room.sequences))
        waiting = self.engine.scheduler.waiting
        more = True
        try:
            while more or running:
                while more and len(waiting) < most:
                    found = next(source, None)
                    more = found is not None
                    if found is not None:
                        index, (prompt, sampling) = found
                        try:
                            request = self._ask(prompt, sampling)
                        except UserError as error:
                            yield index, error
                            continue
                        completions = [Completion() for _ in range(request.sampling.n)]
                        running[request] = index, Output(request.prompt, completions)
                self._step()
                for request in self._done(running):
                    self._forget(request)
                    yield running.pop(request)
                if after_step is not None:
                    after_step()
        finally:  # left early: nobody waits for the rest
            for request in running:
                self._forget(request)

    def _done(self, running: Mapping[Request, tuple[int, Output]]) -> list[Request]:
        """Take what was said to these, and tell who is done."""
        done = []
        for request in [request for request in running if self._said[request]]:
            _, output = running[request]
            for delta in self._take(request):
                output.completions[delta.index].add(delta)
            if output.done:
                output.cached_tokens = request.cached_tokens
                done.append(request)
        return done

    def _ask(self, prompt: Prompt, sampling: Sampling | None) -> Request:
        tokens = self.encode(prompt)
        with self._lock:
            request = self.engine.add(tokens, sampling)
            self._said[request] = []
        return request

    def _step(self) -> None:
        with self._lock:
            for delta in self.engine.step():
                if delta.request in self._said:
                    self._said[delta.request].append(delta)

    def _take(self, request: Request) -> list[Delta]:
        with self._lock:
            said, self._said[request] = self._said[request], []
        return said

    def _forget(self, request: Request) -> None:
        with self._lock:
            del self._said[request]
            self.engine.cancel(request)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None
    ) -> Output:
        """Answer a conversation in the model's own chat format."""
        return next(self._generate([self.tokenizer_or_error().chat(messages)], [sampling]))

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Delta]:
        """Continue one prompt, a delta at a time."""
        request = self._ask(prompt, sampling)
        left = request.sampling.n
        try:
            while left:
                if not self._said[request]:
                    self._step()
                for delta in self._take(request):
                    left -= delta.finish is not None
                    yield delta
        finally:
            self._forget(request)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a text as prompts begin: with the model's first token, where it has one."""
        if not isinstance(prompt, str):
            return _ids(prompt)
        tokenizer = self.tokenizer_or_error()
        return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)

    def tokenizer_or_error(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: give token ids")
        return self.tokenizer


def _ids(prompt: Sequence[int]) -> list[int]:
    """Token ids from any sequence of whole numbers; of bytes too, but those are a text's."""
    found = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    if isinstance(found, Iterable) and not isinstance(found, bytes | bytearray):
        ids = list(found)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids):
            return ids
    raise UserError(f"a prompt is a text or a list of token ids, got {repr(prompt)[:60]}")


def in_order(done: Iterable[tuple[int, Output | UserError]]) -> Iterator[Output]:
    """What `LLM.run` gives, in the order in which it was asked. An error is raised at once."""
    early: dict[int, Output] = {}
    turn = 0
    for index, output in done:
        if isinstance(output, UserError):
            raise output
        early[index] = output
        while turn in early:
            yield early.pop(turn)
            turn += 1


def _tokenizer_of(folder: Path | None) -> Tokenizer | None:
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(folder)
