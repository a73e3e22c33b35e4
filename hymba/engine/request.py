"""What is asked of the engine, and what a step gives back. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hymba.engine.sampling import Sampling


class Logprob(NamedTuple):
    """One token's log-probability under the model (before temperature, filters and penalties)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (token, log-probability), best first


@dataclass(eq=False)
class Request:
    """A prompt to be continued `sampling.n` times."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(slots=True)
class Delta:
    """What one step adds to one completion of a request."""

    request: Request
    index: int  # which of the request's n completions
    text: str = ""  # may lag behind the tokens: half a character, or what could begin a stop string
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    # "stop" (a stop id, which is not given out, or a stop string: the text ends before it, though
    # its tokens are given), "length" (max_tokens, or the last position), "error"; None: it goes on
    finish: str | None = None


@dataclass
class Completion:
    """What one prompt was answered with; `finish` as in `Delta`."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish = delta.finish


@dataclass
class Output:
    """Everything a request was answered with."""

    prompt: Sequence[int]
    completions: list[Completion]
    cached_tokens: int = 0

    @property
    def done(self) -> bool:
        return all(completion.finish is not None for completion in self.completions)

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def tokens(self) -> list[int]:
        return self.completions[0].tokens

    @property
    def finish(self) -> str | None:
        return self.completions[0].finish
