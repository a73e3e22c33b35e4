"""Segments: the arithmetic everything else stands on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.ops import Segments


def test_the_picture_in_the_docstring() -> None:
    three = Segments((4, 2, 3))
    assert (three.starts, three.ends, three.total, three.count) == ((0, 4, 6), (3, 5, 8), 9, 3)
    assert list(three) == [(0, 4), (4, 2), (6, 3)]
    assert three.uniform is None


def test_uniform_says_when_rows_are_a_view() -> None:
    assert Segments((3, 3)).uniform == 3
    assert Segments((1,)).uniform == 1
    assert Segments(()).uniform is None  # no rows have no common length
    assert Segments(()).total == Segments(()).count == 0


def test_offsets_are_what_kernels_read() -> None:
    offsets = Segments((4, 2, 3)).offsets("cpu")
    assert offsets.dtype == torch.int32 and offsets.tolist() == [0, 4, 6, 9]


@pytest.mark.parametrize("lengths", [(0,), (3, 0, 2), (-1,), (2, -5)])
def test_an_empty_segment_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Segments(lengths)


def test_equal_lengths_are_equal_and_hashable() -> None:
    """They are keys of caches and arguments of compiled functions."""
    assert len({Segments((1, 2)), Segments((1, 2)), Segments((2, 1))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Segments((1,)).lengths = (2,)  # type: ignore[misc]


@given(st.lists(st.integers(1, 9), max_size=8))
def test_every_row_is_in_one_segment(lengths: list[int]) -> None:
    some = Segments(tuple(lengths))
    rows = [row for start, length in some for row in range(start, start + length)]
    assert rows == list(range(some.total))
    assert [end - start + 1 for start, end in zip(some.starts, some.ends, strict=True)] == lengths
