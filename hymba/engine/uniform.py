"""Random numbers without a state: splitmix64 (Steele, Lea and Flood 2014) of a key and a counter.

So a request that was interrupted and goes on, or that stands beside any others, draws what it
would have drawn alone; int64 arithmetic is the same on every device.
"""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
WORD = 2**64 - 1


def stream_key(seed: int, index: int) -> int:
    """Where the random numbers of a request's completion `index` begin, as an int64."""
    return signed(mix(mix(seed + GOLDEN & WORD) + (index + 1) * GOLDEN & WORD))


def mix(word: int) -> int:
    """64 bits in, 64 well mixed bits out; of 0 it makes 0, so nothing is counted from 0 here."""
    for shift, factor in MIXERS:
        word = (word ^ word >> shift) * factor & WORD
    return word


def signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def uniforms(keys: Tensor, numbers: Tensor) -> Tensor:
    """keys (D,), numbers of the drawn tokens (D,), int64 -> (D,) float64 in [0, 1)."""
    word = keys + (numbers + 1) * signed(GOLDEN)  # int64 wraps round on every device
    for shift, factor in MIXERS:
        word = (word ^ _shifted(word, shift)) * signed(factor)
    return _shifted(word, 11).double() * 2.0**-53


def _shifted(word: Tensor, by: int) -> Tensor:
    return (word >> by) & (2 ** (64 - by) - 1)  # >> alone would repeat the sign
