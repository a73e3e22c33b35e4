"""`hymba chat MODEL`: talk to a model in the terminal.

Answers stream to standard output; everything about them (facts, notices, mistakes) goes to standard
error. Nothing is written anywhere but by /save. With input piped in, each line is a message.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine import Sampling
    from hymba.engine.engine import Engine
    from hymba.tokenizer import Tokenizer

EXAMPLES = (
    "nvidia/Hymba-1.5B-Instruct",
    'runs/demo/hymba --system "You are brief." --temperature 0',
    "runs/demo/hymba < questions.txt > answers.txt",
)
HELP = """\
/new           start a new conversation
/system TEXT   tell the model this before the conversation (- nothing; no TEXT: show it)
/save FILE     write the conversation as JSON
/load FILE     go on with one that was saved here or exported from the chat page
/stats         what the engine has done, and its cache
/exit          leave (Ctrl-D too)
Ctrl-C stops an answer; what was said stays. A \\ at the end of a line goes on in the next one.
A message that begins with / needs a space in front."""
ROLES = ("system", "user", "assistant")
PATIENCE = 3  # Ctrl-C so often during one answer ends the program, wherever it is
# A model may say anything, escape sequences of terminals too: those are not obeyed.
UNSEEN = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


@dataclass(frozen=True)
class Options:
    """Talk to a model. Type a message; /help tells the commands."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""
    system: str = ""
    """Told to the model before the conversation."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens (0: all)."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Choose among tokens at least so likely, as a share of the likeliest."""
    seed: int | None = None
    """The same seed and messages give the same answers."""
    device: str | None = None
    """cpu, cuda, ...; without it a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, ...; without it the checkpoint's own."""
    kv_dtype: Annotated[str | None, tyro.conf.arg(metavar="{bfloat16,float32}")] = None
    """Keys and values in the cache, on a CPU: bfloat16 halves them; without it the model's."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME")] = None
    """int8, int4 or fp8: the matrices in few bits (a folder made by `hymba quantize` has them)."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "chat", EXAMPLES)
    from hymba.engine import LLM, Limits, Sampling

    names = "max_tokens temperature top_k top_p min_p seed".split()
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    choose_threads(options.threads)
    alone = Limits(max_sequences=1, kv_dtype=options.kv_dtype)
    with bar() as progress:
        llm = LLM(
            options.model,
            device=options.device,
            dtype=options.dtype,
            limits=alone,
            quantize=options.quantize,
            progress=progress,
        )
    tokenizer = llm.tokenizer_or_error()
    if tokenizer.has_chat_template:
        tokenizer.prepare_chat()  # takes seconds, and is not the first answer's time
    ends = llm.model.config.eos_token_id, tokenizer.eos_id  # chat models may end turns with either
    sampling = replace(sampling, stop_ids=tuple({end for end in ends if end is not None}))
    chat = Chat(llm.engine, tokenizer, sampling, Conversation(options.system))
    chat.greet(options.model)
    return chat.talk() if sys.stdin.isatty() else chat.read()


