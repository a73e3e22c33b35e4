"""A model under test: ours, or any causal language model of transformers. What evaluation may ask.

    subject = open_subject("folder or hub id")
    subject.logprobs([[1, 17, 4], [1, 9]], batch=8)        # of each token, given those before it
    subject.generate([[1, 17, 4]], max_tokens=16, stop=("\\n",))

Rows may have any lengths. What is said of a row does not depend on the rows beside it: ours are
computed without padding, others' are padded behind their end, where a causal model does not look.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hymba.engine import LLM, Sampling
from hymba.errors import UserError
from hymba.hub import find
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.weights import load, usable_device

LOGITS = 1 << 24  # numbers made at a time
# What is read of a model, any causal one of transformers.
FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICENSE*")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
THEIRS = 1 << 29  # the same where a model of transformers makes them: it knows no less than a row


class SubjectError(UserError):
    """A model that cannot be asked this; the message says why."""


class Scored(NamedTuple):
    """What a model says of the tokens of a row that were asked for, in their order."""

    logprobs: Tensor  # (n,) float32: of the token that stands there, given all before it
    ranks: Tensor  # (n,) how many tokens are likelier; 0: greedy decoding would have said it


class TokenizerOf(Protocol):
    """What a subject's tokenizer can do; special tokens are neither made nor shown."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Subject(Protocol):
    """A model under test."""

    name: str
    tokenizer: TokenizerOf
    begin: list[int]  # ids that its texts begin with: often one, or none
    most_tokens: int  # positions it was made for; more can be scored, unless they end there
    last_position: int | None  # where they do; None: any number can be computed

    def logprobs(self, rows: list[list[int]], batch: int) -> list[Tensor]:
        """(len - 1,) float32 of each row: each token given those before it; `batch` at once."""
        ...

    def score(
        self, rows: list[list[int]], batch: int, tails: Sequence[int] | None = None
    ) -> list[Scored]:
        """The same with ranks, of the last `tails[i]` tokens of row i alone (None: all but the
        first): logits are made for no others."""
        ...

    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        """The greedy continuation of each, up to a string of `stop` or the model's own end."""
        ...


class _Batched:
    """The part of a subject that sorts rows into batches."""

    name: str
    begin: list[int]
    last_position: int | None = None

    def logprobs(self, rows: list[list[int]], batch: int) -> list[Tensor]:
        return [scored.logprobs for scored in self.score(rows, batch)]

    @torch.no_grad()
    def score(
        self, rows: list[list[int]], batch: int, tails: Sequence[int] | None = None
    ) -> list[Scored]:
        counts = [len(row) - 1 for row in rows] if tails is None else list(tails)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            self._check(number, row, count)
        found: dict[int, Scored] = {}
        for numbers in _batches([len(row) for row in rows], batch):
            parts = self._score([rows[i] for i in numbers], [counts[i] for i in numbers])
            found.update(zip(numbers, parts, strict=True))
        return [found[number] for number in range(len(rows))]

    def _check(self, number: int, row: Sequence[int], count: int) -> None:
        if not row:
            raise SubjectError(f"row {number} is empty: a row needs at least one token")
        if not 0 <= count < len(row):
            raise SubjectError(f"row {number}: {count} of its {len(row)} tokens cannot be scored")
        if self.last_position is not None and len(row) > self.last_position:
            raise SubjectError(
                f"{self.name} has positions for {self.last_position} tokens and a row has"
                f" {len(row)}: give shorter lengths"
            )

    @abstractmethod
    def _score(self, rows: list[list[int]], tails: list[int]) -> list[Scored]: ...


