"""Who computes what in the next step. Pure Python: no tensors, no clock, no randomness.

One rule: a branch has known tokens (its prompt and what it has said) and computed tokens, and a
step lets the computed catch up. All but the last known token are computed in chunks, cut as the
step's budget of tokens has it; the last one goes through the decode step, which says the next. So
long prompts are computed beside branches that already speak, and nothing has a phase.

Nobody starves. Who came first is served first: decode steps before chunks, chunks in the order of
admission, admission in the order of arrival. Where pages run out the youngest branch gives its own
up (after whatever was only kept for later) and waits at the head of the line, so the oldest never
stops; and what cannot fit alone is not taken in at all.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from hymba.engine.pages import Pages
from hymba.engine.prefix import Entry, Prefixes


class Kept(Protocol):
    """A snapshot of a beginning, as far as is looked at here."""

    @property
    def length(self) -> int: ...
    @property
    def pages(self) -> list[int]: ...


@dataclass(eq=False)
class Branch:
    """One of a request's completions while it is worked on."""

    tokens: list[int]  # known to the host: the prompt, then what was said
    room: int  # tokens it may say
    owner: Any = None  # whose it is; opaque here
    constrained: bool = False  # the host must see each token before the next
    stops: list[int] = field(default_factory=list)  # lengths at which to keep a snapshot, rising
    start: Entry | None = None  # begins here, whatever else is known
    saved: Any = None  # its snapshot in the host's memory, while it is preempted
    # Set by the scheduler:
    prompt: int = field(init=False)
    computed: int = 0
    unread: int = 0  # said on the device, not yet read by the host: 0 or 1
    slot: int | None = None
    pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def known(self) -> int:
        return len(self.tokens) + self.unread

    @property
    def missing(self) -> int:
        """Tokens to compute in chunks before it speaks."""
        return self.known - 1 - self.computed

    @property
    def place(self) -> int:
        """Its slot, while it runs."""
        assert self.slot is not None
        return self.slot

    @property
    def speaks(self) -> bool:
        """Whether its next step is a decode step."""
        said = self.known - self.prompt
        return self.missing == 0 and said < self.room and not (self.constrained and self.unread)


@dataclass
class Start:
    """A branch comes in: its slot begins empty, with a kept beginning, or with its own snapshot."""

    branch: Branch
    kept: Any = None
    saved: Any = None


@dataclass
class Away:
    """A branch is preempted: what its slot and pages hold is to be saved before others write."""

    branch: Branch
    slot: int
    pages: list[int]
    length: int


@dataclass
class Plan:
    """What a step does, in this order."""

    away: list[Away] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    chunks: list[tuple[Branch, int]] = field(default_factory=list)  # and how many tokens of each
    decode: list[Branch] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.away or self.starts or self.chunks or self.decode)


