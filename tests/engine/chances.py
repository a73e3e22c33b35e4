"""A test of chance for tests of what is drawn."""

from __future__ import annotations

from torch import Tensor


def passes(counts: Tensor, expected: Tensor) -> bool:
    """Pearson's chi-square, with the limit (Wilson and Hilferty's) that chance passes once in
    10 000 such tests."""
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum()) < limit
