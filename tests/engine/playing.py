"""What the engine's tests share: playing a load while everything that is free is poisoned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hymba.engine import Completion, Engine, Limits, Request, Sampling, generate
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer

STEPS = 2000  # ten times what any test needs
PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
FREE = Sampling(max_tokens=8, stop_ids=())
Twin = Callable[..., Completion]
Prompt = Callable[..., list[int]]


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    sampling: Sampling
    arrives: int = 0  # at which step
    cancelled: int | None = None  # at which step


class Play:
    """Serves what is asked, step by step. What others might have left in free slots and pages, and
    in a buffer that is not written, is NaN: whoever reads it says nonsense."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.said: dict[Request, list[Completion]] = {}
        self.computed = 0  # rows given to the model, in chunks and in decode steps
        self.chunked = self.steps = 0
        self._poisoned: set[tuple[str, int]] = set()
        self._spy("compute", lambda chunks: sum(len(tokens) for _, tokens in chunks))
        self._spy("decode", len)

    def _spy(self, name: str, count: Callable[..., int]) -> None:
        inner = getattr(self.engine.runner, name)

        def call(what: Sequence) -> object:
            self.computed += count(what)
            self.chunked += count(what) if name == "compute" else 0
            return inner(what)

        setattr(self.engine.runner, name, call)

    def add(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        request = self.engine.add(prompt, sampling)
        self.said[request] = [Completion() for _ in range(sampling.n)]
        return request

    def step(self) -> None:
        self._poison()
        self.steps += 1
        assert self.steps < STEPS, "it does not come to an end"
        for delta in self.engine.step():
            completion = self.said[delta.request][delta.index]
            assert completion.finish is None, "nothing comes after the end"
            completion.add(delta)

    def _poison(self) -> None:
        """What became free since the last step."""
        store, pages = self.engine.store, self.engine.pages
        free = {("page", page) for page in range(pages.count) if not pages._owners[page]}
        free |= {("slot", slot) for slot in self.engine.scheduler._free}
        for kind, at in free - self._poisoned:
            for x in store.paged if kind == "page" else (*store.rings, *store.states):
                x[:, at] = float("nan")
        self._poisoned = free

    def all(self) -> Play:
        """To the end."""
        while self.engine.busy:
            self.step()
        return self

    def tokens(self, request: Request) -> list[list[int]]:
        return [completion.tokens for completion in self.said[request]]

    def one(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """Ask for one answer and wait for it."""
        request = self.add(prompt, sampling)
        return self.all().said[request][0]

    def load(self, asks: Sequence[Ask]) -> list[Request]:
        """Everybody at their time; the requests in the order of `asks`."""
        requests: dict[int, Request] = {}
        step = 0
        while len(requests) < len(asks) or self.engine.busy:
            for number, ask in enumerate(asks):
                if ask.arrives == step:
                    requests[number] = self.add(ask.prompt, ask.sampling)
                if ask.cancelled == step and number in requests:
                    self.engine.cancel(requests[number])
            self.step()
            step += 1
        return [requests[number] for number in range(len(asks))]


def alone(
    model: LanguageModel, prompt: list[int], how: Sampling, tokenizer: Tokenizer | None = None
) -> Completion:
    """The answer that the one-request loop gives."""
    return generate(model, [prompt], [how], tokenizer=tokenizer)[0]


def check_at_rest(engine: Engine) -> None:
    """Nobody has anything but what was kept for later, and that can go."""
    stats, prefixes = engine.stats(), engine.prefixes
    assert not engine.busy and stats.running == stats.waiting == 0
    assert engine._host_bytes == 0 and not engine._flights and not engine._branches
    assert sorted(engine.scheduler._free) == list(range(engine.room.sequences))
    assert not engine.sampler._asked, "the sampler remembers somebody"
    kept = list(prefixes._entries.values())
    assert all(entry.waiting == 0 for entry in kept)
    assert prefixes.nbytes == sum(entry.nbytes for entry in kept) <= prefixes.limit
    assert stats.cache_bytes <= prefixes.nbytes == stats.prefix_bytes
    owned = {page for entry in kept for page in entry.kept.pages}
    sizes = engine.room.sizes
    assert stats.cache_bytes == len(kept) * sizes.slot + len(owned) * sizes.page
    while (snapshot := prefixes.evict()) is not None:
        engine.pages.give_back(snapshot.pages)
    assert engine.stats().cache_bytes == 0


def paged_room(model: LanguageModel, sequences: int, pages: int, **more: Any) -> Limits:
    """Limits with so many slots and pages exactly."""
    one = Limits(max_sequences=1, kv_dtype=more.get("kv_dtype"))
    sizes = Engine(model, limits=one).room.sizes
    nbytes = (sequences + 1) * sizes.slot + (pages + 2) * sizes.page
    limits = Limits(max_sequences=sequences, cache_bytes=nbytes, **more)
    room = Engine(model, limits=limits).room
    assert (room.sequences, room.pages) == (sequences, pages)
    return limits
