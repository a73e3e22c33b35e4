"""Threads that run one job together: a matrix product, a scan, a whole decode step.

A job is cut into phases, and a phase into pieces that threads claim from a counter. A phase is over
when its pieces are done, not when all threads have arrived, so a thread that comes late (its core
is busy, it waits for the GIL, it does not exist after a fork) delays nobody unless it holds a
piece, and a job is right with any number of threads, the caller alone included:

    @job
    def example(thread, threads, phases, arguments):
        while True:
            piece = claim(phases, 0)
            if piece >= 10:
                break
            ...                         # reads what earlier phases wrote, in shared memory
            finish(phases, 0)
        wait(phases, 0, 10)             # then the next phase may read what this one wrote

    team().run(example, address, 5, phases=1)

A thread may skip a whole phase, so nothing may be carried from one to the next in private memory.

Workers are Python threads outside the GIL. After a job they look for the next one for some tens of
microseconds, so that jobs that follow each other start at once, then sleep on a lock. The control
block is 64-byte lines of int64:

    gate | left | ticket | function, arguments, phases, count | one line a worker: asleep?, seen

A job is published by a new ticket; a worker enters through the gate, whose closing tells the
caller how many it must wait for. Pieces by `guided` are half of the rest in equal parts, and so on:
as fast as a fixed share where all cores are free and several times faster where they are not.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from hymba.errors import UserError
from hymba.ops.cpu.compiled import entry, job, kernel
from hymba.ops.cpu.simd import (
    atomic_add,
    atomic_exchange,
    atomic_or,
    atomic_read,
    atomic_write,
    call_job,
    clear,
    give_way,
    pause,
    read_i64,
    write_i64,
)

LINE = 64
GATE, LEFT, TICKET, JOB, WORKERS = 0, LINE, 2 * LINE, 3 * LINE, 4 * LINE  # offsets
SEEN = 8  # in a worker's line
CLOSED = 1 << 40  # a gate's count is below
PHASE = 2 * LINE  # claimed | done
BUSY_PAUSES = 4_000  # a wait for others' pieces, before it lets other threads run
IDLE_PAUSES = 1_000  # a wait for the next job, before a worker sleeps
MOST_THREADS = 8  # by default: few machines' memory feeds more
HUGE = 2 << 20


# ---- inside a job --------------------------------------------------------------------------


@kernel
def claim(phases: int, phase: int) -> int:
    """The next piece of a phase, from 0; one that is not there means that all are claimed."""
    return atomic_add(phases + phase * PHASE, 1)


@kernel
def finish(phases: int, phase: int) -> None:
    """A piece of the phase is done."""
    atomic_add(phases + phase * PHASE + LINE, 1)


@kernel
def finished(phases: int, phase: int, pieces: int) -> bool:
    return atomic_read(phases + phase * PHASE + LINE) >= pieces


@kernel
def wait(phases: int, phase: int, pieces: int) -> None:
    """Until all pieces of the phase are done."""
    _wait_for(phases + phase * PHASE + LINE, pieces)


@kernel
def _wait_for(counter: int, count: int) -> None:
    pauses = 0
    while atomic_read(counter) < count:
        if pauses < BUSY_PAUSES:
            pauses += 1
            pause()
        else:
            give_way()


@kernel
def guided(items: int, threads: int, least: int, piece: int) -> tuple[int, int]:
    """(start, end) of a piece: each round of `threads` pieces takes half of the rest, until
    pieces would be smaller than `least`."""
    start = 0
    while True:
        size = (items - start + 2 * threads - 1) // (2 * threads)
        if size <= least:
            start += piece * least
            return start, min(items, start + least)
        if piece < threads:
            return start + piece * size, start + piece * size + size
        start += threads * size
        piece -= threads


@kernel
def guided_count(items: int, threads: int, least: int) -> int:
    """How many pieces `guided` makes."""
    start = count = 0
    while True:
        size = (items - start + 2 * threads - 1) // (2 * threads)
        if size <= least:
            return count + (items - start + least - 1) // least
        start += threads * size
        count += threads


# ---- the team ------------------------------------------------------------------------------


@entry
def _alone(function: int, arguments: int, phases: int, count: int) -> None:
    clear(phases, count * PHASE)
    call_job(function, 0, 1, phases, arguments)


@entry
def _publish(
    control: int, threads: int, function: int, arguments: int, phases: int, count: int
) -> int:
    """Start a job. Returns a bit for each worker that must be woken; none: the job is done."""
    clear(phases, count * PHASE)
    write_i64(control + JOB, function)
    write_i64(control + JOB + 8, arguments)
    write_i64(control + JOB + 16, phases)
    write_i64(control + JOB + 24, threads)
    atomic_write(control + LEFT, 0)
    atomic_write(control + GATE, 0)
    atomic_add(control + TICKET, 1)
    asleep = 0
    for worker in range(threads - 1):
        if atomic_exchange(control + WORKERS + worker * LINE, 0):
            asleep |= 1 << worker
    if not asleep:
        _work(control, 0)
        _leave(control)
    return asleep


@kernel
def _work(control: int, thread: int) -> None:
    function, arguments = read_i64(control + JOB), read_i64(control + JOB + 8)
    phases, threads = read_i64(control + JOB + 16), read_i64(control + JOB + 24)
    call_job(function, thread, threads, phases, arguments)


@kernel
def _leave(control: int) -> None:
    """Close the gate, if nobody has, and wait for those inside."""
    inside = atomic_or(control + GATE, CLOSED)
    if inside < CLOSED:
        _wait_for(control + LEFT, inside)


@entry
def _lead(control: int) -> None:
    _work(control, 0)
    _leave(control)


@entry
def _close(control: int) -> None:
    _leave(control)


@entry
def _serve(control: int, thread: int) -> None:
    """A worker's life between two sleeps."""
    line = control + WORKERS + (thread - 1) * LINE
    seen = read_i64(line + SEEN)
    while True:
        pauses = 0
        while pauses < IDLE_PAUSES and atomic_read(control + TICKET) == seen:
            pauses += 1
            pause()
        if atomic_read(control + TICKET) == seen:
            atomic_exchange(line, 1)
            if atomic_read(control + TICKET) == seen:
                return
            atomic_exchange(line, 0)
        seen = atomic_read(control + TICKET)
        write_i64(line + SEEN, seen)
        # A late one may enter the job after the one it saw, which is as good.
        if atomic_add(control + GATE, 1) < CLOSED:
            if thread < read_i64(control + JOB + 24):
                _work(control, thread)
            atomic_add(control + LEFT, 1)


