"""The batch job of `hymba generate --file`: questions of a file in, a line of JSON for each out.

Lines come in the order in which answers are done. Each is written whole, at once, so that a job
that was killed can be gone on with: what the file answers already is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

from hymba.commands.generate_lines import Question, Questions, number_of
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine import LLM, Completion, Output, Sampling
    from hymba.engine.llm import Prompt

SOME_FAILED = 3  # exit code: done, but some lines could not be answered
INTERRUPTED = 130
HEAD = b'{"id": '  # every line begins so
LEAST = -9999.0  # of log-probabilities: JSON has no infinity
REPORT = 30.0  # seconds between lines of progress, where there is no terminal
REFRESH = 0.2  # seconds between changes of the bar


class Job:
    """Questions, a model, and where the answers go."""

    def __init__(self, questions: Questions, answers: Answers) -> None:
        self.questions, self.answers = questions, answers
        self.answered = self.failed = self.before = 0
        self._waiting: dict[int, Question] = {}

    def run(self, llm: LLM, name: str, overwrite: bool = False) -> int:
        """Ask everything that has no answer yet; the exit code."""
        self.answers.begin(f"{name}@{fingerprint(llm)}", overwrite)
        meter = Meter(self._left(), lambda: llm.engine.stats().generated_tokens)
        with interruptible() as interrupted, meter:

            def after_step() -> None:
                meter.tick(self.answered + self.failed)
                if interrupted():
                    raise KeyboardInterrupt

            try:
                asked = self._asked(llm, interrupted)
                for index, output in llm.run(asked, after_step):
                    self._answer(self._waiting.pop(index), output)
                stopped = False
            except KeyboardInterrupt:
                stopped = True
        return self._end(meter, stopped)

    def _left(self) -> int | None:
        """Questions without an answer, where they can be counted. Refuses what was asked with
        other settings before anything is computed."""
        if not self.questions.again:
            return None
        if not self.answers.known:
            return self.questions.count()
        return sum(not self.answers.has(question) for question in self.questions)

    def _asked(
        self, llm: LLM, interrupted: Callable[[], bool]
    ) -> Iterator[tuple[Prompt, Sampling | None]]:
        ends, place = _ends(llm), 0
        for question in self.questions:
            if interrupted():
                raise KeyboardInterrupt
            if question.error is None and self.answers.has(question):
                self.before += 1
                continue
            try:
                prompt, sampling = _prompt(question, llm, ends)
            except UserError as error:
                self._answer(question, error)
                continue
            self._waiting[place] = question
            place += 1
            yield prompt, sampling

    def _answer(self, question: Question, output: Output | UserError) -> None:
        if isinstance(output, UserError):
            self.failed += 1
            self.answers.mistake(question, output)
        else:
            self.answered += 1
            self.answers.answer(question, output)

    def _end(self, meter: Meter, stopped: bool) -> int:
        meter.done = self.answered + self.failed
        parts = [f"{self.answered:,} answered"]
        parts += [f"{self.before:,} answered before"] if self.before else []
        errors = f'{self.failed:,} could not be: see "error" in {self.answers.name}'
        parts += [errors] if self.failed else []
        print(f"{', '.join(parts)} ({meter.rates()})", file=sys.stderr)
        if stopped:
            on = "the same command goes on" if self.answers.kept else "nothing is kept to go on"
            print(f"hymba: interrupted; {on}", file=sys.stderr)
            return INTERRUPTED
        return SOME_FAILED if self.failed else 0


def _ends(llm: LLM) -> tuple[int, ...]:
    """Chat models may end turns with the config's token, or the tokenizer's."""
    said = llm.tokenizer.eos_id if llm.tokenizer is not None else None
    ends = llm.model.config.eos_token_id, said
    return tuple({end for end in ends if end is not None})


def _prompt(question: Question, llm: LLM, ends: tuple[int, ...]) -> tuple[Prompt, Sampling]:
    if question.error is not None:
        raise UserError(question.error)
    sampling = question.sampling
    if question.messages is None:
        assert question.prompt is not None
        return question.prompt, sampling
    if sampling.stop_ids is None:
        sampling = replace(sampling, stop_ids=ends)
    return llm.tokenizer_or_error().chat(question.messages), sampling


class Answers:
    """The file that answers go to, and which questions it answers already."""

    def __init__(self, name: str, source: str) -> None:
        """OSError where it cannot be written. `source`: the questions' file, another one."""
        self.name = "standard output" if name == "-" else name
        if name != "-" and os.path.exists(name) and os.path.exists(source):
            if os.path.samefile(name, source):
                raise UserError(f"--file and --out are the same file, {name}")
        self._file: BinaryIO = sys.stdout.buffer
        if name != "-":  # unbuffered: a line is one call, so that no signal comes in between
            self._file = open(name, "a+b", buffering=0)
        # Of a pipe or a terminal nothing can be read again.
        self.kept = name != "-" and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        self._model, self._size = "", 0
        self._answered: dict[int, int] = {}  # id: what was asked
        self._mistakes: set[int] = set()

    def close(self) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()

    @property
    def known(self) -> bool:
        """Whether anything is answered already."""
        return bool(self._answered)

    def begin(self, model: str, overwrite: bool = False) -> None:
        """Learn what is answered already. UserError where it was by another model."""
        self._model = model
        if not self.kept:
            return
        _lock(self._file, self.name)
        if overwrite:
            self._file.truncate(0)
            return
        with open(self.name, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.endswith(b"\n"):
                    self._learn(raw, number)
                elif not (raw.startswith(HEAD) or HEAD.startswith(raw)):
                    raise self._foreign(number)
                else:  # a kill or a full disk cut it
                    self._file.truncate(self._size)
                    break
                self._size += len(raw)

    def _learn(self, raw: bytes, number: int) -> None:
        try:
            line = json.loads(raw)
            name, model, asked = line["id"], line["model"], line["asked"]
            _, _, made = model.rpartition("@")
            known = int(asked, 16)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._foreign(number) from None
        if made != self._model.rpartition("@")[2]:
            raise UserError(
                f"{self.name} has answers of another model or dtype ({model}, now {self._model}):"
                " give another --out, or --overwrite"
            )
        if "error" in line:
            self._mistakes.add(number_of(name, asked))
        else:
            self._answered[number_of(name)] = known

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"{self.name} is not a file of answers (line {number}): give another --out, or"
            " --overwrite"
        )

    def has(self, question: Question) -> bool:
        """Whether it is answered. UserError where its id is, but of other words or settings."""
        known = self._answered.get(number_of(question.id))
        if known is None or question.error is not None:
            return False
        if known != int(question.asked, 16):
            raise UserError(
                f"{self.name} answers {json.dumps(question.id)} (line {question.number}) for other"
                " settings or another prompt: give another --out, or --overwrite"
            )
        return True

    def answer(self, question: Question, output: Output) -> None:
        ids = isinstance(question.prompt, list)
        each = [_completion(one, ids) for one in output.completions]
        answer = each[0] if len(each) == 1 else {"completions": each}
        self._write(question, {**answer, "prompt_tokens": len(output.prompt)})

    def mistake(self, question: Question, error: UserError) -> None:
        """A mistake that the file tells already is not told again."""
        if number_of(question.id, question.asked) not in self._mistakes:
            told = " ".join(str(error).split())
            self._write(question, {"error": told, "line": question.number})

    def _write(self, question: Question, content: dict[str, Any]) -> None:
        made = {"model": self._model, "asked": question.asked}
        line = json.dumps({"id": question.id, **content, **made}, ensure_ascii=False)
        raw = line.encode("utf-8") + b"\n"
        try:
            left = memoryview(raw)
            while left:
                left = left[self._file.write(left) :]
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.kept:
                self._file.truncate(self._size)
            reason = (error.strerror or "cannot be written").lower()
            on = "; the same command goes on once that is better" if self.kept else ""
            raise UserError(f"{self.name}: {reason}{on}") from error
        self._size += len(raw)


