"""The scheduler alone, under random loads, with a pretended device that remembers every token.

The device keeps what each slot and each page holds and looks before it computes: a branch must find
its own tokens, whoever had its slot and its pages before. What it says next follows from all its
tokens, so nobody gets another one's answer unseen.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba.engine.pages import Pages
from hymba.engine.prefix import Entry, Prefixes
from hymba.engine.scheduler import Away, Branch, Plan, Scheduler

PAGE = 4  # tokens
SLOT_BYTES, PAGE_BYTES = 10, 6
STEM = [7, 3, 3, 9, 1, 4, 4, 2, 8, 5, 0, 6, 1, 1, 9, 2, 7, 5, 3, 8]
SHORTEST = 2


@dataclass(frozen=True)
class Ask:
    stem: int  # tokens that the prompt has in common with others
    tail: tuple[int, ...]
    room: int
    n: int
    arrives: int  # at which step
    cancelled: int | None  # at which step after that
    constrained: bool

    @property
    def prompt(self) -> list[int]:
        return STEM[: self.stem] + list(self.tail) or [5]


@dataclass(frozen=True)
class Machine:
    slots: int
    pages: int  # 0: a model without any
    step_tokens: int
    prefix_bytes: int
    ahead: int
    stops: int  # in so many words is one that ends an answer
    seed: int


@dataclass(eq=False)
class Job:
    ask: int
    index: int
    followers: list[Branch] = field(default_factory=list)
    said: int = 0
    done: str | None = None


@dataclass(eq=False)
class Snapshot:
    length: int
    pages: list[int]
    state: list[int]  # what the slot held
    contents: list[list[int | None]] = field(default_factory=list)  # of pages, where it took them


class Watched(Scheduler):
    """Looks at what cannot be seen from outside any more once a plan is made."""

    def _preempt(self, branch: Branch, plan: Plan) -> None:
        owned = Counter(
            p for e in self.prefixes._entries.values() if e.waiting for p in e.kept.pages
        )
        owned.update(page for other in self.running for page in other.pages)
        spare = [e for e in self.prefixes._entries.values() if not set(e.kept.pages) <= set(owned)]
        assert not spare, "what is only kept for later goes before anyone is preempted"
        assert branch is self.running[-1], "the youngest goes first"
        super()._preempt(branch, plan)

    def _let_go(self) -> None:
        self.free_for_all = self.pages.free  # pages that nobody took
        super()._let_go()


class Device:
    """Does plans as the engine does, and checks each."""

    def __init__(self, machine: Machine, asks: list[Ask]) -> None:
        self.machine, self.asks, self.draw = machine, asks, random.Random(machine.seed)
        self.pages = Pages(machine.pages, PAGE)
        self.prefixes = Prefixes(machine.prefix_bytes, SHORTEST)
        self.scheduler = Watched(machine.slots, self.pages, machine.step_tokens, self.prefixes)
        self.slots: list[list[int]] = [[] for _ in range(machine.slots)]
        self.held: list[list[int | None]] = [[None] * PAGE for _ in range(machine.pages)]
        self.flights: deque[list[Branch]] = deque()
        self.alive: dict[int, list[Branch]] = {}
        self.finished: Counter[tuple[int, int]] = Counter()
        self.computed = self.steps = 0

    # ---- what is asked

    def add(self, number: int) -> None:
        ask = self.asks[number]
        prompt = ask.prompt[: self.longest - 1]
        room = min(ask.room, self.longest - len(prompt))
        stops = sorted({min(self.prefixes.parting(prompt), len(prompt) - 1), len(prompt) - 1})
        stops = [stop for stop in stops if stop >= SHORTEST] if self.machine.prefix_bytes else []
        branches = [
            Branch(list(prompt), room, Job(number, i), ask.constrained, list(stops))
            for i in range(ask.n)
        ]
        branches[0].owner.followers = branches[1:]
        self.alive[number] = branches
        self.scheduler.add(branches[0])

    @property
    def longest(self) -> int:
        return self.machine.pages * PAGE or 40

    def cancel(self, number: int) -> None:
        for branch in self.alive.pop(number, []):
            self.release(branch, "cancelled")

    # ---- a step

    def step(self) -> None:
        before = self.before()
        plan = self.scheduler.plan()
        self.steps += 1
        self.check(plan, before)
        for away in plan.away:
            self.carry_out(away)
        self.take_in(plan)
        for branch, count in plan.chunks:
            for at in range(branch.computed - count, branch.computed):
                self.compute(branch, at, branch.tokens[at])
        for branch in dict.fromkeys(branch for branch, _ in plan.chunks):
            if branch.computed in branch.stops:
                self.keep(branch)
        touched = [branch for branch, _ in plan.chunks] + [start.branch for start in plan.starts]
        for branch in dict.fromkeys(touched):
            if branch.missing == 0:
                self.follow(branch)
        for branch in plan.decode:
            at = branch.computed - 1
            self.compute(branch, at, self.truth(branch, at + 1)[at])
        if plan.decode:
            self.flights.append(list(plan.decode))
        assert plan or self.flights or not self.alive, "nothing to do, and not done"
        while len(self.flights) > (self.machine.ahead if plan.decode else 0):
            for branch in self.flights.popleft():
                self.read(branch)
        self.count_owners()

    def before(self) -> tuple[list[Branch], list[Branch], list[Branch]]:
        running = list(self.scheduler.running)
        return running, [b for b in running if b.speaks], list(self.scheduler.waiting)

    def check(self, plan: Plan, before: tuple[list[Branch], list[Branch], list[Branch]]) -> None:
        running, speaking, waiting = before
        scheduler = self.scheduler
        away = [gone.branch for gone in plan.away]
        assert away == running[len(running) - len(away) :][::-1], "the youngest leave"
        assert plan.decode == [b for b in speaking if b not in away], "who can speak speaks"
        spent = len(plan.decode) + sum(count for _, count in plan.chunks)
        assert spent <= self.machine.step_tokens
        assert all(count > 0 for _, count in plan.chunks)
        for branch, count in plan.chunks:
            passed = range(branch.computed - count + 1, branch.computed)
            assert not set(passed) & set(branch.stops), "it pauses where a snapshot is wanted"
        assert all(branch.saved is None for branch in scheduler.running), "saved for ever"
        starts = [start.branch for start in plan.starts]
        line = [*away[::-1], *waiting]
        assert starts == line[: len(starts)], "first come, first served"
        assert list(scheduler.waiting) == line[len(starts) :], "who had to leave is the next"
        assert not set(away) & set(starts), "out and in at once is work for nothing"
        moved = {*plan.decode, *(branch for branch, _ in plan.chunks)}
        if scheduler.running:
            oldest = scheduler.running[0]
            assert oldest in moved or oldest in starts or oldest.unread, "the oldest goes on"
        if not away:
            self.check_idle(spent, moved)
        slots = [branch.slot for branch in scheduler.running]
        assert sorted([*slots, *scheduler._free]) == list(range(self.machine.slots))

    def check_idle(self, spent: int, moved: set[Branch]) -> None:
        """Nobody waits who could come in."""
        scheduler = self.scheduler
        head = scheduler.waiting[0] if scheduler.waiting else None
        held_up = any(b.missing and b not in moved for b in scheduler.running)
        if head is None or head.unread or held_up or spent == self.machine.step_tokens:
            return
        short_of_pages = self.pages.needed(head.known) > scheduler.free_for_all
        assert not scheduler._free or short_of_pages

    def carry_out(self, away: Away) -> None:
        branch = away.branch
        assert branch.slot is None and branch.computed == 0
        self.look(branch, away.length, self.slots[away.slot], away.pages)
        if self.draw.random() < 0.6:
            contents = [list(self.held[page]) for page in away.pages]
            state = list(self.slots[away.slot])
            branch.saved = Snapshot(away.length, [], state, contents)

    def take_in(self, plan: Plan) -> None:
        """Fresh pages are cleared before anybody is brought back, as the engine does."""
        for start in plan.starts:
            shared = 0 if start.kept is None else start.kept.length // PAGE
            for page in start.branch.pages[shared:]:
                self.held[page] = [None] * PAGE
        for branch in plan.decode:
            if (branch.computed - 1) % PAGE == 0 and self.machine.pages:
                self.held[branch.pages[-1]] = [None] * PAGE
        for start in plan.starts:
            branch, kept = start.branch, start.kept or start.saved
            self.slots[branch.place] = [] if kept is None else list(kept.state)
            if start.kept is not None and start.kept.length % PAGE and self.machine.pages:
                full = start.kept.length // PAGE
                self.held[branch.pages[full]] = list(self.held[start.kept.pages[full]])
            elif start.saved is not None:
                for page, content in zip(branch.pages, start.saved.contents, strict=False):
                    self.held[page] = list(content)

    def compute(self, branch: Branch, at: int, token: int) -> None:
        """The token at position `at`: all before it must be there, and there is room for it."""
        state = self.slots[branch.place]
        self.look(branch, at, state, branch.pages)
        state.append(token)
        self.computed += 1
        if self.machine.pages:
            page = branch.pages[at // PAGE]
            assert self.pages._owners[page] == 1, "nobody writes to a page with two owners"
            assert self.held[page][at % PAGE] is None, "a fresh page is blank"
            self.held[page][at % PAGE] = token

    def look(self, branch: Branch, length: int, state: list[int], pages: list[int]) -> None:
        want = self.truth(branch, length)
        assert state == want, "a slot holds another's tokens"
        if self.machine.pages:
            found = [token for page in pages for token in self.held[page]][:length]
            assert found == want, "a page holds another's tokens"

    def truth(self, branch: Branch, length: int) -> list[int]:
        """The tokens of a branch, as far as the device knows them."""
        tokens = list(branch.tokens)
        while len(tokens) < length:
            tokens.append(self.next(branch.owner, tokens))
        return tokens[:length]

    def next(self, job: Job, tokens: list[int]) -> int:
        return hash((job.index, *tokens)) % 11

    # ---- kept beginnings

    def keep(self, branch: Branch, wanted: bool = False) -> Entry | None:
        length = branch.computed
        entry = self.prefixes.get(branch.tokens, length)
        if entry is not None:
            return entry
        nbytes = SLOT_BYTES + self.pages.needed(length) * PAGE_BYTES
        if not wanted and (length < SHORTEST or nbytes > self.prefixes.limit):
            return None
        pages = self.scheduler.keep(branch)
        if pages is None:
            return None
        full, rest = divmod(length, PAGE)
        if rest and self.machine.pages:
            self.held[pages[full]] = list(self.held[branch.pages[full]])
        snapshot = Snapshot(length, pages, list(self.slots[branch.place]))
        entry = self.prefixes.put(branch.tokens, length, nbytes, snapshot)
        entry.waiting += wanted
        for kept in self.prefixes.shed():
            self.pages.give_back(kept.pages)
        entry.waiting -= wanted
        return entry

    def follow(self, branch: Branch) -> None:
        followers, branch.owner.followers = branch.owner.followers, []
        if not followers:
            return
        entry = self.keep(branch, wanted=True)
        if entry is not None:
            entry.waiting += len(followers)
            for follower in followers:
                follower.start = entry
        self.scheduler.add_first(followers)
        assert list(self.scheduler.waiting)[: len(followers)] == followers

    # ---- reading

    def read(self, branch: Branch) -> None:
        job = branch.owner
        if job.done:
            return
        token = self.next(job, branch.tokens)
        self.scheduler.say(branch, token)
        job.said += 1
        assert job.said <= branch.room
        stopped = self.draw.randrange(self.machine.stops) == 0
        if stopped or job.said == branch.room:
            if branch.slot is not None and branch.computed > branch.prompt:
                self.keep(branch)
            self.release(branch, "finished")
            self.alive[job.ask].remove(branch)
            if not self.alive[job.ask]:
                del self.alive[job.ask]

    def release(self, branch: Branch, how: str) -> None:
        job = branch.owner
        assert job.done is None
        job.done = how
        self.finished[job.ask, job.index] += 1
        self.scheduler.remove(branch)

    def count_owners(self) -> None:
        """Every page has as many owners as there are branches and kept beginnings with it."""
        owners: Counter[int] = Counter()
        for holder in self.scheduler.running:
            owners.update(holder.pages)
        for entry in self.prefixes._entries.values():
            owners.update(entry.kept.pages)
        assert [owners[page] for page in range(self.pages.count)] == self.pages._owners
        assert sorted(self.pages._free) == [p for p in range(self.pages.count) if not owners[p]]
        spare = [e for e in self.prefixes._entries.values() if not e.waiting]
        assert self.prefixes.nbytes <= self.prefixes.limit or not spare, "over the limit"


def play(machine: Machine, asks: list[Ask]) -> Device:
    device = Device(machine, asks)
    todo = sorted(range(len(asks)), key=lambda i: asks[i].arrives)
    arrived: dict[int, int] = {}
    # The oldest moves at every step, or in the next one where the host has yet to read its last
    # token; what it had is computed again at most once for each page it grows by.
    bound = 10 + sum(
        ask.n * 2 * (len(ask.prompt) + ask.room + 4) * (2 + (len(ask.prompt) + ask.room) // PAGE)
        for ask in asks
    )
    while todo or device.alive or device.flights:
        while todo and asks[todo[0]].arrives <= device.steps:
            arrived[todo[0]] = device.steps
            device.add(todo.pop(0))
        for number, since in arrived.items():
            after = asks[number].cancelled
            if after is not None and device.steps - since == after:
                device.cancel(number)
        device.step()
        assert device.steps <= bound + 30, "somebody starves"
    return device


def check_the_end(device: Device) -> None:
    every = {(i, j) for i, ask in enumerate(device.asks) for j in range(ask.n)}
    assert device.finished == Counter(dict.fromkeys(every, 1)), "everyone ends exactly once"
    scheduler = device.scheduler
    assert not scheduler.running and not scheduler.waiting
    assert sorted(scheduler._free) == list(range(device.machine.slots))
    assert device.prefixes.nbytes <= device.prefixes.limit
    while (kept := device.prefixes.evict()) is not None:
        device.pages.give_back(kept.pages)
    assert len(device.prefixes) == device.prefixes.nbytes == 0, "somebody is still waited for"
    assert device.pages.free == device.pages.count and device.pages._owners.count(0) == (
        device.pages.count
    )


ASKS = st.lists(
    st.builds(
        Ask,
        stem=st.integers(0, len(STEM)),
        tail=st.lists(st.integers(0, 2), max_size=3).map(tuple),
        room=st.integers(1, 14),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        arrives=st.integers(0, 25),
        cancelled=st.none() | st.none() | st.integers(0, 12),
        constrained=st.booleans(),
    ),
    min_size=1,
    max_size=10,
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    slots = draw(st.integers(1, 4))
    return Machine(
        slots,
        pages=draw(st.sampled_from([0, 2, 3, 5, 6, 8, 12, 40])),
        step_tokens=slots + draw(st.sampled_from([0, 1, 3, 9, 100])),
        prefix_bytes=draw(st.sampled_from([0, 30, 80, 10_000])),
        ahead=draw(st.integers(0, 1)),
        stops=draw(st.sampled_from([3, 20, 10**9])),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(machines(), ASKS)
def test_random_loads(machine: Machine, asks: list[Ask]) -> None:
    check_the_end(play(machine, asks))


@pytest.mark.parametrize("seed", range(6))
def test_heavy_loads(seed: int) -> None:
    """Sixty requests at once on a small machine; and what these tests are for does happen."""
    draw = random.Random(seed)
    asks = [
        Ask(
            stem=draw.randrange(len(STEM) + 1),
            tail=tuple(draw.choices(range(3), k=draw.randrange(4))),
            room=draw.randrange(1, 20),
            n=draw.choice([1, 1, 1, 4]),
            arrives=draw.randrange(60),
            cancelled=draw.choice([None, None, None, draw.randrange(20)]),
            constrained=draw.random() < 0.2,
        )
        for _ in range(60)
    ]
    machine = Machine(5, 16, 5 + 3 * seed, 150, ahead=seed % 2, stops=40, seed=seed)
    device = play(machine, asks)
    check_the_end(device)
    assert device.scheduler.preemptions > 3 and device.prefixes.hits > 3


# ---- stories


def serve(slots: int = 2, pages: int = 6, step_tokens: int = 8) -> Scheduler:
    return Scheduler(slots, Pages(pages, PAGE), step_tokens, Prefixes(1000, SHORTEST))


def kept(scheduler: Scheduler, tokens: list[int]) -> Entry:
    """An entry of these tokens, in pages of its own."""
    pages = scheduler.pages.take(scheduler.pages.needed(len(tokens)))
    snapshot = Snapshot(len(tokens), pages, [])
    return scheduler.prefixes.put(tokens, len(tokens), 50, snapshot)


def test_a_beginning_stays_until_it_is_copied() -> None:
    """Two come in at one step; the second needs the pages of what the first begins with. Evicted
    within the plan, its last page was given to the second and cleared before the first had its
    copy of it, and the first went on from zeros."""
    scheduler = serve(slots=2, pages=4)
    kept(scheduler, [1, 2, 3, 4, 5, 6])  # two pages, the second half full
    first = Branch([1, 2, 3, 4, 5, 6, 7], 3)
    second = Branch([9] * 7, 3)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.plan()
    assert [start.branch for start in plan.starts] == [first] and first.computed == 7 - 1
    assert len(scheduler.prefixes) == 1
    assert [start.branch for start in scheduler.plan().starts] == [second]
    assert len(scheduler.prefixes) == 0


def test_what_is_kept_does_not_go_in_vain() -> None:
    """The head of the line needs more than is free and kept together: it waits, and what is kept
    stays until it is of use."""
    scheduler = serve(slots=2, pages=6)
    first = Branch([7] * 12, 9)
    scheduler.add(first)
    scheduler.plan()  # it has three pages
    kept(scheduler, [1, 2, 3, 4])
    scheduler.add(Branch([9] * 16, 1))  # needs four; two are free, one is kept
    assert not scheduler.plan().starts and len(scheduler.prefixes) == 1
    scheduler.remove(first)
    assert scheduler.plan().starts and len(scheduler.prefixes) == 1


def test_nobody_leaves_and_comes_back_at_one_step() -> None:
    """The youngest gave up its pages and found a beginning to start from again at once: it came in
    as new, and what was saved of it was counted for ever."""
    scheduler = serve(slots=3, pages=5, step_tokens=20)
    entry = kept(scheduler, [1, 2, 3, 4, 5, 6])
    entry.waiting = 1  # for a follower, so that it cannot go
    old, young = Branch([8, 8, 8], 9), Branch([1, 2, 3, 4, 5], 9)
    scheduler.add(old)
    scheduler.add(young)
    left = []
    for _ in range(4):
        plan = scheduler.plan()
        left += [away.branch for away in plan.away]
        assert not plan.away or not plan.starts
        for branch in plan.decode:
            scheduler.say(branch, 8 if branch is old else 6)
    assert left == [young]


def test_what_followers_began_with_goes_once_they_have() -> None:
    """Where nothing is to be kept (prefix_bytes=0) the beginning that n answers share went only
    with the next one that was kept, which never came."""
    machine = Machine(3, 8, 10, prefix_bytes=0, ahead=0, stops=10**9, seed=0)
    device = play(machine, [Ask(6, (), 4, 3, 0, None, False)])
    assert len(device.prefixes) == 0 and device.pages.free == 8


def test_the_prompt_of_several_answers_is_computed_once() -> None:
    machine = Machine(4, 40, 100, prefix_bytes=0, ahead=0, stops=10**9, seed=0)
    device = play(machine, [Ask(15, (), 5, 4, 0, None, False)])
    assert device.computed == 14 + 4 * 5 and device.prefixes.hits == 0


def test_who_speaks_does_not_wait_for_a_long_prompt() -> None:
    scheduler = serve(slots=2, pages=40, step_tokens=4)
    speaker, long = Branch([1], 9), Branch([2] * 30, 3)
    scheduler.add(speaker)
    scheduler.plan()
    scheduler.add(long)
    for _ in range(9):
        plan = scheduler.plan()
        assert plan.decode == [speaker] and plan.chunks == [(long, 3)]
        scheduler.say(speaker, 1)


def test_a_rest_of_the_budget_does_not_cut_a_prompt() -> None:
    """Many cuts cost more than they fill; but where a prompt is longer than a step it is cut."""
    scheduler = serve(slots=3, pages=40, step_tokens=10)
    a, b, c = (Branch([i] * count, 3) for i, count in enumerate((8, 8, 25)))
    for branch in (a, b, c):
        scheduler.add(branch)
    assert scheduler.plan().chunks == [(a, 7)]  # 3 are left, b wants 7
    assert scheduler.plan().chunks == [(b, 7)]
    assert scheduler.plan().chunks == [(c, 8)]  # a and b speak


def test_a_constrained_branch_waits_for_its_reader() -> None:
    scheduler = serve()
    free, bound = Branch([1], 5), Branch([2], 5, constrained=True)
    scheduler.add(free)
    scheduler.add(bound)
    scheduler.plan()
    assert scheduler.plan().decode == [free, bound]
    assert scheduler.plan().decode == [free]  # on a GPU one step may be unread, not its own
    scheduler.say(bound, 3)
    assert scheduler.plan().decode == [free, bound]


def test_nobody_computes_beyond_the_last_token() -> None:
    """With a step unread the host knows how many tokens there are, though not which."""
    scheduler = serve()
    branch = Branch([1], 2)
    scheduler.add(branch)
    scheduler.plan()
    assert [len(scheduler.plan().decode) for _ in range(4)] == [1, 1, 0, 0]


def test_a_step_that_cannot_serve_every_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 3 tokens cannot serve 4 sequences"):
        serve(slots=4, step_tokens=3)
