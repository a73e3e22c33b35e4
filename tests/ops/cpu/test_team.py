"""The team: every piece once, with any number of threads, after a fork, beside other Python threads
and after Ctrl-C; and idle when there is nothing to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from hymba.errors import UserError
from hymba.ops.cpu import team as module
from hymba.ops.cpu.compiled import job
from hymba.ops.cpu.simd import read_i64, write_i64
from hymba.ops.cpu.team import Team, aligned, claim, finish, guided, guided_count, wait

PHASES, PIECES = 3, 500


@job
def count_up(thread: int, threads: int, phases: int, arguments: int) -> None:
    """Each phase adds 1 to each number, which only works if each waits for the one before."""
    numbers = read_i64(arguments)
    for phase in range(PHASES):
        while True:
            piece = claim(phases, phase)
            if piece >= PIECES:
                break
            # The neighbour's number, so that a phase that starts early goes wrong.
            other = (piece + phase * 7) % PIECES
            write_i64(numbers + 8 * other, read_i64(numbers + 8 * other) + 1)
            finish(phases, phase)
        wait(phases, phase, PIECES)


def run(team: Team, threads: int | None = None) -> None:
    numbers = np.zeros(PIECES, np.int64)
    team.run(count_up, numbers.ctypes.data, phases=PHASES, threads=threads)
    assert (numbers == PHASES).all()


@pytest.fixture(params=[1, 2, 5])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    made = Team(request.param)
    yield made
    made.close()
    assert not any(worker.is_alive() for worker in made._workers)


def test_every_piece_once(team: Team) -> None:
    for repetition in range(300):
        run(team, threads=None if repetition % 3 else 2)
        if repetition % 100 == 0:
            time.sleep(0.005)  # workers go to sleep


def test_other_threads_wait_for_their_turn(team: Team) -> None:
    failed: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(50):
                run(team)
        except BaseException as error:
            failed.append(error)

    beside = [threading.Thread(target=many) for _ in range(4)]
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    assert not failed


def test_idle_threads_cost_nothing(team: Team) -> None:
    run(team)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(team: Team) -> None:
    """The child has no workers: it does the work alone, and makes a team of its own when asked."""
    run(team)
    run(module.team())
    pid = os.fork()
    if pid == 0:
        try:
            run(team)
            run(module.team())
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


INTERRUPTED = """
import os, signal, time
import numpy as np
from hymba.ops.cpu.team import Team
from tests.ops.cpu.test_team import count_up, run
team = Team(3)
run(team)
caught, end = 0, time.monotonic() + 2
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.01)
while time.monotonic() < end and caught < 20:
    try:
        while time.monotonic() < end:
            run(team)
    except KeyboardInterrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
for _ in range(100):
    run(team)
print("caught", caught)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an alarm")
def test_ctrl_c_leaves_a_team_that_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 10


@pytest.mark.parametrize("items", [0, 1, 7, 313, 1001])
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("least", [1, 4])
def test_guided_pieces_cover_everything_once(items: int, threads: int, least: int) -> None:
    count = guided_count(items, threads, least)
    pieces = [guided(items, threads, least, piece) for piece in range(count)]
    assert [i for start, end in pieces for i in range(start, end)] == list(range(items))
    assert guided(items, threads, least, count)[0] >= items
    sizes = [end - start for start, end in pieces]
    assert all(size >= least for size in sizes[:-1])


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, want in (("OMP_NUM_THREADS", "3,2", 3), ("HYMBA_THREADS", "2", 2)):
        monkeypatch.setenv(name, value)
        assert module.thread_count() == want
    for wrong in ("none", "0", "-1", "1.5"):
        monkeypatch.setenv("HYMBA_THREADS", wrong)
        with pytest.raises(UserError, match=f"HYMBA_THREADS='{wrong}' is not a number"):
            module.thread_count()
    monkeypatch.delenv("HYMBA_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= module.thread_count() <= module.MOST_THREADS
    monkeypatch.setattr(module, "_quota", lambda: 1)
    assert module.thread_count() == 1


def test_memory() -> None:
    for count in (1, 1000, 5 << 20):
        memory = aligned(count)
        assert len(memory) == count and not memory.any()
        assert memory.ctypes.data % 64 == 0
