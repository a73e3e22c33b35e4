"""The text of a completion as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hymba.tokenizer import Tokenizer


class Speech:
    """Turns tokens into text. What could be the beginning of a stop string is held back until it
    is one (then the text ends before it) or is not."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._stream = None if tokenizer is None else tokenizer.stream(begins=False)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string ended it."""
        return ("", False) if self._stream is None else self._give(self._stream.push(token))

    def finish(self) -> str:
        """The rest, where no stop string came."""
        if self._stream is None:
            return ""
        text, stopped = self._give(self._stream.finish())
        return text if stopped else text + self._held

    def _give(self, fresh: str) -> tuple[str, bool]:
        text = self._held + fresh
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        keep = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
