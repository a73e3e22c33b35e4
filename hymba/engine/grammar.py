"""Answers that follow a JSON schema or a regular expression, token by token, through xgrammar.

    grammars = Grammars(tokenizer, vocab_size=V, stop_ids=(2,))
    matcher = grammars.matcher(Sampling(regex="[0-9]+"))   # None where nothing is asked
    matcher.fill(row)                # which tokens may come next, as bits
    matcher.accept(token)

Only text is constrained: special tokens, and ids that the model has and the tokenizer does not,
are never allowed. Neither is a stop id, even one that spells text, but where the answer may end.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hymba.engine.sampling import Sampling
from hymba.engine.schema import check_schema
from hymba.errors import UserError
from hymba.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 128 * 2**20  # of compiled grammars, twice
# Between two parts of a JSON text. Without a bound a small model may say spaces for ever; the
# bound still leaves room for a line's indentation.
WHITESPACE = 16
CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")


class Grammars:
    """Compiled grammars for one tokenizer and model; asked for again, one is found in a cache. For
    several threads.

    A schema's objects have the properties that it names, and no others unless it allows them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, tuple(stop_ids)
        self._compilers: dict[bool, xgrammar.GrammarCompiler] = {}  # of JSON, and of all text
        self._making = threading.Lock()

    def matcher(self, sampling: Sampling) -> Matcher | None:
        """At the beginning of an answer; None where there is no constraint. UserError for a schema
        or an expression that cannot be followed."""
        if not sampling.constrained:
            return None
        stop_ids = self._stop_ids if sampling.stop_ids is None else sampling.stop_ids
        return Matcher(self._compiled(sampling), self._vocab_size, stop_ids)

    def _compiled(self, sampling: Sampling) -> xgrammar.CompiledGrammar:
        compiler = self._compiler(of_json=sampling.regex is None)
        try:
            if sampling.regex is not None:
                return compiler.compile_regex(sampling.regex)
            schema = sampling.json_schema
            text = schema if isinstance(schema, str) else json.dumps(schema or {"type": "object"})
            check_schema(json.loads(text))
            return compiler.compile_json_schema(text, max_whitespace_cnt=WHITESPACE)
        except UserError:
            raise
        except (RuntimeError, ValueError, RecursionError) as error:
            what = "json_schema" if sampling.regex is None else "regex"
            raise UserError(f"{what} cannot be followed: {_reason(error)}") from error

    def _compiler(self, of_json: bool) -> xgrammar.GrammarCompiler:
        with self._making:
            if of_json not in self._compilers:
                self._compilers[of_json] = self._make_compiler(of_json)
            return self._compilers[of_json]

    def _make_compiler(self, of_json: bool) -> xgrammar.GrammarCompiler:
        xgrammar = _import()
        spelled = _spellings(self._tokenizer, self._vocab_size)
        if of_json:
            # A JSON string has no control characters, but xgrammar 0.2.8 lets them into strings
            # with a minLength or maxLength (mlc-ai/xgrammar#800). Outside of strings only
            # white space would be one, and the line's end, which it does keep out, is enough.
            spelled = [b"" if CONTROL.search(token) else token for token in spelled]
        # One token more than the model has: the end of an answer, whatever ids stop it.
        info = xgrammar.TokenizerInfo(
            [*spelled, b""],
            xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size + 1,
            stop_token_ids=[self._vocab_size],
        )
        return xgrammar.GrammarCompiler(info, cache_limit_bytes=CACHE_BYTES)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocab_size: int, stop_ids: Sequence[int]
    ) -> None:
        self._inner = _import().GrammarMatcher(compiled)
        self._end = vocab_size
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self._bits = torch.zeros(1, vocab_size // 32 + 1, dtype=torch.int32)
        self._words = self._bits[0].numpy().view("uint32")
        self.finished = False  # nothing can follow, but for a stop id
        self._look()

    def accept(self, token: int) -> bool:
        """`token` was said, and no stop id. False, and nothing changes, where it must not be."""
        known = 0 <= token < self._end and token not in self._stop_ids
        if not known or self.finished or not self._inner.accept_token(token):
            return False
        self._look()
        return True

    def fill(self, row: Tensor) -> None:
        """Write what may come next into `row` (ceil(V / 32),) int32 on the host: bit j of word i
        stands for token 32 i + j."""
        row.copy_(self._bits[0, : len(row)])

    def allowed(self) -> Tensor:
        """The same as (V,) bool."""
        bits = self._bits[0].unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
        return bits.flatten()[: self._end].bool()

    def _look(self) -> None:
        self._inner.fill_next_token_bitmask(self._bits)
        may_end = bool(self._words[self._end // 32] >> (self._end % 32) & 1)
        for token in (self._end, *self._stop_ids):
            self._words[token // 32] &= ~(1 << token % 32) & 0xFFFFFFFF
        self.finished = not self._words.any()
        for token in self._stop_ids if may_end else ():
            self._words[token // 32] |= 1 << token % 32


def _import() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise UserError(
            'json_schema, regex and json_object need xgrammar: pip install "hymba[serve]"'
        ) from error
    return xgrammar


def _reason(error: Exception) -> str:
    """xgrammar's message without its clock, its source's line and its own condition."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[[\d:]+\] )?(\S+:\d+: )?(Check failed: .* is false: )?", "", lines[0])


# What tokens spell


def _spellings(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of every id of the model; none for what is not text."""
    parts = json.loads(tokenizer.files["tokenizer.json"])
    model = parts["model"]
    spell = _with_fallback if model.get("byte_fallback") else _byte_level
    if model["type"] != "BPE" or (
        spell is _byte_level and "ByteLevel" not in str(parts["decoder"])
    ):
        raise UserError("constraints need a BPE tokenizer of bytes, or with bytes as a fallback")
    found = [b""] * vocab_size
    for text, token in model["vocab"].items():
        if token < vocab_size and token not in tokenizer.special_ids:
            found[token] = spell(text)
    return found


def _with_fallback(text: str) -> bytes:
    """Of SentencePiece's kind: a space is "▁", a byte that no token has is "<0x0A>"."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


def _byte_level(text: str) -> bytes:
    """Of GPT-2's kind: every byte is a character, see `_alphabet`."""
    return bytes(_BYTES[character] for character in text) if set(text) <= _BYTES.keys() else b""


def _alphabet() -> dict[str, int]:
    """{character: byte}. Bytes that print in Latin-1 stand for themselves, the others in their
    order for the characters from 256 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _alphabet()
