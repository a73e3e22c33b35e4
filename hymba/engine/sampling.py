"""How the next token is chosen: what a user asks for, and the batch that is chosen at once.

    sampler = Sampler(slots=8, vocab_size=V, device="cuda")
    sampler.admit(3, Sampling(temperature=0.7, top_p=0.9), seed=1, index=0, prompt=ids)
    drawn = sampler.sample(logits, [3], torch.tensor([3], device="cuda"))

The host never waits here: every shape follows from what was asked, never from a value on the
device. A row's path follows from its own `Sampling` alone and sums are of integers, so its text
does not depend on its neighbours. To draw is to add noise (`noise.py`) and take the highest. The
slow twin of one row is in `sampling_reference.py`.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hymba.engine.noise import gumbel, row_keys, stream_key, token_steps
from hymba.errors import UserError

LOGPROBS = 20  # the likeliest tokens that may be asked for, as in OpenAI's interface
COMPLETIONS = 128
STOPS = 16
COLDEST = 1e-5  # a lower temperature is greedy: logits divided by it are no numbers any more
SHARES = 2.0**50  # in top_p, of a probability: their sum is exact in int64 and in float64
# Logits that get their noise at once: what a core's cache holds, and what takes 64 MB of a GPU.
AT_ONCE_ON_A_CPU, AT_ONCE = 2**16, 2**22

# name: (a whole number?, what must hold, the rule in words). Every float has two bounds, so that
# NaN and infinity fail, and so that float32 can hold what is made of it.
_RULES: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "max_tokens": (True, lambda x: x >= 1, "1 or more"),
    "temperature": (False, lambda x: 0 <= x <= 100, "between 0 (greedy) and 100"),
    "top_k": (True, lambda x: x >= 0, "0 (off) or more"),
    "top_p": (False, lambda x: 0 < x <= 1, "over 0 and at most 1"),
    "min_p": (False, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": (False, lambda x: 0.01 <= x <= 100, "between 0.01 and 100"),
    "presence_penalty": (False, lambda x: -2 <= x <= 2, "between -2 and 2"),
    "frequency_penalty": (False, lambda x: -2 <= x <= 2, "between -2 and 2"),
    "seed": (True, lambda x: -(2**63) <= x < 2**64, "of at most 64 bits"),
    "n": (True, lambda x: 1 <= x <= COMPLETIONS, f"between 1 and {COMPLETIONS}"),
    "logprobs": (True, lambda x: 0 <= x <= LOGPROBS, f"between 0 and {LOGPROBS}"),
}
_MAY_BE_NONE = ("seed", "logprobs")


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. Applied in the order: penalties and bias, the constraint's mask,
    temperature, top_k, top_p, min_p, as in vLLM and transformers; each at its default does
    nothing. Of equally likely tokens at the edge of top_k or top_p all are kept."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # keep the k likeliest tokens
    top_p: float = 1.0  # keep the likeliest tokens that make up this probability
    min_p: float = 0.0  # keep tokens at least so likely, as a share of the likeliest
    repetition_penalty: float = 1.0  # divides positive logits of prompt and said, others times it
    presence_penalty: float = 0.0  # off the logit of what was said
    frequency_penalty: float = 0.0  # the same, for each time it was said
    seed: int | None = None  # None: another text each time
    n: int = 1  # completions of one prompt
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    stop_ids: tuple[int, ...] | None = None  # None: the config's eos_token_id; () never stops
    logprobs: int | None = None  # k: the log-probability of what is said, and the k likeliest
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    json_schema: Mapping[str, Any] | str | None = None  # kept as its text
    regex: str | None = None
    json_object: bool = False  # any JSON object

    def __post_init__(self) -> None:
        for name in _RULES:
            self._check(name)
        self._keep("stop", _stop_strings(self.stop))
        self._keep("stop_ids", _stop_ids(self.stop_ids))
        self._keep("logit_bias", _bias(self.logit_bias))
        self._keep("json_schema", _schema(self.json_schema))
        if self.regex is not None and not (isinstance(self.regex, str) and self.regex):
            raise UserError(f"regex must be a string that is not empty, got {_short(self.regex)}")
        if not isinstance(self.json_object, bool):
            raise UserError(f"json_object must be True or False, got {_short(self.json_object)}")
        if (self.json_schema is not None) + (self.regex is not None) + self.json_object > 1:
            raise UserError("give only one of json_schema, regex and json_object")

    def _check(self, name: str) -> None:
        value, (whole, holds, rule) = getattr(self, name), _RULES[name]
        if value is None and name in _MAY_BE_NONE:
            return
        kind = Integral if whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            what = "an integer" if whole else "a number"
            raise UserError(f"{name} must be {what}, {rule}, got {_short(value)}")

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def constrained(self) -> bool:
        return self.json_object or self.json_schema is not None or self.regex is not None

    @property
    def edits(self) -> bool:
        """Whether logits are changed by penalties or a bias."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias)

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: (token, what is added), in order of the tokens."""
        return self.logit_bias if isinstance(self.logit_bias, tuple) else ()

    def ends(self, eos: int | None) -> tuple[int, ...]:
        """Ids that end an answer; `eos` is the model's own."""
        if self.stop_ids is not None:
            return self.stop_ids
        return () if eos is None else (eos,)

    def some_seed(self) -> int:
        """The seed, or a fresh one where none was asked for."""
        return secrets.randbits(63) if self.seed is None else int(self.seed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where a biased token does not exist."""
        for token, _ in self.bias:
            if token >= vocab_size:
                raise UserError(
                    f"logit_bias: token id {token} is outside the vocabulary (0 to"
                    f" {vocab_size - 1})"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _stop_strings(stop: object) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, (list, tuple)) or not all(isinstance(x, str) and x for x in found):
        raise UserError(f"stop must be strings that are not empty, got {_short(stop)}")
    if len(found) > STOPS:
        raise UserError(f"stop may have at most {STOPS} strings, got {len(found)}")
    return tuple(found)


def _stop_ids(stop_ids: object) -> tuple[int, ...] | None:
    if stop_ids is None:
        return None
    found = (stop_ids,) if isinstance(stop_ids, int) else stop_ids
    if not isinstance(found, (list, tuple)) or not all(_is_id(x) for x in found):
        raise UserError(f"stop_ids must be token ids, got {_short(stop_ids)}")
    return tuple(int(x) for x in found)


def _bias(bias: object) -> tuple[tuple[int, float], ...] | None:
    if bias is None:
        return None
    if not isinstance(bias, (Mapping, tuple)):
        raise UserError(f"logit_bias must be token ids with numbers, got {_short(bias)}")
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    for token, value in pairs:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not _is_id(token) or not number or not -100 <= value <= 100:
            raise UserError(
                "logit_bias must be token ids with numbers between -100 and 100, got"
                f" {_short(token)}: {_short(value)}"
            )
    return tuple(sorted((int(token), float(value)) for token, value in pairs))


def _schema(schema: object) -> str | None:
    """As text, with its properties in the order in which they were given: it is their order in
    the answer too."""
    if schema is None:
        return None
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"json_schema is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"json_schema must be a JSON object, got {_short(schema)}")
    return text


# The batch


class Drawn(NamedTuple):
    """What a step says, on the device. Log-probabilities are of the model: before temperature,
    penalties and filters; where any row asks for them all rows have them, as many as the most
    asked for."""

    tokens: Tensor  # (S,) int64
    logprobs: Tensor | None = None  # (S,) float32, of the tokens
    top: tuple[Tensor, Tensor] | None = None  # tokens (S, k), log-probabilities (S, k), best first


class _Asked(NamedTuple):
    sampling: Sampling
    key: int
    row: int | None  # of the tables of _Edits


class _Rows:
    """Some rows of a batch of `count`."""

    def __init__(self, places: list[int], count: int, device: torch.device) -> None:
        self.all = len(places) == count
        self.places = _upload(places, torch.int64, device)

    def take(self, x: Tensor) -> Tensor:
        return x if self.all else x.index_select(0, self.places)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows if self.all else x.index_copy(0, self.places, rows)


class Sampler:
    """Chooses tokens for the requests in `slots`. All it does is queued on the device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.device, self.vocab_size = torch.device(device), vocab_size
        self._asked: dict[int, _Asked] = {}
        self._numbers = torch.zeros(slots, dtype=torch.int64, device=self.device)  # tokens drawn
        self._steps = token_steps(vocab_size, self.device)
        self._edits = _Edits(vocab_size, self.device)
        self._plan: _Plan | None = None

    def admit(
        self,
        slot: int,
        sampling: Sampling,
        seed: int,
        index: int,
        prompt: Sequence[int],
        said: Sequence[int] = (),
    ) -> None:
        """A request's completion `index` begins in `slot`, or goes on after what it `said`."""
        self.release(slot)
        row = self._edits.add(sampling, prompt, said) if sampling.edits else None
        self._asked[slot] = _Asked(sampling, stream_key(seed, index), row)
        self._numbers[slot].fill_(len(said))

    def release(self, slot: int) -> None:
        """The slot is free; rows of a step that still name it are greedy."""
        asked = self._asked.pop(slot, None)
        if asked is not None and asked.row is not None:
            self._edits.drop(asked.row)
        self._plan = None

    @torch.no_grad()
    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        slot_tensor: Tensor,
        masks: Tensor | None = None,
    ) -> Drawn:
        """logits (S or more, V), slots (S) on the host and on the device -> S tokens.

        masks: (S, ceil(V / 32)) int32, bit j of word i allows token 32 i + j."""
        count = len(slots)
        plan, raw, slot_tensor = self._plan_of(tuple(slots)), logits[:count], slot_tensor[:count]
        x = raw
        if plan.edited is not None:
            x = plan.edited.rows.put(x.float(), self._edits.apply(x, plan.edited))
        if masks is not None:
            x = _masked(x, masks[:count].to(self.device, non_blocking=True))
        if plan.drawing is None:
            tokens = x.argmax(-1)
        else:
            numbers = plan.drawing.rows.take(self._numbers.index_select(0, slot_tensor))
            keys = row_keys(plan.drawing.keys, numbers)
            chosen = _draw(_filtered(plan.drawing.rows.take(x), plan.drawing), keys, self._steps)
            tokens = chosen if plan.drawing.rows.all else x.argmax(-1)
            tokens = plan.drawing.rows.put(tokens, chosen)
            self._numbers.index_add_(0, slot_tensor, self._numbers.new_ones(count))
        if plan.edited is not None:
            self._edits.count(plan.edited, plan.edited.rows.take(tokens))
        return _with_logprobs(raw, tokens, plan.logprobs)

    def _plan_of(self, slots: tuple[int, ...]) -> _Plan:
        if self._plan is None or self._plan.slots != slots:
            self._plan = _Plan(slots, [self._asked.get(slot) for slot in slots], self.device)
        return self._plan


