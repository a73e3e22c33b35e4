"""The simple loop: prompts in, tokens out. It is what faster engines are measured against.

One rule, and no phases: a sequence has known tokens (prompt and what it has said) and computed
tokens (what its cache holds); a step computes some of what is missing, and a sequence whose
computed tokens have caught up says one more. So a long prompt is computed in chunks beside
sequences that already speak, and every row of the batch gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hymba.cache import Cache
from hymba.config import Config
from hymba.engine.grammar import Grammars, Matcher
from hymba.engine.request import Completion
from hymba.engine.sampling import Sampling
from hymba.engine.sampling_reference import sample_reference
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer

STEP_TOKENS = 1024  # new tokens that one step computes, over all sequences


class _Sequence:
    """One prompt and what it says. `matcher`: of its constraint; `tokenizer`: for stop strings."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        config: Config,
        tokenizer: Tokenizer | None,
        matcher: Matcher | None,
    ) -> None:
        self.index, self.prompt, self.known = index, list(prompt), list(prompt)
        self.sampling, self.seed = sampling, sampling.some_seed()
        self.tokenizer, self.matcher = tokenizer, matcher
        self.said = Completion()
        self.stop_ids = sampling.ends(config.eos_token_id)
        self.room = min(sampling.max_tokens, config.max_positions - len(prompt))

    def choose(self, logits: Tensor) -> int:
        """logits (V,) -> the next token."""
        allowed = None if self.matcher is None else self.matcher.allowed()
        said = self.said.tokens
        return sample_reference(logits, self.sampling, self.seed, 0, self.prompt, said, allowed)

    def say(self, token: int) -> None:
        if token in self.stop_ids:
            self.said.finish = "stop"
            return
        if self.matcher is not None and not self.matcher.accept(token):
            self.said.finish = "stop"  # nothing was allowed: the constraint is met, and has no end
            return
        self.known.append(token)
        self.said.tokens.append(token)
        if self._stopped() or (self.matcher is not None and self.matcher.finished):
            self.said.finish = "stop"
        elif len(self.said.tokens) >= self.room:
            self.said.finish = "length"

    def _stopped(self) -> bool:
        """Whether a stop string was said; `text` ends where the first of them begins."""
        if self.tokenizer is None:
            return False
        text = self.tokenizer.decode(self.said.tokens)
        found = [text.index(stop) for stop in self.sampling.stop if stop in text]
        self.said.text = text[: min(found)] if found else text
        return bool(found)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    step_tokens: int = STEP_TOKENS,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """Continue every prompt (token ids); one `Sampling` for all or one each.

    With a tokenizer the completions have a text too; stop strings and constraints need one. Raises
    UserError for an empty prompt, ids outside the vocabulary, or no position left."""
    sequences = _sequences(model.config, prompts, sampling, tokenizer)
    for _ in _run(model, sequences, step_tokens):
        pass
    return [sequence.said for sequence in sequences]


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    step_tokens: int = STEP_TOKENS,
    tokenizer: Tokenizer | None = None,
) -> Iterator[tuple[int, int | None, str | None]]:
    """As `generate`, token by token: (prompt's index, token or None, finish or None). A stop id
    is not given as a token; the tokens of a stop string are."""
    sequences = _sequences(model.config, prompts, sampling, tokenizer)
    for sequence, token in _run(model, sequences, step_tokens):
        yield sequence.index, token, sequence.said.finish


def _run(
    model: LanguageModel, sequences: list[_Sequence], step_tokens: int
) -> Iterator[tuple[_Sequence, int | None]]:
    """Whoever said a token, and the token (None: a stop id), until all are finished."""
    alive = sequences
    cache = _cache(model, len(alive))
    while alive:
        for sequence, logits in _step(model, alive, cache, step_tokens):
            before = len(sequence.said.tokens)
            sequence.say(sequence.choose(logits))
            spoke = len(sequence.said.tokens) > before
            yield sequence, sequence.said.tokens[-1] if spoke else None
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
    tokenizer: Tokenizer | None,
) -> list[_Sequence]:
    each = sampling if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
    if len(each) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(each)} samplings: give one, or one each")
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, config)
    for how in each:
        _check_sampling(how, config, tokenizer)
    matchers = [_matcher(how, config, tokenizer) for how in each]
    asked = enumerate(zip(prompts, each, matchers, strict=True))
    return [_Sequence(i, prompt, how, config, tokenizer, m) for i, (prompt, how, m) in asked]


def _matcher(sampling: Sampling, config: Config, tokenizer: Tokenizer | None) -> Matcher | None:
    if tokenizer is None:
        return None
    return Grammars(tokenizer, config.vocab_size, sampling.ends(config.eos_token_id)).matcher(
        sampling
    )


def _check_sampling(sampling: Sampling, config: Config, tokenizer: Tokenizer | None) -> None:
    sampling.check_vocabulary(config.vocab_size)
    if sampling.n != 1:
        raise UserError("this loop gives one completion a prompt: repeat the prompt, or use LLM")
    if tokenizer is None and (sampling.stop or sampling.constrained):
        raise UserError("stop strings and constraints need a tokenizer: pass tokenizer=")


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
