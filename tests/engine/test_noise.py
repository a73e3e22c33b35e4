"""The noise that makes of an argmax a draw: random every way, right far out, the same for tensors
and for integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hymba.engine.noise import branch, gumbel, noise_of, row_keys, signed, stream_key, token_steps
from hymba.engine.sampling_reference import noise
from tests.engine.chances import passes

V = 61


def keys_of(seeds: Sequence[int], indices: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """States of rows, (D,)."""
    keys = [stream_key(*pair) for pair in zip(seeds, indices, strict=True)]
    return row_keys(torch.tensor(keys), torch.tensor(numbers))


COUNTED, SAME = range(3000), [7] * 3000
NOISES = {
    "seeds": (COUNTED, SAME, SAME),
    "completions": (SAME, COUNTED, SAME),
    "numbers": (SAME, SAME, COUNTED),
}


@pytest.mark.parametrize("what", NOISES)
def test_noise_is_random_every_way(what: str) -> None:
    """Over seeds, completions or numbers in one direction and tokens in the other: evenly
    distributed, and independent of the next, above or beside it, and of the one after that."""
    u = (-(-gumbel(keys_of(*NOISES[what]), token_steps(300, "cpu")).double()).exp()).exp()
    cells = (u * 20).long().clamp(max=19)
    assert passes(cells.flatten().bincount(minlength=20).double(), torch.tensor(u.numel() / 20))
    fine = (u * 1000).long().clamp(max=999)
    for line in (fine[:, 0], fine[:, 299], fine[0], fine[2999]):  # one token, or one row
        coarse = line // 50
        assert passes(coarse.bincount(minlength=20).double(), torch.tensor(len(line) / 20))
    for step in (1, 2):
        for one, other in ((cells[step:], cells[:-step]), (cells[:, step:], cells[:, :-step])):
            pairs = (20 * one + other).flatten()
            assert passes(pairs.bincount(minlength=400).double(), torch.tensor(len(pairs) / 400))


def test_noise_is_right_far_out() -> None:
    """Of 64 million tokens, how many have so much noise as one in 2^8, ..., 2^20 should have:
    that much decides for tokens which are as unlikely."""
    steps, found = token_steps(32001, "cpu"), torch.zeros(4)
    levels = torch.tensor([8.0, 12.0, 16.0, 20.0])
    limits = -torch.log(-torch.log1p(-(2.0**-levels)))
    for keys in keys_of(range(2000), [0] * 2000, [0] * 2000).split(2):
        found += (gumbel(keys, steps).unsqueeze(-1) > limits).sum((0, 1))
    want = 2000 * 32001 * 2.0**-levels
    assert ((found - want).abs() < 4 * want.sqrt()).all()


def test_noise_by_its_formula() -> None:
    """Over all 32 bits, never infinite; exact where u is small, as float32 knows u elsewhere."""
    bits = [0, 1, 2, 1000, 2**20 + 1, 2**31, 2**32 - 2**20, 2**32 - 1]
    found = noise_of(torch.tensor(bits))
    u = [min((x + 0.5) * 2.0**-32, 1 - 2.0**-24) for x in bits]
    want = [-math.log(-math.log1p(-x)) for x in u]
    wrong = (found.double() - torch.tensor(want, dtype=torch.float64)).abs()
    assert wrong[:6].max() < 2e-6 and wrong.max() < 1e-4
    assert found.diff().max() < 0 and found[0] < 22.9 and found[-1] > -2.9


def test_splitmix() -> None:
    """The published generator's first numbers of seed 1234567; tensors and integers agree."""
    assert branch(1234567, 0) == 6457827717110365317
    assert branch(1234567, 1) == 3203168211198807973
    seeds = [0, 1, -1, 2**63 - 1, 2**64 - 1, -(2**63)]
    keys = torch.tensor([stream_key(seed, 2) for seed in seeds])
    for number in (0, 1, 2**31, 2**40):
        rows = row_keys(keys, torch.full_like(keys, number))
        assert rows.tolist() == [signed(branch(key % 2**64, number)) for key in keys.tolist()]
        want = torch.stack([noise(V, seed, 2, number) for seed in seeds])
        assert torch.equal(gumbel(rows, token_steps(V, "cpu")), want)
    assert signed(2**64 - 1) == -1 and len(set(keys.tolist())) == 5  # -1 is 2**64 - 1
