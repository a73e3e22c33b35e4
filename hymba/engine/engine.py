"""The engine: many sequences at once, coming and going at any step.

    engine = Engine(model, tokenizer)
    request = engine.add(prompt, Sampling(max_tokens=64))
    while engine.busy:
        for delta in engine.step(): ...

A step: plan it (scheduler), do it (store, runner, sampler), read what earlier ones said. On a GPU
what a step says is read after the next one has been launched, so the device does not wait for the
host; a sequence that turns out to have stopped has then computed one token for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba.engine.grammar import Grammars, Matcher
from hymba.engine.interrupt import between_steps
from hymba.engine.limits import Limits, Room
from hymba.engine.pages import Pages
from hymba.engine.prefix import Entry, Prefixes
from hymba.engine.request import Delta, Logprob, Request
from hymba.engine.runner import Runner
from hymba.engine.sampling import Drawn, Sampler, Sampling
from hymba.engine.scheduler import Away, Branch, Plan, Scheduler, Start
from hymba.engine.store import Snapshot, Store
from hymba.engine.text import Speech
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.ops import send
from hymba.tokenizer import Tokenizer


class QueueFull(UserError):
    """As many requests wait as may wait: try again later."""


@dataclass(frozen=True)
class Stats:
    """Counts since the engine began, and what it holds now."""

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_hits: int
    prefix_hit_tokens: int
    prefix_bytes: int  # of beginnings kept, now
    cache_bytes: int  # in use, now: slots and pages of sequences and of beginnings kept
    cache_bytes_total: int  # allocated
    meta_bytes: int  # what the meta tokens left, once for all sequences


@dataclass(eq=False)
class _Job:
    """What the engine knows of a branch beside the scheduler."""

    request: Request
    index: int
    seed: int
    stop_ids: tuple[int, ...]
    speech: Speech
    matcher: Matcher | None = None
    followers: list[Branch] = field(default_factory=list)  # wait for the prompt to be computed
    entered: int = 0  # pages that the store's table has
    done: bool = False


@dataclass
class _Flight:
    """A decode step that the host has not read yet."""

    branches: list[Branch]
    tokens: Tensor
    logprobs: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None


class Engine:
    """Everything here is for one thread, but for `prepare`."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        limits: Limits | None = None,
        ahead: int | None = None,
    ):
        """`ahead`: decode steps launched before one is read (1 on a GPU, else 0)."""
        self.model, self.tokenizer, self.limits = model.eval(), tokenizer, limits or Limits()
        config, like = model.config, model.decoder.final_norm.weight.detach()
        self.room = room = Room.of(config, self.limits, model.device, model.dtype)
        with torch.no_grad():
            meta = model.decoder.meta_states()
        self.store = Store(
            config, room.sequences, room.pages, room.max_tokens, meta, like, kv_dtype=room.kv_dtype
        )
        self._allocated = self.store.nbytes()  # for good; a server asks after each step
        self.pages = Pages(room.pages, room.block)
        self.prefixes = Prefixes(room.prefix_bytes, self.limits.shortest_prefix)
        self.scheduler = Scheduler(room.sequences, self.pages, room.step_tokens, self.prefixes)
        self.runner = Runner(model, self.store)
        self.sampler = Sampler(self.store.slots, config.vocab_size, model.device)
        self.ahead = ahead if ahead is not None else int(model.device.type == "cuda")
        size, stop_ids = config.vocab_size, Sampling().ends(config.eos_token_id)
        self.grammars = Grammars(tokenizer, size, stop_ids) if tokenizer else None
        self._branches: dict[Request, list[Branch]] = {}  # those that go on
        self._flights: deque[_Flight] = deque()
        self._deltas: list[Delta] = []
        self._host_bytes = 0  # of preempted sequences
        self._count = self._steps = self._prompt_tokens = self._generated = 0

    # ---- asking

    def add(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Request:
        """Continue a prompt (token ids). UserError for what cannot be served, QueueFull where too
        many wait."""
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling must be a Sampling, got {repr(sampling)[:60]}")
        tokens = self._checked(prompt, sampling)
        room = min(sampling.max_tokens, self.room.max_tokens - len(tokens))
        request = Request(self._count, tuple(tokens), sampling)
        seed, matcher, stops = sampling.some_seed(), self._matcher(sampling), self._stops(tokens)
        ends = sampling.ends(self.model.config.eos_token_id)
        self._count += 1
        branches = []
        for index in range(sampling.n):
            job = _Job(request, index, seed, ends, Speech(self.tokenizer, sampling.stop))
            job.matcher = matcher if index == 0 else self._matcher(sampling)
            constrained = matcher is not None
            branches.append(Branch(list(tokens), room, job, constrained, list(stops)))
        branches[0].owner.followers = branches[1:]
        self._branches[request] = branches
        self.scheduler.add(branches[0])
        self._prompt_tokens += len(tokens)
        return request

    def prepare(self, sampling: Sampling) -> None:
        """What `add` would do first and may take seconds: compile a constraint. The one method for
        any thread, so that a large schema need not stop everybody's steps. UserError as `add`."""
        self._matcher(sampling)

    def warm_up(self) -> None:
        """Do now what would make the first requests of a GPU wait: CUDA graphs of all sizes."""
        self.runner.warm_up()

    def cancel(self, request: Request) -> None:
        """Nobody wants it any more: slot and pages are free at once, no more deltas come."""
        for branch in self._branches.pop(request, []):
            self._release(branch)
        self._deltas = [delta for delta in self._deltas if delta.request is not request]

    @property
    def busy(self) -> bool:
        return bool(self._branches or self._flights)

    def stats(self) -> Stats:
        scheduler, sizes = self.scheduler, self.room.sizes
        running = len(scheduler.running)
        kept = len(self.prefixes) * sizes.slot
        return Stats(
            running=running,
            waiting=sum(len(branches) for branches in self._branches.values()) - running,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.preemptions,
            prefix_hits=self.prefixes.hits,
            prefix_hit_tokens=self.prefixes.hit_tokens,
            prefix_bytes=self.prefixes.nbytes,
            cache_bytes=running * sizes.slot + self.pages.used * sizes.page + kept,
            cache_bytes_total=self._allocated["total"] + kept,
            meta_bytes=self._allocated["meta"],
        )

    # ---- a step

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Compute once, and say what is known by then. May be nothing. After a Ctrl-C, which waits
        for the end, that comes with the next step's."""
        with between_steps():
            self._step()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step(self) -> None:
        plan = self.scheduler.plan()
        if plan:
            self._steps += 1
            self._rearrange(plan)
            self._compute(plan)
            if plan.decode:
                self._decode(plan.decode)
        while len(self._flights) > (self.ahead if plan.decode else 0):
            self._read(self._flights.popleft())

    def _rearrange(self, plan: Plan) -> None:
        """Who leaves is saved first, since others may get its slot and pages."""
        for away in plan.away:
            self._carry_out(away)
        fresh, edits = [], []
        for start in plan.starts:
            shared = 0 if start.kept is None else start.kept.length // self.pages.size
            start.branch.owner.entered = 0
            fresh += start.branch.pages[shared:]
            edits += self.store.blank(start.branch.place, len(start.branch.pages))
        for branch in plan.decode:
            fresh += branch.pages[branch.owner.entered :]
        self.store.clear_pages(fresh)
        for branch in (*plan.decode, *(start.branch for start in plan.starts)):
            job, pages = branch.owner, branch.pages
            edits += [(branch.place, at, pages[at]) for at in range(job.entered, len(pages))]
            job.entered = len(pages)
        self.store.set_pages(edits)
        for start in plan.starts:
            self._begin(start)

    def _carry_out(self, away: Away) -> None:
        branch = away.branch
        size = self._saved_bytes(away)
        if self._host_bytes + size <= self.limits.host_bytes:
            branch.saved = self.store.carry_out(away.slot, away.pages)
            self._host_bytes += branch.saved.nbytes
        self.sampler.release(away.slot)

    def _saved_bytes(self, away: Away) -> int:
        return self.room.sizes.slot + len(away.pages) * self.room.sizes.page

    def _begin(self, start: Start) -> None:
        branch = start.branch
        job, slot = branch.owner, branch.place
        snapshot: Snapshot | None = start.kept or start.saved
        if snapshot is None:
            self.store.reset(slot)
        else:
            self.store.bring_back(slot, snapshot, branch.pages)
        if start.kept is not None and branch.known == branch.prompt and job.index == 0:
            job.request.cached_tokens = max(job.request.cached_tokens, start.kept.length)
        if start.saved is not None:
            self._host_bytes -= start.saved.nbytes
        request, said = job.request, branch.tokens[branch.prompt :]
        self.sampler.admit(slot, request.sampling, job.seed, job.index, request.prompt, said)

    def _compute(self, plan: Plan) -> None:
        chunks = []
        for branch, count in plan.chunks:
            chunks.append((branch.place, branch.tokens[branch.computed - count : branch.computed]))
        if chunks:
            self.runner.compute(chunks)
        computed = dict.fromkeys(branch for branch, _ in plan.chunks)
        for branch in computed:
            if branch.computed in branch.stops:
                self._keep(branch)
        came = dict.fromkeys(start.branch for start in plan.starts)
        ready = [branch for branch in computed | came if branch.missing == 0]
        self.runner.enter([(branch.place, branch.tokens[-1]) for branch in ready])
        for branch in ready:
            self._follow(branch)

    def _follow(self, branch: Branch) -> None:
        """The prompt is computed: its other completions begin with a copy of the state."""
        followers, branch.owner.followers = branch.owner.followers, []
        if not followers:
            return
        entry = self._keep(branch, wanted=True)
        if entry is not None:
            entry.waiting += len(followers)
            for follower in followers:
                follower.start = entry
        self.scheduler.add_first(followers)

    def _decode(self, branches: list[Branch]) -> None:
        slots = [branch.place for branch in branches]
        spoken, index = self.runner.decode(slots)
        plain = all(_is_plain(branch.owner.request.sampling) for branch in branches)
        if plain:
            drawn = Drawn(spoken.likeliest[: len(slots)])
        else:
            masks = self._masks(branches)
            drawn = self.sampler.sample(spoken.logits, slots, index, masks)
            self.runner.say(index, drawn.tokens)
        self._flights.append(_flight(branches, drawn))

    def _masks(self, branches: list[Branch]) -> Tensor | None:
        if not any(branch.constrained for branch in branches):
            return None
        words = -(-self.model.config.vocab_size // 32)
        masks = torch.full((len(branches), words), -1, dtype=torch.int32)
        for row, branch in zip(masks, branches, strict=True):
            if branch.owner.matcher is not None:
                branch.owner.matcher.fill(row)
        return send(masks, self.model.device)

    # ---- reading

    def _read(self, flight: _Flight) -> None:
        if flight.arrived is not None:
            flight.arrived.synchronize()
        tokens = flight.tokens.tolist()
        said = [x.tolist() for x in flight.logprobs]
        for row, (branch, token) in enumerate(zip(flight.branches, tokens, strict=True)):
            if not branch.owner.done:
                self.scheduler.say(branch, token)
                self._say(branch, token, [x[row] for x in said])

    def _say(self, branch: Branch, token: int, said: list) -> None:
        """One token more of a branch, and whether it was the last."""
        job = branch.owner
        if token in job.stop_ids:
            return self._finish(branch, job.speech.finish(), (), (), "stop")
        matcher = job.matcher
        if matcher is not None and not matcher.accept(token):  # nothing was allowed
            return self._finish(branch, job.speech.finish(), (), (), "stop")
        self._generated += 1
        text, stopped = job.speech.push(token)
        finish = "stop" if stopped or (matcher is not None and matcher.finished) else None
        if finish is None and branch.known - branch.unread - branch.prompt >= branch.room:
            finish = "length"
        logprobs = _logprobs(token, job.request.sampling.logprobs, said)
        if finish is None:
            self._deltas.append(Delta(job.request, job.index, text, (token,), logprobs))
        else:
            text += "" if stopped else job.speech.finish()
            self._finish(branch, text, (token,), logprobs, finish)

    def _finish(
        self,
        branch: Branch,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[Logprob, ...],
        finish: str,
    ) -> None:
        job = branch.owner
        self._deltas.append(Delta(job.request, job.index, text, tokens, logprobs, finish))
        if branch.slot is not None and branch.computed > branch.prompt:
            self._keep(branch)
        self._release(branch)
        others = self._branches[job.request]
        others.remove(branch)
        if not others:
            del self._branches[job.request]

    def _release(self, branch: Branch) -> None:
        branch.owner.done = True
        if branch.slot is not None:
            self.sampler.release(branch.slot)
        if branch.saved is not None:
            self._host_bytes -= branch.saved.nbytes
        self.scheduler.remove(branch)

    # ---- beginnings kept for later

    def _stops(self, tokens: Sequence[int]) -> list[int]:
        """Where the computing of a prompt pauses, for a snapshot."""
        if not self.prefixes.limit:
            return []
        parting = self.prefixes.parting(tokens)
        found = {min(parting, len(tokens) - 1), len(tokens) - 1}
        return sorted(stop for stop in found if stop >= self.prefixes.shortest)

    def _keep(self, branch: Branch, wanted: bool = False) -> Entry | None:
        """A snapshot of what a branch has computed, for whoever begins alike: if it is worth it,
        or `wanted` at once."""
        length, prefixes = branch.computed, self.prefixes
        entry = prefixes.get(branch.tokens, length)
        if entry is not None:
            return entry
        nbytes = self.room.sizes.slot + self.pages.needed(length) * self.room.sizes.page
        if not wanted and (length < prefixes.shortest or nbytes > prefixes.limit):
            return None
        pages = self.scheduler.keep(branch)
        if pages is None:
            return None
        snapshot = self.store.keep(branch.place, branch.pages, pages)
        entry = prefixes.put(branch.tokens, length, nbytes, snapshot)
        entry.waiting += wanted
        for kept in prefixes.shed():
            self.pages.give_back(kept.pages)
        entry.waiting -= wanted
        return entry

    # ---- what a request may be

    def _checked(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        tokens, config, most = list(prompt), self.model.config, self.room.max_tokens
        if not tokens:
            raise UserError("the prompt is empty: a sequence begins with at least one token")
        if len(tokens) >= most:
            raise UserError(
                f"the prompt has {len(tokens)} tokens; sequences may have {most} here, and the"
                " answer needs one"
            )
        bad = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            size = config.vocab_size
            raise UserError(f"token id {bad} is outside the vocabulary (0 to {size - 1})")
        sampling.check_vocabulary(config.vocab_size)
        if self.tokenizer is None and sampling.stop:
            raise UserError("stop strings need a tokenizer, and there is none")
        if len(self.scheduler.waiting) >= self.limits.queue:
            raise QueueFull(f"{len(self.scheduler.waiting)} requests wait already: try again later")
        return tokens

    def _matcher(self, sampling: Sampling) -> Matcher | None:
        if not sampling.constrained:
            return None
        if self.grammars is None:
            raise UserError("constraints need a tokenizer, and there is none")
        return self.grammars.matcher(sampling)


def _is_plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is what is said, and nothing else asked for."""
    return (
        sampling.greedy
        and not sampling.edits
        and not sampling.constrained
        and sampling.logprobs is None
    )


def _flight(branches: list[Branch], drawn: Drawn) -> _Flight:
    found = [drawn.tokens]
    if drawn.logprobs is not None and drawn.top is not None:
        found += [drawn.logprobs, *drawn.top]
    if not drawn.tokens.is_cuda:
        return _Flight(branches, found[0], tuple(found[1:]), None)
    there = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in found]
    for host, x in zip(there, found, strict=True):
        host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Flight(branches, there[0], tuple(there[1:]), arrived)


def _logprobs(token: int, wanted: int | None, said: list) -> tuple[Logprob, ...]:
    if wanted is None:
        return ()
    logprob, tokens, values = said
    return (Logprob(token, logprob, tuple(zip(tokens[:wanted], values[:wanted], strict=True))),)
