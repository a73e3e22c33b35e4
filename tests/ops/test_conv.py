"""The causal convolution against its twin, and both against a loop over rows and taps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import exp

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba.ops import Segments
from hymba.ops.conv import causal_conv, causal_conv_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
conv_module = sys.modules["hymba.ops.conv"]
LENGTHS = [(1,), (63,), (5, 1, 2, 17), (3, 3, 3), (1, 1, 1)]  # shorter than the taps, too


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    segments: Segments, channels: int, taps: int, dtype: torch.dtype, start: str, device: str
) -> dict[str, Tensor | None]:
    states = {"none": 0, "shared": 1, "own": segments.count}[start]
    made = {
        "x": random(segments.total, channels, dtype=dtype),
        "weight": random(channels, taps, seed=1, dtype=dtype),
        "bias": random(channels, seed=2, dtype=dtype),
        "initial_state": random(states, taps - 1, channels, seed=3, dtype=dtype)
        if states
        else None,
    }
    return {name: None if x is None else x.to(device) for name, x in made.items()}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("start", ["none", "shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_twins(
    agree: Callable[..., None],
    lengths: tuple[int, ...],
    start: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    segments = Segments(lengths)
    tensors = inputs(segments, 5, 4, dtype, start, device)
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


@pytest.mark.parametrize("taps", [2, 3, 7])
@pytest.mark.parametrize("lengths", [(1,), (4, 1, 9), (6, 6)], ids=str)
def test_any_number_of_taps(
    agree: Callable[..., None], taps: int, lengths: tuple[int, ...], device: str
) -> None:
    segments = Segments(lengths)
    tensors = inputs(segments, 24, taps, torch.float64, "own", device)
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


def test_without_a_bias(agree: Callable[..., None]) -> None:
    segments = Segments((4, 9))
    tensors = inputs(segments, 5, 4, torch.float64, "own", "cpu") | {"bias": None}
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


@pytest.mark.parametrize("op", [causal_conv, causal_conv_reference])
def test_formula(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """out[t] = silu(bias + sum_j weight[j] x[t - K + 1 + j]) with the state to the left."""
    segments = Segments((2, 6))
    t = inputs(segments, 3, 4, torch.float64, "own", "cpu")
    out, final = op(**t, segments=segments)
    x, weight, bias, state = t.values()
    for index, (start, length) in enumerate(segments):
        rows = [*state[index], *x[start : start + length]]
        for row in range(length):
            for channel in range(3):
                value = bias[channel].item()
                value += sum((weight[channel, j] * rows[row + j][channel]).item() for j in range(4))
                silu = value / (1 + exp(-value))
                assert out[start + row, channel].item() == pytest.approx(silu, abs=1e-12)
        assert torch.equal(final[index], torch.stack(rows[-3:]))


@pytest.mark.parametrize("lengths", [(4, 9), (5, 5)], ids=str)
def test_inputs_that_are_views(agree: Callable[..., None], lengths: tuple[int, ...]) -> None:
    """In the model x is a slice of a wider projection."""
    segments = Segments(lengths)
    wide = random(segments.total, 9)
    tensors = inputs(segments, 5, 4, torch.float64, "own", "cpu")
    for view in (wide[:, 2:7], random(5, segments.total).T):
        assert not view.is_contiguous()
        agree(causal_conv, causal_conv_reference, tensors | {"x": view}, {"segments": segments})


@given(cut=st.integers(1, 10), seed=st.integers(0, 9))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_two_parts_are_the_whole(cut: int, seed: int) -> None:
    """What one part leaves is what the next starts from, even where a part is one row."""
    x, weight, bias = random(11, 3, seed=seed), random(3, 4, seed=1), random(3, seed=2)
    want, want_final = causal_conv(x, weight, bias, Segments((11,)))
    first, state = causal_conv(x[:cut], weight, bias, Segments((cut,)))
    second, final = causal_conv(x[cut:], weight, bias, Segments((11 - cut,)), state)
    torch.testing.assert_close(torch.cat([first, second]), want, atol=1e-12, rtol=0)
    assert torch.equal(final, want_final)
