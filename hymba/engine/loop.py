"""The simple loop: prompts in, tokens out. It is what faster engines are measured against.

One rule, and no phases: a sequence has known tokens (prompt and what it has said) and computed
tokens (what its cache holds); a step computes some of what is missing, and a sequence whose
computed tokens have caught up says one more. So a long prompt is computed in chunks beside
sequences that already speak, and every row of the batch gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hymba.cache import Cache
from hymba.config import Config
from hymba.engine.sampling import Sampling, sample
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

STEP_TOKENS = 1024  # new tokens that one step computes, over all sequences


@dataclass
class Completion:
    """What one prompt was answered with. `finish` is "stop" (a stop id, left out), "length"
    (max_tokens, or the model's last position) or None while it goes on."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


class _Sequence:
    def __init__(self, index: int, prompt: Sequence[int], sampling: Sampling, config: Config):
        self.index, self.known, self.sampling = index, list(prompt), sampling
        self.said = Completion()
        self.generator = sampling.generator()
        eos = () if config.eos_token_id is None else (config.eos_token_id,)
        self.stop_ids = eos if sampling.stop_ids is None else sampling.stop_ids
        self.room = min(sampling.max_tokens, config.max_positions - len(prompt))

    def say(self, token: int) -> None:
        if token in self.stop_ids:
            self.said.finish = "stop"
            return
        self.known.append(token)
        self.said.tokens.append(token)
        if len(self.said.tokens) >= self.room:
            self.said.finish = "length"


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    step_tokens: int = STEP_TOKENS,
) -> list[Completion]:
    """Continue every prompt (token ids); one `Sampling` for all or one each.

    Raises UserError for an empty prompt, ids outside the vocabulary, or no position left."""
    completions = [Completion() for _ in prompts]
    for index, token, finish in stream(model, prompts, sampling, step_tokens):
        if token is not None:
            completions[index].tokens.append(token)
        completions[index].finish = finish
    return completions


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    step_tokens: int = STEP_TOKENS,
) -> Iterator[tuple[int, int | None, str | None]]:
    """As `generate`, token by token: (prompt's index, token or None, finish or None). A stop id
    is not given as a token."""
    alive = _sequences(model.config, prompts, sampling)
    cache = _cache(model, len(alive))
    while alive:
        for sequence, logits in _step(model, alive, cache, step_tokens):
            before = len(sequence.said.tokens)
            sequence.say(sample(logits, sequence.sampling, sequence.generator))
            token = sequence.said.tokens[-1] if len(sequence.said.tokens) > before else None
            yield sequence.index, token, sequence.said.finish
        going = [slot for slot, sequence in enumerate(alive) if sequence.said.finish is None]
        if 0 < len(going) < len(alive):
            cache.select(going)
        alive = [alive[slot] for slot in going]


@torch.no_grad()
def _cache(model: LanguageModel, slots: int) -> Cache:
    return model.new_cache(slots)


@torch.no_grad()
def _step(
    model: LanguageModel, alive: list[_Sequence], cache: Cache, step_tokens: int
) -> list[tuple[_Sequence, Tensor]]:
    """Compute up to `step_tokens` missing tokens; (sequence, logits (V,)) where one caught up."""
    slots, rows, counts = [], [], []
    left = max(1, step_tokens)
    for slot, sequence in enumerate(alive):
        computed = cache.lengths[slot]
        count = min(len(sequence.known) - computed, left)
        if count > 0:
            slots.append(slot)
            rows += sequence.known[computed : computed + count]
            counts.append(count)
            left -= count
    past = [cache.lengths[slot] for slot in slots]
    batch = Batch.of(counts, past, slots, device=model.device)
    hidden = model(torch.tensor(rows, device=model.device), batch, cache)
    caught_up = [i for i, s in enumerate(slots) if cache.lengths[s] == len(alive[s].known)]
    if not caught_up:
        return []
    last = torch.tensor([batch.segments.ends[i] for i in caught_up], device=model.device)
    logits = model.logits(hidden[last])  # (caught up, V)
    return [(alive[slots[i]], row) for i, row in zip(caught_up, logits, strict=True)]


def _sequences(
    config: Config,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None,
) -> list[_Sequence]:
    each = sampling if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
    if len(each) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(each)} samplings: give one, or one each")
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, config)
    pairs = zip(prompts, each, strict=True)
    return [_Sequence(i, prompt, how, config) for i, (prompt, how) in enumerate(pairs)]


def _check_prompt(index: int, prompt: Sequence[int], config: Config) -> None:
    if not prompt:
        raise UserError(f"prompt {index} is empty: a sequence begins with at least one token")
    if len(prompt) >= config.max_positions:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens; the model has {config.max_positions}"
            " positions and needs one for its answer"
        )
    bad = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise UserError(
            f"prompt {index}: token id {bad} is outside the vocabulary (0 to"
            f" {config.vocab_size - 1})"
        )
