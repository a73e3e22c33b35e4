"""What the sides of bench/device.py have in common: a process that holds one model and does as it
is told, a line of JSON at a time. Standard library alone, for any Python that can run a side.

    <- {"do": "decode", "depth": 4096, "tokens": 16}
    -> {"value": 0.41}            or {"error": "one line"}

A side is an object; what it can be told are its methods:

    about()                       facts for the report, and which modes of decoding there are
    fill(depth, mode)             a context of so many tokens, the prompt's seconds, memory after it
    decode(depth, mode, tokens)   seconds of so many new tokens behind `depth` others
    prefill(tokens)               seconds of a new prompt, to its last token's logits
    bytes(depth)                  what one token behind `depth` others cannot do without moving
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def serve(make: Callable[..., Any]) -> None:
    """Make a side of the command line's JSON, then answer until the other end closes.

    What libraries print goes to the standard error, so that it cannot stand between the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then closes the pipe
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(work: Callable[[], Any]) -> Any:
        try:
            value = work()
        except Exception as error:  # the parent leaves this side out and goes on
            said = f"{error}".strip().splitlines() or [type(error).__name__]
            answers.write(json.dumps({"error": said[0][:300]}) + "\n")
            return None
        answers.write(json.dumps({"value": value if isinstance(value, _PLAIN) else None}) + "\n")
        return value

    side = answer(lambda: make(**json.loads(sys.argv[1])))
    for line in sys.stdin if side is not None else ():
        asked = json.loads(line)
        answer(partial(_do, side, **asked))


def _do(side: Any, do: str, **how: Any) -> Any:
    return getattr(side, do)(**how)


_PLAIN = (dict, list, float, int, str)


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: all, its own, and those of mapped files. Empty
    where there is no /proc."""
    names = {"VmRSS": "all", "RssAnon": "anonymous", "RssFile": "file", "VmHWM": "highest"}
    found = {}
    for key, kilobytes in _kilobytes("/proc/self/status").items():
        if key in names:
            found[names[key]] = 1024 * kilobytes
    return found


def need_memory(wanted: int) -> None:
    """MemoryError where the machine has not so many bytes left: nobody else's process should pay
    for a benchmark."""
    left = 1024 * _kilobytes("/proc/meminfo").get("MemAvailable", wanted)
    if left < wanted:
        raise MemoryError(f"needs {wanted / 1e9:.1f} GB of memory, and {left / 1e9:.1f} are free")


def _kilobytes(path: str) -> dict[str, int]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) for row in rows}
