"""The CPU's scan and convolution against the recurrence and the window, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba import ops
from hymba.ops import Segments
from hymba.ops.backend import forget
from hymba.ops.conv import causal_conv_reference
from hymba.ops.cpu import scan as kernels
from hymba.ops.cpu.team import Team
from hymba.ops.scan import selective_scan_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
LENGTHS = [(1,), (63,), (5, 1, 40, 2), (7, 7, 7), (1, 1, 1)]
WIDTHS = [(1, 1), (5, 8), (37, 16), (130, 16), (48, 3)]  # channels, states
STARTS = ["none", "shared", "own"]


def scan_inputs(segments: Segments, channels: int, states: int, start: str) -> dict[str, Any]:
    """u, dt and z are slices of one wide tensor, B and C of another, as in a model."""
    generator = torch.Generator().manual_seed(channels)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, dt, z = random(segments.total, 3 * channels + 1)[:, 1:].chunk(3, dim=1)
    B, C = random(segments.total, 2 * states + 2)[:, 2:].chunk(2, dim=1)
    count = {"none": 0, "shared": 1, "own": segments.count}[start]
    return {
        "u": u,
        "dt": 3 * dt,
        "A": -torch.exp(1.5 * random(channels, states) - 1.5),
        "B": B,
        "C": C,
        "D": random(channels),
        "z": z,
        "dt_bias": random(channels),
        "segments": segments,
        "initial_state": random(count, channels, states) if count else None,
    }


def conv_inputs(segments: Segments, channels: int, taps: int, start: str) -> dict[str, Any]:
    count = {"none": 0, "shared": 1, "own": segments.count}[start]
    generator = torch.Generator().manual_seed(channels)
    state = torch.randn(count, taps - 1, channels, generator=generator)
    return {
        "x": torch.randn(segments.total, channels + 3, generator=generator)[:, :channels],
        "weight": torch.randn(channels, taps, generator=generator),
        "bias": None if start == "none" else torch.randn(channels, generator=generator),
        "segments": segments,
        "initial_state": state if count else None,
    }


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) else x for k, x in inputs.items()}


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], allowed: float = 2e-6) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y.double()).norm() <= allowed * y.double().norm()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_scan(lengths: tuple[int, ...], start: str, width: tuple[int, int]) -> None:
    inputs = scan_inputs(Segments(lengths), *width, start)
    close(kernels.selective_scan(**inputs), selective_scan_reference(**wide(inputs)))


def test_long_memories() -> None:
    """Over many rows, where an error in a decay would add up: nothing but the first is added."""
    inputs = scan_inputs(Segments((3000,)), 20, 16, "own")
    inputs["A"] = -torch.full((20, 16), 1e-4)
    inputs["B"][1:] = 0
    y, state = kernels.selective_scan(**inputs)
    _, want = selective_scan_reference(**wide(inputs))
    assert (state.double() / want - 1).abs().max() < 5e-5


def test_a_state_that_is_not_finite_stays_in_its_segment() -> None:
    inputs = scan_inputs(Segments((4, 3)), 20, 16, "own")
    want = kernels.selective_scan(**inputs)
    inputs["u"][1, 3] = torch.nan
    y, state = kernels.selective_scan(**inputs)
    assert torch.equal(y[4:], want[0][4:]) and torch.equal(state[1], want[1][1])
    assert torch.isnan(y[1:4, 3]).all() and torch.isfinite(y[:, :3]).all()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", [(1, 4), (130, 4), (300, 2), (24, 3), (16, 1)], ids=str)
def test_conv(lengths: tuple[int, ...], start: str, shape: tuple[int, int]) -> None:
    inputs = conv_inputs(Segments(lengths), *shape, start)
    got, want = kernels.causal_conv(**inputs), causal_conv_reference(**inputs)
    close(got[:1], causal_conv_reference(**wide(inputs))[:1])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what is beside a segment, or a cut with the state handed on."""
    scans, convs = [scan_inputs(Segments((40, 60)), 700, 16, "own") for _ in range(2)]
    scan = kernels.selective_scan(**scans)
    conv = kernels.causal_conv(**conv_inputs(Segments((40, 60)), 700, 4, "own"))
    team = Team(threads)
    monkeypatch.setattr(kernels, "team", lambda: team)
    again = kernels.selective_scan(**convs)
    assert all(map(torch.equal, again, scan))
    first = {k: x[:40] if k in ("u", "dt", "z", "B", "C") else x for k, x in scans.items()}
    first |= {"segments": Segments((40,)), "initial_state": scans["initial_state"][:1]}
    y, state = kernels.selective_scan(**first)
    assert torch.equal(y, scan[0][:40]) and torch.equal(state[0], scan[1][0])
    assert conv[0].shape == (100, 700)
    team.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors(dtype: torch.dtype) -> None:
    """As the twins: computed wide, results in the dtype of what came, states of a scan wide."""
    inputs = scan_inputs(Segments((9, 4)), 37, 16, "own")
    narrow = {k: inputs[k].to(dtype) for k in ("u", "dt", "z", "B", "C")}
    y, state = kernels.selective_scan(**inputs | narrow)
    want, want_state = selective_scan_reference(**inputs | narrow)
    assert y.dtype == dtype and state.dtype == torch.float32
    close((y, state), (want, want_state), 1e-2)
    inputs = conv_inputs(Segments((9, 4)), 37, 4, "own")
    inputs |= {k: inputs[k].to(dtype) for k in ("x", "weight", "bias")}
    out, last = kernels.causal_conv(**inputs)
    assert out.dtype == last.dtype == dtype
    assert torch.equal(last, causal_conv_reference(**inputs)[1])


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_door(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for inference alone."""
    monkeypatch.setenv("HYMBA_BACKEND", backend)
    forget()
    calls = []
    for name in ("selective_scan", "causal_conv"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, k=kernel, n=name: calls.append(n) or k(*a))
    segments = Segments((6, 3))
    scan, conv = scan_inputs(segments, 20, 4, "own"), conv_inputs(segments, 20, 4, "own")
    want = ["selective_scan", "causal_conv"] if backend == "numba" else []
    ops.selective_scan(**scan), ops.causal_conv(**conv)
    assert calls == want
    ops.selective_scan(**wide(scan)), ops.causal_conv(**wide(conv))
    assert calls == want
    scan["dt_bias"].requires_grad_(), conv["weight"].requires_grad_()
    ops.selective_scan(**scan)[0].sum().backward()
    ops.causal_conv(**conv)[0].sum().backward()
    assert calls == want
    assert scan["dt_bias"].grad.any() and conv["weight"].grad.any()
    with torch.no_grad():
        ops.selective_scan(**scan), ops.causal_conv(**conv)
    assert calls == 2 * want
    compiled = torch.compile(ops.causal_conv, backend="eager")
    with torch.no_grad():
        compiled(**conv)
    assert calls == 2 * want
    forget()
