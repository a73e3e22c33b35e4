"""Being asked to stop: Ctrl-C and SIGTERM set a flag that a run looks at between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(joined: bool = False) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second such signal acts as usual.

    `joined`: one of several processes, whose launcher passes on a signal that they have had
    already; there a second one changes nothing, and the launcher ends those that take too long.
    Outside the main thread, where Python allows no handlers, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        told = stop.is_set()
        stop.set()
        if joined:
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        if not told:  # not print: a handler may run in the middle of another print
            os.write(2, b"\nfinishing this step, then saving (once more stops at once)\n")

    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
