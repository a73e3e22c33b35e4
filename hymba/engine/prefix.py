"""Beginnings that were computed before: token by token equal prefixes and what was kept of them.

A state-space layer has one state, not one a token, so a prefix is worth something only at the very
token where somebody kept a snapshot. Where to keep them: at the end of each prompt, at the end of
each answer (the next turn of a chat begins with both), and where a prompt parts from one that was
asked before (a shared system prompt: two requests show where it ends, the third is served from it).
Found by a hash of all tokens before it, bounded in bytes, least recently used out. No torch here.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

REMEMBERED = 64  # prompts among which a common beginning is looked for


@dataclass(eq=False)
class Entry:
    """What was kept of one beginning. Never evicted while somebody waits to start from it."""

    key: bytes
    length: int  # tokens
    nbytes: int
    kept: Any  # a snapshot; opaque here
    waiting: int = 0


class Prefixes:
    """Entries by hash, the least recently used first."""

    def __init__(self, limit: int, shortest: int):
        self.limit = limit  # bytes
        self.shortest = shortest  # tokens: below it is computed again sooner than found
        self.nbytes = 0
        self.hits = self.hit_tokens = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._prompts: deque[array[int]] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int], most: int) -> Entry | None:
        """The longest entry that `tokens` begin with, of at most `most` tokens."""
        lengths = sorted(n for n in self._lengths if 0 < n <= min(most, len(tokens)))
        found = None
        for key in _keys(tokens, lengths):
            found = self._entries.get(key, found)
        if found is not None:
            self._entries.move_to_end(found.key)
        return found

    def count(self, entry: Entry) -> None:
        """A request started from an entry."""
        self.hits += 1
        self.hit_tokens += entry.length

    def get(self, tokens: Sequence[int], length: int) -> Entry | None:
        """The entry of exactly the first `length` tokens."""
        entry = self._entries.get(next(_keys(tokens, [length])))
        if entry is not None:
            self._entries.move_to_end(entry.key)
        return entry

    def put(self, tokens: Sequence[int], length: int, nbytes: int, kept: Any) -> Entry:
        """Keep a snapshot of the first `length` tokens; `shed` afterwards."""
        key = next(_keys(tokens, [length]))
        entry = Entry(key, length, nbytes, kept)
        assert key not in self._entries
        self._entries[key] = entry
        self._lengths[length] += 1
        self.nbytes += nbytes
        return entry

    def shed(self) -> list[Any]:
        """What is over the limit, taken out: the snapshots."""
        out = []
        while self.nbytes > self.limit and (kept := self.evict()) is not None:
            out.append(kept)
        return out

    def evict(self, all_of_them: bool = False) -> Any | None:
        """The least recently used snapshot, taken out; None where there is none to spare. Those
        that somebody waits for go only with `all_of_them`."""
        entries = self._entries.values()
        entry = next((e for e in entries if all_of_them or not e.waiting), None)
        if entry is None:
            return None
        del self._entries[entry.key]
        self._lengths[entry.length] -= 1
        if not self._lengths[entry.length]:
            del self._lengths[entry.length]
        self.nbytes -= entry.nbytes
        return entry.kept

    def spare(self) -> Iterator[Entry]:
        """Those that nobody waits for."""
        return (entry for entry in self._entries.values() if not entry.waiting)

    def parting(self, prompt: Sequence[int]) -> int:
        """Where `prompt` parts from those asked before: tokens of the longest common beginning,
        0 where it is too short. From now on it is one of them."""
        tokens = array("q", prompt)
        common = max((_common(tokens, other) for other in self._prompts), default=0)
        if tokens not in self._prompts:
            self._prompts.append(tokens)
        return common if common >= self.shortest else 0


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    """The hashes of the beginnings of these lengths (rising), in one pass."""
    state, done = blake2b(digest_size=16), 0
    for length in lengths:
        state.update(array("q", tokens[done:length]).tobytes())
        done = length
        yield state.copy().digest()


def _common(a: array[int], b: array[int]) -> int:
    """Tokens that both begin with, by halving: comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