class Ours(_Batched):
    """A Hymba model, or one of its baselines: rows side by side without padding, generation by the
    engine."""

    def __init__(self, model: LanguageModel, tokenizer: Any, name: str = "model") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.most_tokens = model.config.max_positions
        self._llm: LLM | None = None

    def _score(self, rows: list[list[int]], tails: list[int]) -> list[Scored]:
        device = self.model.device
        tokens = torch.tensor([token for row in rows for token in row[:-1]], dtype=torch.long)
        lengths = [len(row) - 1 for row in rows]
        if not len(tokens):
            return [_nothing() for _ in rows]
        asked: list[int] = []
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for end, tail in zip(ends, tails, strict=True):
            asked += range(end - tail, end)
        goals = [token for row, n in zip(rows, tails, strict=True) for token in row[len(row) - n :]]
        batch = Batch.of([n for n in lengths if n], device=device)
        hidden = self.model(tokens.to(device), batch)[asked]  # (asked, D)
        targets = torch.tensor(goals, dtype=torch.long, device=device)
        step = max(1, LOGITS // self.model.config.vocab_size)
        pairs = zip(hidden.split(step), targets.split(step), strict=True)
        found = [score_logits(self.model.logits(part), goal) for part, goal in pairs]
        return _cut(found, tails)

    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        if self._llm is None:
            self._llm = LLM(self.model, tokenizer=self.tokenizer)
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        return [output.text for output in self._llm.generate(prompts, sampling)]


class Theirs(_Batched):
    """A model of transformers (hymba.hf.any)."""

    def __init__(self, peer: Any, name: str = "peer") -> None:
        self.peer, self.tokenizer, self.name = peer, peer.tokenizer, name
        self.begin = list(peer.tokenizer.begin)
        self.most_tokens, self.last_position = peer.most_tokens, peer.last_position

    def _score(self, rows: list[list[int]], tails: list[int]) -> list[Scored]:
        if not any(tails):
            return [_nothing() for _ in rows]
        device = self.peer.model.device
        width = max(map(len, rows)) - 1
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, asked = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
        goals = torch.zeros_like(ids)
        for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
            end = len(row) - 1
            ids[i, :end] = torch.tensor(row[:-1])
            mask[i, : max(1, end)] = 1  # a row of padding alone is refused
            goals[i, :end], asked[i, end - tail : end] = torch.tensor(row[1:]), True
        columns = asked.any(0).nonzero().flatten()  # (C,)
        if len(rows) > 1 and len(rows) * len(columns) * self.peer.vocab_size > THEIRS:
            half = len(rows) // 2
            return [
                *self._score(rows[:half], tails[:half]),
                *self._score(rows[half:], tails[half:]),
            ]
        logits = self.peer.logits(ids.to(device), mask.to(device), columns.to(device))  # (B, C, V)
        found = []
        for some, which, goal in zip(logits, asked[:, columns], goals[:, columns], strict=True):
            step = max(1, LOGITS // logits.shape[-1])
            chosen = some[which.to(device)].split(step)
            wanted = goal[which].to(device).split(step)
            found += [score_logits(x, y) for x, y in zip(chosen, wanted, strict=True)]
        return _cut(found, tails)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: tuple[str, ...] = (), batch: int = 8
    ) -> list[str]:
        said: dict[int, str] = {}
        rooms = [self._room(len(prompt), max_tokens) for prompt in prompts]
        for room in set(rooms):
            alike = [number for number, other in enumerate(rooms) if other == room]
            for places in _batches([len(prompts[number]) for number in alike], batch):
                numbers = [alike[place] for place in places]
                some = self.peer.generate([prompts[i] for i in numbers], room, stop)
                texts = [until(self.tokenizer.decode(ids), stop) for ids in some]
                said.update(zip(numbers, texts, strict=True))
        return [said[number] for number in range(len(prompts))]

    def _room(self, length: int, max_tokens: int) -> int:
        """New tokens that there are positions for; an answer ends where they end."""
        if length < 1:
            raise SubjectError("a prompt is empty: it needs at least one token")
        if self.last_position is None:
            return max_tokens
        if length >= self.last_position:
            raise SubjectError(
                f"{self.name} has positions for {self.last_position} tokens, a prompt takes all of"
                " them: give a shorter one"
            )
        return min(max_tokens, self.last_position - length)


def open_subject(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    through: str = "",
    quantize: str | None = None,
) -> Subject:
    """The model of a folder or a hub id. Ours run on our own code; `through="transformers"` puts
    them through transformers like any other. `quantize`: as `hymba.load` has it. UserError, one
    line, for all that cannot be read."""
    folder = find(name, FILES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = _kind(folder)
    check_tokenizer(folder)  # transformers makes an empty one where there is none
    if kind == "hymba" and through != "transformers":
        tokenizer = Tokenizer.from_folder(folder)  # first: without one the weights are no use
        return Ours(load(folder, device, dtype, quantize), tokenizer, str(name))
    if quantize is not None:
        raise SubjectError("only Hymba models, on our own code, can be quantised here")
    from hymba.hf.any import open_any  # slow to import, and not needed for our own

    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise SubjectError(f"there is no dtype called {dtype!r}: try float32 or bfloat16")
    return Theirs(open_any(folder, usable_device(device), wanted), str(name))


def check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise SubjectError(f"{folder} has no tokenizer: tasks are of text, and need one")


@contextmanager
def rows_fit(tokens: int) -> Iterator[None]:
    """Work on rows of so many tokens: too little memory is one line. On a CPU torch says it with a
    RuntimeError like any other."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        raise SubjectError(
            f"rows of {tokens} tokens do not fit into memory: give shorter --lengths, or a smaller"
            " --batch"
        ) from None


def _kind(folder: Path) -> str:
    """The model_type of a folder's config.json."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise SubjectError(f"{folder} has no config.json: give a model's folder") from None
    except (OSError, ValueError, AttributeError) as error:
        raise SubjectError(f"{path} cannot be read: {error}") from None
    return str(kind)


def score_logits(logits: Tensor, targets: Tensor) -> Scored:
    """logits (N, V), targets (N,). Of equally likely tokens the first counts as the likelier."""
    wide = logits.float()
    own = wide.gather(1, targets[:, None])  # (N, 1)
    before = torch.arange(wide.shape[1], device=wide.device) < targets[:, None]
    ranks = ((wide > own) | ((wide == own) & before)).sum(1)
    return Scored((own.squeeze(1) - wide.logsumexp(1)).cpu(), ranks.cpu())


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these strings."""
    ends = [text.find(word) for word in stop if word in text]
    return text[: min(ends)] if ends else text


def _batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Numbers of rows, long ones first, so many at once: rows of like length go together, and
    what does not fit shows at the beginning."""
    if batch < 1:
        raise SubjectError(f"a batch has 1 row or more, not {batch}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for at in range(0, len(order), batch):
        yield order[at : at + batch]


def _cut(parts: Sequence[Scored], tails: Sequence[int]) -> list[Scored]:
    """Scores of all rows, end to end, to scores of each."""
    logprobs = torch.cat([part.logprobs for part in parts]).split(list(tails))
    ranks = torch.cat([part.ranks for part in parts]).split(list(tails))
    return [Scored(*pair) for pair in zip(logprobs, ranks, strict=True)]


def _nothing() -> Scored:
    return Scored(torch.zeros(0), torch.zeros(0, dtype=torch.long))