class _Plan:
    """Which rows of a batch take which path; kept on the device while the batch is the same."""

    def __init__(
        self, slots: tuple[int, ...], asked: list[_Asked | None], device: torch.device
    ) -> None:
        self.slots = slots
        known = [(i, a) for i, a in enumerate(asked) if a is not None]
        drawn = [(i, a) for i, a in known if not a.sampling.greedy]
        edited = [(i, a) for i, a in known if a.row is not None]
        self.drawing = _Drawing(drawn, len(slots), device) if drawn else None
        self.edited = _Edited(edited, len(slots), device) if edited else None
        wanted = [a.sampling.logprobs for _, a in known if a.sampling.logprobs is not None]
        self.logprobs = max(wanted, default=None)


class _Drawing:
    """Rows with a temperature. Those of them with top_k or top_p are sorted."""

    def __init__(self, some: list[tuple[int, _Asked]], count: int, device: torch.device) -> None:
        self.rows = _Rows([i for i, _ in some], count, device)
        self.keys = _upload([a.key for _, a in some], torch.int64, device)  # (D,)
        each = [a.sampling for _, a in some]
        self.temperature = _column([s.temperature for s in each], torch.float32, device)
        self.least: Tensor | None = None  # (D, 1): the lowest logit under the highest, of min_p
        if any(s.min_p > 0 for s in each):
            least = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in each]
            self.least = _column(least, torch.float32, device)
        places = [i for i, s in enumerate(each) if s.top_k > 0 or s.top_p < 1]
        self.sorted = _Rows(places, len(each), device) if places else None
        far = 2**31  # off
        self.top_k = _column([each[i].top_k or far for i in places], torch.int64, device)
        tops = [each[i].top_p if each[i].top_p < 1 else 2.0 for i in places]  # 2: off
        self.top_p = _column(tops, torch.float64, device)