def _completion(one: Completion, ids: bool) -> dict[str, Any]:
    """What a line tells of a completion; its ids where the prompt was ids."""
    told: dict[str, Any] = {"text": one.text, "finish": one.finish, "tokens": len(one.tokens)}
    if ids:
        told["ids"] = one.tokens
    if one.logprobs:
        told["logprobs"] = [
            {
                "token": x.token,
                "logprob": _rounded(x.logprob),
                "top": [[token, _rounded(value)] for token, value in x.top],
            }
            for x in one.logprobs
        ]
    return told


def _rounded(logprob: float) -> float:
    return round(max(logprob, LEAST), 6)


def _lock(file: BinaryIO, name: str) -> None:
    """Two jobs that write one file would answer everything twice."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{name} is being written by another job") from None
    except OSError:  # a file system without locks
        return


def fingerprint(llm: LLM) -> str:
    """Another one for another model: of its config, its tokenizer, and some of every weight."""
    digest = hashlib.sha256(json.dumps(llm.model.config.to_dict(), sort_keys=True).encode())
    for name, content in sorted(llm.tokenizer.files.items()) if llm.tokenizer else ():
        digest.update(name.encode() + content)
    for name, weight in llm.model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only sets a flag, given as a function: an exception in the middle of a step
    would leave the engine half done. A second one ends the program wherever it is."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Meter:
    """How far a job is: a bar in a terminal, elsewhere a line now and then, on standard error."""

    def __init__(self, total: int | None, tokens: Callable[[], int]) -> None:
        self.total, self._tokens = total, tokens
        self._start = self._told = time.monotonic()
        self.done = 0
        self._bar: Any = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = BarColumn(), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tick(self, done: int) -> None:
        """`done` of the questions are."""
        self.done, now = done, time.monotonic()
        if now - self._told < (REPORT if self._bar is None else REFRESH):
            return
        self._told = now
        if self._bar is None:
            print(self.facts(), file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=done, description=self.facts())

    def facts(self) -> str:
        total = "" if self.total is None else f" of {self.total:,}"
        return f"{self.done:,}{total}, {self.rates()}{self._rest()}"

    def rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._start)
        return f"{self.done / seconds:.2f} requests/s, {self._tokens() / seconds:,.0f} tokens/s"

    def _rest(self) -> str:
        if not self.total or not self.done:
            return ""
        seconds = (time.monotonic() - self._start) * (self.total - self.done) / self.done
        hours, minutes = divmod(round(seconds / 60), 60)
        if hours:
            return f", {hours} h {minutes} min left"
        return f", {minutes} min left" if minutes > 1 else f", {seconds:.0f} s left"
