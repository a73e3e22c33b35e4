"""How the next token is chosen from logits, one sequence at a time.

Each sequence draws from a generator of its own, so with the same seed it gives the same text
whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. Filters apply in the order top_k, top_p, min_p, as in vLLM and
    transformers; each at its default does nothing."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # keep the k likeliest tokens
    top_p: float = 1.0  # keep the likeliest tokens that make up this probability
    min_p: float = 0.0  # keep tokens at least so likely, as a share of the likeliest
    seed: int | None = None  # None: another text each time
    stop_ids: tuple[int, ...] | None = None  # None: the config's eos_token_id; () never stops

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be 1 or more": self.max_tokens >= 1,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be over 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be between 0 and 1": 0 <= self.min_p <= 1,
        }
        for rule, holds in checks.items():
            if not holds:
                raise UserError(f"{rule}, got {getattr(self, rule.split()[0])}")

    def generator(self) -> torch.Generator:
        """A fresh source of randomness for one sequence."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """logits (V,) -> a token id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    wide = logits.float().cpu() / sampling.temperature
    if 0 < sampling.top_k < wide.numel():
        lowest = wide.topk(sampling.top_k).values[-1]
        wide = wide.masked_fill(wide < lowest, float("-inf"))
    probabilities = wide.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= sampling.top_p  # made up before this token
        probabilities[index[enough]] = 0
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