@dataclass
class Conversation:
    """A system text, and messages {"role", "content"} that take turns, a user's first."""

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    known: list[int] = field(default_factory=list)  # ids up to the last answer's end, as computed

    def all(self) -> list[dict[str, str]]:
        told = [{"role": "system", "content": self.system}] if self.system else []
        return told + self.messages

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt: by the tokenizer's chat template, or else the bare texts. There an answer
        goes on where its message ended, as it was said; what people say begins a line."""
        if tokenizer.has_chat_template:
            return tokenizer.chat(self.all())
        text = ""
        for message in self.all():
            line = "\n" if text and message["role"] != "assistant" else ""
            text += line + message["content"]
        # A model may say a text in other tokens than the tokenizer's. Where its own tokens give
        # the same text they are taken, since their state is in the prefix cache.
        exact = self.known + tokenizer.encode("\n" + self.messages[-1]["content"])
        if self.known and tokenizer.decode(exact) == text:
            return exact
        return tokenizer.encode(text, bos=tokenizer.bos_id is not None)

    def save(self, path: Path) -> None:
        content = json.dumps({"messages": self.all()}, indent=2, ensure_ascii=False)
        try:
            path.write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'cannot be written'}") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'cannot be read'}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        messages = content.get("messages") if isinstance(content, dict) else content
        if not (isinstance(messages, list) and all(map(_is_message, messages))):
            shape = '{"messages": [{"role": ..., "content": ...}, ...]}'
            raise UserError(f"{path} holds no conversation: {shape}")
        told = [m["content"] for m in messages if m["role"] == "system"]
        said = [m for m in messages if m["role"] != "system"]
        if any(m["role"] != ROLES[1 + i % 2] for i, m in enumerate(said)):
            raise UserError(f"{path}: the roles must take turns, user and assistant")
        if len(said) % 2:  # its answer never came
            said.pop()
        return cls("\n".join(told), [{"role": m["role"], "content": m["content"]} for m in said])


def _is_message(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and found.get("role") in ROLES
        and isinstance(found.get("content"), str)
    )


class Chat:
    """The terminal's side: reads lines, does commands, shows answers as they come."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, conversation: Conversation
    ) -> None:
        from rich.console import Console

        self.engine, self.tokenizer, self.sampling = engine, tokenizer, sampling
        self.conversation = conversation
        self._aside = Console(stderr=True, highlight=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/new": self._new,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
        }

    def greet(self, model: str) -> None:
        if sys.stdin.isatty():
            self._say(f"{model}: type a message, or /help")
        if not self.tokenizer.has_chat_template:
            self._say("no chat template: this model continues the conversation as plain text")

    # ---- where messages come from

    def talk(self) -> int:
        """A person's lines, until Ctrl-D, /exit, or Ctrl-C twice at the prompt."""
        warned = False
        while True:
            try:
                line = _ask()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                if warned:
                    return 0
                self._say("Ctrl-C again leaves, /save FILE keeps the conversation")
                warned = True
                continue
            warned = False
            if line.strip() == "/exit":
                return 0
            self._obey(line)

    def read(self) -> int:
        """A line of standard input each; 2 if one of them was a mistake."""
        right = True
        for line in sys.stdin:
            if line.strip() == "/exit":
                break
            right &= self._obey(line.rstrip("\n"))
        return 0 if right else 2

    def _obey(self, line: str) -> bool:
        """Do what a line asks; whether it could be done."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self.answer(line[line.startswith(" /") :])
            return True
        except UserError as error:
            self._aside.print(f"error: {' '.join(str(error).split())}", style="red", markup=False)
            return False

    # ---- answers

    def answer(self, message: str) -> None:
        """Say `message` and show what comes back. A stopped answer stays as far as it went; where
        nothing was said, the message is taken back too, so that the roles take turns."""
        conversation = self.conversation
        conversation.messages.append({"role": "user", "content": message})
        facts, said = _Facts(), ""
        tokens: list[int] = []
        try:
            with _interruptible() as interrupted:
                ids = conversation.ids(self.tokenizer)
                for delta in _steps(self.engine, ids, self.sampling, interrupted):
                    facts.saw(delta)
                    said += delta.text
                    tokens += delta.tokens
                    print(delta.text.translate(UNSEEN), end="", flush=True)
        finally:
            if said:
                conversation.messages.append({"role": "assistant", "content": said})
                conversation.known = ids + tokens
            else:
                conversation.messages.pop()
        print(flush=True)
        self._say(f"{facts.line()}{'' if said else ' · nothing said: the message is not kept'}")

    # ---- commands

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise UserError(
                f"there is no command {name}; /help tells them, a space in front makes it a message"
            )
        self._commands[name](rest.strip())

    def _new(self, _: str) -> None:
        self.conversation.messages.clear()
        self._say("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        self._say(f"system text: {self.conversation.system or '(none)'}")

    def _save(self, name: str) -> None:
        self.conversation.save(_path(name, "/save"))
        self._say(f"{len(self.conversation.messages)} messages written to {name}")

    def _load(self, name: str) -> None:
        self.conversation = Conversation.load(_path(name, "/load"))
        self._say(f"{len(self.conversation.messages)} messages read from {name}")

    def _stats(self, _: str) -> None:
        stats = self.engine.stats()
        self._say(
            f"{stats.prompt_tokens:,} prompt tokens, {stats.generated_tokens:,} said;"
            f" cache {stats.cache_bytes / 1e6:.1f} of {stats.cache_bytes_total / 1e6:.1f} MB;"
            f" prefix cache {stats.prefix_bytes / 1e6:.1f} MB, {stats.prefix_hits:,} hits,"
            f" {stats.prefix_hit_tokens:,} tokens"
        )

    def _say(self, text: str) -> None:
        sys.stdout.flush()
        self._aside.print(text, style="dim", markup=False)


def _path(name: str, command: str) -> Path:
    if not name:
        raise UserError(f"{command} needs a file: {command} chat.json")
    return Path(name).expanduser()


def _ask() -> str:
    """A person's next message, edited with the keys and the history of readline."""
    try:
        import readline  # noqa: F401  (input() then uses it)
    except ImportError:  # Windows
        pass
    lines = [input(_prompt("you"))]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(_prompt("...")))
    return "\n".join(lines)


def _prompt(word: str) -> str:
    """Bold where there are colours; \\1 and \\2 tell readline what has no width."""
    from rich.console import Console

    console = Console()
    if console.color_system is not None and not console.no_color:
        return f"\1\033[1m\2{word}>\1\033[0m\2 "
    return f"{word}> "


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While a person waits for an answer, Ctrl-C only sets a flag, given as a function: an
    exception in the middle of a step would leave the engine half done."""
    if not sys.stdin.isatty():  # there Ctrl-C ends the program, as everywhere
        yield lambda: False
        return
    presses = 0

    def press(number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses >= PATIENCE:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _steps(
    engine: Engine, ids: list[int], sampling: Sampling, interrupted: Callable[[], bool]
) -> Iterator[Any]:
    """The answer's deltas. The engine is stepped here, so that Ctrl-C is seen between the chunks of
    a long prompt too."""
    request = engine.add(ids, sampling)
    while not interrupted():
        for delta in engine.step():
            if delta.request is request:
                yield delta
                if delta.finish is not None:
                    return
    engine.cancel(request)


class _Facts:
    """Times an answer, for the line below it."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._first: float | None = None
        self._tokens, self._finish, self._request = 0, "stopped", None

    def saw(self, delta: Any) -> None:
        self._request, self._tokens = delta.request, self._tokens + len(delta.tokens)
        self._finish = delta.finish or self._finish
        if delta.tokens:
            self._last = time.perf_counter()
            self._first = self._first or self._last

    def line(self) -> str:
        words = [f"{self._tokens} token{'s' * (self._tokens != 1)}"]
        if self._first is not None:
            if self._last > self._first:
                words.append(f"{(self._tokens - 1) / (self._last - self._first):.1f} tokens/s")
            words.append(f"first after {self._first - self._start:.2f} s")
        if self._request is not None:
            cached, prompt = self._request.cached_tokens, len(self._request.prompt)
            words.append(f"{cached} of {prompt} prompt tokens from the prefix cache")
        if self._finish == "length":
            words.append("cut at --max-tokens or the model's last position")
        elif self._finish != "stop":
            words.append(self._finish)
        return " · ".join(words)