def _draw(x: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """x (D, V), states of the rows (D,), steps of the tokens (V,) -> tokens (D,)."""
    at_once = AT_ONCE_ON_A_CPU if x.device.type == "cpu" else AT_ONCE
    rows = max(1, at_once // x.shape[-1])
    parts = zip(x.split(rows), keys.split(rows), strict=True)
    return torch.cat([gumbel(some, steps).add_(part).argmax(-1) for part, some in parts])


def _filtered(x: Tensor, drawing: _Drawing) -> Tensor:
    """x (D, V) -> float32 after temperature and filters, the highest 0, what is left out -inf."""
    x = x.float()
    x = (x - x.amax(-1, keepdim=True)) / drawing.temperature
    lowest = drawing.least
    if drawing.sorted is not None:
        found = _lowest_kept(drawing.sorted.take(x), drawing.top_k, drawing.top_p)
        if lowest is None:
            lowest = torch.full_like(x[:, :1], -math.inf)
        found = torch.maximum(found, drawing.sorted.take(lowest))
        lowest = drawing.sorted.put(lowest, found)
    return x if lowest is None else x.masked_fill(x < lowest, -math.inf)


def _lowest_kept(x: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """x (D, V), top_k and top_p (D, 1) -> the lowest logit that both keep, (D, 1)."""
    ordered = x.sort(-1, descending=True).values
    kth = ordered.gather(-1, top_k.clamp(max=x.shape[-1]) - 1)
    shares = _shares(ordered.masked_fill(ordered < kth, -math.inf))
    sums = shares.cumsum(-1)
    kept = (sums - shares < top_p * sums[:, -1:]).sum(-1, keepdim=True)  # by what comes before
    return torch.maximum(kth, ordered.gather(-1, (kept - 1).clamp(min=0)))


def _shares(x: Tensor) -> Tensor:
    return (x.softmax(-1) * SHARES).long()


def _masked(x: Tensor, masks: Tensor) -> Tensor:
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (masks.unsqueeze(-1) >> bits & 1).bool().flatten(1)  # (S, 32 words)
    return x.masked_fill(~allowed[:, : x.shape[-1]], -math.inf)


def _with_logprobs(raw: Tensor, tokens: Tensor, wanted: int | None) -> Drawn:
    if wanted is None:
        return Drawn(tokens)
    every = raw.float().log_softmax(-1)
    said = every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    # Always as many, and then cut: the order of equals must not depend on what others ask for.
    best = every.topk(min(LOGPROBS, every.shape[-1]), dim=-1)
    return Drawn(tokens, said, (best.indices[:, :wanted], best.values[:, :wanted]))


# Penalties and bias


class _Edited:
    """Rows with penalties or a bias."""

    def __init__(self, some: list[tuple[int, _Asked]], count: int, device: torch.device) -> None:
        self.rows = _Rows([i for i, _ in some], count, device)
        self.tables = _upload([a.row for _, a in some], torch.int64, device)  # (E,)
        self.ones = torch.ones(len(some), dtype=torch.int32, device=device)

        def column(name: str) -> Tensor:
            values = [getattr(a.sampling, name) for _, a in some]
            return _column(values, torch.float32, device)

        self.repetition = column("repetition_penalty")
        self.presence = column("presence_penalty")
        self.frequency = column("frequency_penalty")


class _Edits:
    """Tables (R, V) with a row for each request that asks for a penalty or a bias: the tokens of
    its prompt, how often it said each token, its bias. There are none until one asks."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.said = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.bias = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)
        self.free: list[int] = []

    def add(self, sampling: Sampling, prompt: Sequence[int], said: Sequence[int]) -> int:
        if not self.free:
            self._grow()
        row = self.free.pop()
        self.prompt[row].fill_(False).index_fill_(0, self._ids(prompt), True)
        ones = torch.ones(len(said), dtype=torch.int32, device=self.device)
        self.said[row].fill_(0).index_add_(0, self._ids(said), ones)
        values = _upload([value for _, value in sampling.bias], torch.float32, self.device)
        tokens = self._ids([token for token, _ in sampling.bias])
        self.bias[row].fill_(0).index_copy_(0, tokens, values)
        return row

    def drop(self, row: int) -> None:
        self.free.append(row)

    def apply(self, x: Tensor, edited: _Edited) -> Tensor:
        """The edited rows of x (S, V), (E, V)."""
        x = edited.rows.take(x).float()
        said = self.said.index_select(0, edited.tables)
        known = self.prompt.index_select(0, edited.tables) | (said > 0)
        repeated = torch.where(x > 0, x / edited.repetition, x * edited.repetition)
        x = torch.where(known, repeated, x)
        x = x - edited.presence * (said > 0) - edited.frequency * said
        return x + self.bias.index_select(0, edited.tables)

    def count(self, edited: _Edited, tokens: Tensor) -> None:
        """tokens (E,) were said."""
        places = edited.tables * self.vocab_size + tokens
        self.said.view(-1).index_add_(0, places, edited.ones)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return _upload(list(tokens), torch.int64, self.device)

    def _grow(self) -> None:
        old = len(self.said)
        more = max(4, old)
        self.prompt, self.said, self.bias = (
            torch.cat([x, x.new_zeros(more, self.vocab_size)])
            for x in (self.prompt, self.said, self.bias)
        )
        self.free = list(range(old + more - 1, old - 1, -1))


def _column(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _upload(values, dtype, device).unsqueeze(-1)


def _upload(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """To the device without waiting for it, which only pinned memory allows."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
