"""Random numbers without a state, and the noise that makes of an argmax a draw.

Every number is splitmix64's (Steele, Lea and Flood 2014) for a path: seed, completion, number of
the drawn token, token. So a request that was interrupted and goes on, or that stands beside any
others, draws what it would have drawn alone; int64 arithmetic is the same on every device.

The token with the highest logit + noise, where each token has Gumbel noise of its own, comes as
often as its probability says (Gumbel and Lieblein 1954). Where logits are a little off, as in
another batch size in bfloat16, another token is drawn only if two sums were nearly equal: a place
on a line of all probabilities would fall to another token whenever those before it moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
WORD = 2**64 - 1
HALF = 2**32 - 1
# A little under 2^-32, so that the greatest 32 bits, which float32 rounds to 2^32, stay under 1.
UNIT = 2.0**-32 * (1 - 2.0**-24)


def stream_key(seed: int, index: int) -> int:
    """Where the random numbers of a request's completion `index` begin, as an int64."""
    return signed(branch(branch(seed, 0), index))


def branch(word: int, number: int) -> int:
    """splitmix64's output `number` (from 0) of the state `word`, itself a state for others."""
    word = stir(word + (number + 1) * GOLDEN & WORD)
    return word ^ word >> 31


def stir(word: int) -> int:
    """64 bits in, 64 out, the upper half well mixed; of 0 it makes 0, so nothing is counted from
    0 here."""
    for shift, factor in MIXERS:
        word = (word ^ word >> shift) * factor & WORD
    return word


def signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


# The same for tensors; int64 wraps round on every device


def row_keys(keys: Tensor, numbers: Tensor) -> Tensor:
    """keys (D,) of streams, numbers of the drawn tokens (D,) -> (D,) states for the tokens."""
    word = _stir(keys + (numbers + 1) * signed(GOLDEN))
    return word ^ _shifted(word, 31)


def token_steps(vocab_size: int, device: torch.device | str) -> Tensor:
    """What each token adds to its row's state, (V,)."""
    return torch.arange(1, vocab_size + 1, device=device) * signed(GOLDEN)


def gumbel(rows: Tensor, steps: Tensor) -> Tensor:
    """rows (D,), steps (V,) -> noise (D, V), float32."""
    return noise_of(_shifted(_stir(rows.unsqueeze(-1) + steps), 32))


def noise_of(bits: Tensor) -> Tensor:
    """32 random bits, as int64, -> float32 between -2.9 and 22.9, never infinite. u in (0, 1) is
    fine where it is small: there the noise is great, and decides."""
    u = bits.float().add_(0.5).mul_(UNIT)
    return u.neg_().log1p_().neg_().log_().neg_()


def _stir(word: Tensor) -> Tensor:
    """In place, as a whole vocabulary is stirred."""
    for shift, factor in MIXERS:
        word.bitwise_xor_(_shifted(word, shift)).mul_(signed(factor))
    return word


def _shifted(word: Tensor, by: int) -> Tensor:
    return (word >> by).bitwise_and_(2 ** (64 - by) - 1)  # >> alone would repeat the sign
