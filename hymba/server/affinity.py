"""Which of several replicas gets a call: the one that has had its beginning, since that is kept
there, unless it is much busier than another; else the least loaded. No ray and no HTTP here.

    places = Places()
    places.order({"a": 3, "b": 0}, beginnings(body))     # names, best first
    places.put(beginnings(body), "b")
"""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

PIECE = 256  # characters: texts are told apart by as many at once
KEPT = 50_000  # beginnings remembered, about 200 bytes each
BUSIER = 4  # calls more than the least loaded: from there on the beginning is computed again


def beginnings(body: bytes) -> list[bytes]:
    """A mark for each beginning of a call's prompt, shortest first: after each message and each
    PIECE of its text. Two calls have a mark in common where their prompts begin alike."""
    so_far, found = blake2b(digest_size=8), []
    for text in _texts(body):
        so_far.update(b"\0")
        for at in range(0, len(text) or 1, PIECE):
            so_far.update(text[at : at + PIECE].encode("utf-8", "surrogatepass"))
            found.append(so_far.digest())
    return found


def _texts(body: bytes) -> Iterator[str]:
    """What a prompt consists of. Of a wrong call nothing: whoever gets it will say so."""
    try:
        ask = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not isinstance(ask, dict):
        return
    match ask.get("messages", ask.get("prompt")):
        case str(text):
            yield text
        case [dict(), *_] as messages:
            yield from (json.dumps(_said(message)) for message in messages)
        case [str(text), *_]:
            yield text
        case [[*ids], *_] | [*ids]:
            yield " ".join(map(str, ids))


def _said(message: Any) -> Any:
    return [message.get("role"), message.get("content")] if isinstance(message, dict) else message


class Places:
    """Where which beginnings have been, the longest unused forgotten first."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._had: OrderedDict[bytes, set[str]] = OrderedDict()

    def put(self, marks: Sequence[bytes], name: str) -> None:
        for mark in reversed(marks):  # so that the longest are forgotten first
            self._had.setdefault(mark, set()).add(name)
            self._had.move_to_end(mark)
        while len(self._had) > self._kept:
            self._had.popitem(last=False)

    def order(
        self, loads: Mapping[str, int], marks: Sequence[bytes], avoid: Collection[str] = ()
    ) -> list[str]:
        """The names, best first; `loads` are calls that run there, `avoid` come last."""
        least = min(loads.values(), default=0)
        near = {name for name in self._holders(marks, loads) if loads[name] <= least + BUSIER}

        def rank(name: str) -> tuple[bool, bool, int, float]:
            return name in avoid, name not in near, loads[name], random.random()

        return sorted(loads, key=rank)

    def _holders(self, marks: Sequence[bytes], there: Mapping[str, int]) -> set[str]:
        """Those of `there` that have had the longest beginning."""
        for mark in reversed(marks):
            if holders := self._had.get(mark, set()) & there.keys():
                return holders
        return set()