class Team:
    """`threads` threads, the caller's included; each other one sleeps until there is a job."""

    def __init__(self, threads: int):
        self.threads = threads
        self._memory = aligned(WORKERS + threads * LINE)
        self._control = address(self._memory)
        self._phases = aligned(0)
        self._phases_at = address(self._phases)
        self._locks = [threading.Lock() for _ in range(threads - 1)]
        self._running = threading.Lock()
        self._stopped = False
        self._workers = [
            threading.Thread(target=self._live, args=(i + 1,), name=f"hymba-{i + 1}", daemon=True)
            for i in range(threads - 1)
        ]
        for lock in self._locks:
            lock.acquire()
        self._memory.view(np.int64)[WORKERS // 8 :: LINE // 8] = 1  # all asleep
        for worker in self._workers:
            worker.start()

    def _live(self, thread: int) -> None:
        lock = self._locks[thread - 1]
        while lock.acquire() and not self._stopped:
            _serve(self._control, thread)

    def run(self, job: job, *arguments: int, phases: int = 1, threads: int | None = None) -> None:
        """Run a job with int64 arguments and wait for its end. Jobs of other Python threads wait
        for each other. `threads` fewer than all, where more would not help: waking one takes some
        ten microseconds. Ctrl-C comes through after the job."""
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        where = ctypes.addressof(values)
        count = min(threads or self.threads, self.threads)
        with self._running:
            if phases * PHASE > len(self._phases):
                self._phases = aligned(phases * PHASE)
                self._phases_at = address(self._phases)
            if count == 1:
                _alone(job.address, where, self._phases_at, phases)
                return
            try:
                asleep = _publish(self._control, count, job.address, where, self._phases_at, phases)
                if asleep:
                    self._wake(asleep)
                    _lead(self._control)
            finally:  # an exception (Ctrl-C) between two of these must not leave workers inside
                _close(self._control)

    def _wake(self, asleep: int) -> None:
        for worker, lock in enumerate(self._locks):
            if asleep >> worker & 1:
                try:
                    lock.release()
                except RuntimeError:
                    pass  # it has not yet gone to sleep after the last time

    def close(self) -> None:
        """End the threads."""
        self._stopped = True
        self._wake(-1)
        for worker in self._workers:
            worker.join()


_team: Team | None = None
_making = threading.Lock()


def team() -> Team:
    """The process's own, made when first asked for."""
    if _team is None:
        with _making:
            if _team is None:
                _set(Team(thread_count()))
    assert _team is not None
    return _team


def _set(made: Team | None) -> None:
    global _team
    _team = made


def _forget() -> None:
    """In a forked child: threads do not come along."""
    global _making
    _making = threading.Lock()
    _set(None)


@atexit.register
def _end() -> None:
    """Before the interpreter takes the compiled code away."""
    if _team is not None:
        _team.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- how many threads ----------------------------------------------------------------------


def thread_count() -> int:
    """HYMBA_THREADS, else OMP_NUM_THREADS, else one a core that this process may use, at most 8."""
    for name in ("HYMBA_THREADS", "OMP_NUM_THREADS"):
        told = os.environ.get(name, "").split(",")[0].strip()
        if told:
            if not told.isdigit() or int(told) < 1:
                raise UserError(f"{name}={told!r} is not a number of threads")
            return min(int(told), 63)  # the bits of a word, less its sign
    return max(1, min(_cores(), _quota(), MOST_THREADS))


def _cores() -> int:
    """Those that this process may run on; two hardware threads of one core count as one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(path.read_text() if path.exists() else str(cpu))
    return len(cores)


def _quota() -> int:
    """What a container's limit allows, in cores (cgroup v2 or v1)."""
    root = Path("/sys/fs/cgroup")
    try:
        words = (root / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(root / "cpu" / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period")]
        except OSError:
            return MOST_THREADS
    if words[0] == "max" or int(words[0]) < 0:
        return MOST_THREADS
    return max(1, int(words[0]) // int(words[1]))


# ---- memory --------------------------------------------------------------------------------


def aligned(count: int) -> np.ndarray:
    """`count` zero bytes at a multiple of 64; many of them in huge pages where there are any."""
    if count >= 2 * HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, count + HUGE)
        memory.madvise(mmap.MADV_HUGEPAGE)
        raw, step = np.frombuffer(memory, np.uint8), HUGE
    else:
        raw, step = np.zeros(count + LINE, np.uint8), LINE
    start = -address(raw) % step
    return raw[start : start + count]


def address(array: np.ndarray) -> int:
    """Where an array's numbers begin. It takes a microsecond: keep it."""
    return int(array.ctypes.data)


class Room(threading.local):
    """Memory that a job needs while it runs: each Python thread's own, as large as ever needed."""

    memory, address = aligned(0), 0

    def at_least(self, count: int) -> int:
        """Where `count` bytes or more begin."""
        if len(self.memory) < count:
            self.memory = aligned(count)
            self.address = address(self.memory)
        return self.address
