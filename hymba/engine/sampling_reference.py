"""The slow twin of `Sampler`: one row, on the CPU, step by step. Nothing here is clever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hymba.engine.noise import GOLDEN, UNIT, WORD, branch, stir, stream_key
from hymba.engine.sampling import SHARES, Sampling


@torch.no_grad()
def sample_reference(
    logits: Tensor,
    sampling: Sampling,
    seed: int,
    index: int,
    prompt: Sequence[int],
    said: Sequence[int],
    allowed: Tensor | None = None,
) -> int:
    """logits (V,) and the tokens so far -> the next one. allowed: (V,) bool, of a constraint."""
    x = edited(logits.cpu().float(), sampling, prompt, said)
    if allowed is not None:
        x = x.masked_fill(~allowed, -math.inf)
    if sampling.greedy:
        return int(x.argmax())
    x = filtered((x - x.max()) / torch.tensor([sampling.temperature]), sampling)
    return int((x + noise(len(x), seed, index, len(said))).argmax())


def edited(x: Tensor, sampling: Sampling, prompt: Sequence[int], said: Sequence[int]) -> Tensor:
    """Penalties and bias on logits (V,)."""
    if not sampling.edits:
        return x
    counts = torch.zeros(len(x), dtype=torch.int32)
    for token in said:
        counts[token] += 1
    known = torch.tensor(sorted({*prompt, *said}), dtype=torch.int64)
    x, factor = x.clone(), torch.tensor([sampling.repetition_penalty])
    x[known] = torch.where(x[known] > 0, x[known] / factor, x[known] * factor)
    x = x - torch.tensor([sampling.presence_penalty]) * (counts > 0)
    x = x - torch.tensor([sampling.frequency_penalty]) * counts
    for token, value in sampling.bias:
        x[token] += value
    return x


def filtered(x: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) after the temperature, the highest 0, with -inf for what top_k, top_p and min_p
    leave out."""
    if 0 < sampling.top_k < len(x):
        kth = sorted(x.tolist(), reverse=True)[sampling.top_k - 1]
        x = x.masked_fill(x < kth, -math.inf)
    if sampling.top_p < 1:
        ordered = sorted(x.tolist(), reverse=True)
        shares = _shares(torch.tensor(ordered))
        enough = sampling.top_p * sum(shares)
        before = [0, *accumulate(shares)]
        kept = [value for value, mass in zip(ordered, before, strict=False) if mass < enough]
        x = x.masked_fill(x < kept[-1], -math.inf)
    if sampling.min_p > 0:
        x = x.masked_fill(x < torch.tensor([math.log(sampling.min_p)]), -math.inf)
    return x


def noise(vocab_size: int, seed: int, index: int, number: int) -> Tensor:
    """(V,) Gumbel noise of the tokens that may be token `number` of completion `index`."""
    row = branch(stream_key(seed, index), number)
    bits = [stir(row + (token + 1) * GOLDEN & WORD) >> 32 for token in range(vocab_size)]
    u = (torch.tensor(bits, dtype=torch.float32) + 0.5) * UNIT
    return -torch.log(-torch.log1p(-u))


def _shares(x: Tensor) -> list[int]:
    return [int(p * SHARES) for p in x.softmax(-1).tolist()]