class Scheduler:
    def __init__(self, slots: int, pages: Pages, step_tokens: int, prefixes: Prefixes):
        if step_tokens < slots:
            raise ValueError(f"a step of {step_tokens} tokens cannot serve {slots} sequences")
        self.slots, self.pages, self.step_tokens = slots, pages, step_tokens
        self.prefixes = prefixes
        self.waiting: deque[Branch] = deque()
        self.running: list[Branch] = []  # the oldest first
        self._free = list(range(slots))  # a heap: the lowest first
        self._begun: list[Entry] = []  # what this plan's starts begin with
        self.preemptions = 0

    def add(self, branch: Branch) -> None:
        self.waiting.append(branch)

    def add_first(self, branches: list[Branch]) -> None:
        """To the head of the line, for branches of one that was served already."""
        self.waiting.extendleft(reversed(branches))

    def plan(self) -> Plan:
        """The next step. What it says is taken as done: call it, then do it."""
        plan = Plan()
        for branch in list(self.running):
            if branch.slot is not None and branch.speaks and self._grow(branch, plan):
                plan.decode.append(branch)
        left = self.step_tokens - len(plan.decode)
        for branch in self.running:
            left -= self._chunk(branch, left, plan)
        # Where somebody had to leave nobody comes: least of all the same one.
        while not plan.away and self.waiting and self._free and left > 0:
            if not self._admit(self.waiting[0], plan):
                break
            branch = self.waiting.popleft()
            self.running.append(branch)
            left -= self._chunk(branch, left, plan)
            if branch.missing and plan.chunks[-1][0] is not branch:
                break  # the budget is spent, but for a rest
        for branch in plan.decode:
            branch.computed += 1
            branch.unread += 1
        self._let_go()
        return plan

    def say(self, branch: Branch, token: int) -> None:
        """The host has read what a decode step drew."""
        branch.unread -= 1
        branch.tokens.append(token)

    def remove(self, branch: Branch) -> None:
        """A branch is through, or nobody wants it any more."""
        if branch in self.running:
            self.running.remove(branch)
            self._leave(branch)
        elif branch in self.waiting:
            self.waiting.remove(branch)
        self._forget_start(branch)
        branch.saved = None

    # ---- pages

    def keep(self, branch: Branch) -> list[int] | None:
        """Pages for a snapshot of what a branch has computed: the full ones shared, and a fresh one
        for a copy of the last. None where there is no room for that."""
        full, rest = divmod(branch.computed, self.pages.size)
        if not self.pages.count:
            return []
        if rest and not self._find_pages(1):
            return None
        self.pages.share(branch.pages[:full])
        return branch.pages[:full] + self.pages.take(1 if rest else 0)

    def _grow(self, branch: Branch, plan: Plan) -> bool:
        """A page for the next token, if it needs one; False where the branch had to leave."""
        if len(branch.pages) >= self.pages.needed(branch.computed + 1):
            return True
        while not self._find_pages(1):
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is branch:
                return False
        branch.pages += self.pages.take(1)
        return True

    def _find_pages(self, count: int) -> bool:
        """Whether so many are free, once what is only kept for later has gone: which it does only
        where that is enough."""
        if self.pages.free < count and self.pages.free + self._to_spare() < count:
            return False
        while self.pages.free < count:
            kept = self.prefixes.evict()
            if kept is None:
                return False
            self.pages.give_back(kept.pages)
        return True

    def _to_spare(self) -> int:
        """Pages that nobody owns but beginnings which may go."""
        kept = Counter(page for entry in self.prefixes.spare() for page in entry.kept.pages)
        return sum(self.pages.owners(page) == count for page, count in kept.items())

    # ---- in and out

    def _admit(self, branch: Branch, plan: Plan) -> bool:
        if branch.unread:
            return False  # it was preempted just now: the host has yet to see its last token
        entry = None
        if branch.saved is None:
            entry = branch.start or self.prefixes.find(branch.tokens, branch.known - 1)
        if entry is not None:
            entry.waiting += 1  # not evicted for its own sake
        shared = entry.kept.pages[: entry.length // self.pages.size] if entry else []
        missing = self.pages.needed(branch.known) - len(shared)
        if not self._find_pages(missing):
            if entry is not None:
                entry.waiting -= 1
            return self._unblock(branch, plan)
        self.pages.share(shared)
        branch.pages = list(shared) + self.pages.take(missing)
        branch.slot = heapq.heappop(self._free)
        branch.computed = 0
        if entry is not None:
            self._begun.append(entry)  # nor for others', before its last page is copied
            if entry is not branch.start:
                self.prefixes.count(entry)
            branch.computed = entry.length
        elif branch.saved is not None:
            branch.computed = branch.saved.length
        plan.starts.append(Start(branch, entry.kept if entry else None, branch.saved))
        branch.saved = None
        branch.stops = [stop for stop in branch.stops if stop > branch.computed]
        self._forget_start(branch)
        return True

    def _unblock(self, branch: Branch, plan: Plan) -> bool:
        """Nobody runs and yet nothing fits: beginnings that are waited for hold the pages."""
        if self.running:
            return False
        kept = self.prefixes.evict(all_of_them=True)
        if kept is None:
            return False
        self.pages.give_back(kept.pages)
        for other in self.waiting:
            if other.start is not None and other.start.kept is kept:
                other.start = None
        return self._admit(branch, plan)

    def _let_go(self) -> None:
        """What the plan's starts begin with is held no longer. Its pages may be free from here on,
        but nobody takes any before the plan is done."""
        for entry in self._begun:
            entry.waiting -= 1
        self._begun.clear()
        for kept in self.prefixes.shed():
            self.pages.give_back(kept.pages)

    def _forget_start(self, branch: Branch) -> None:
        if branch.start is not None:
            branch.start.waiting -= 1
            branch.start = None

    def _preempt(self, branch: Branch, plan: Plan) -> None:
        assert branch.slot is not None
        plan.away.append(Away(branch, branch.slot, list(branch.pages), branch.computed))
        self.running.remove(branch)
        self._leave(branch)
        self.waiting.appendleft(branch)
        self.preemptions += 1

    def _leave(self, branch: Branch) -> None:
        if branch.slot is not None:
            heapq.heappush(self._free, branch.slot)
        self.pages.give_back(branch.pages)
        branch.slot, branch.pages, branch.computed = None, [], 0

    def _chunk(self, branch: Branch, left: int, plan: Plan) -> int:
        """Tokens of a branch that the step computes in one go, up to its next stop."""
        most = next((stop for stop in branch.stops if stop > branch.computed), branch.known)
        whole = min(branch.missing, most - branch.computed)
        count = min(whole, left)
        # What is left of a budget is no reason to cut a prompt in two: many cuts cost more than
        # they fill.
        if count <= 0 or (count < whole and plan.chunks):
            return 0
        plan.chunks.append((branch, count))
        branch.computed += count
        return count
