"""The selective scan: the fast forms against the recurrence, and what is true of any of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba import ops
from hymba.ops import Segments
from hymba.ops.scan import scan_step, selective_scan_chunked, selective_scan_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
scan_module = sys.modules["hymba.ops.scan"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(
    segments: Segments,
    channels: int = 5,
    states: int = 8,
    start: str = "own",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Activations in `dtype`; A and the state wide, as the model has them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, wide = segments.total, torch.promote_types(dtype, torch.float32)
    narrow = {name: random(rows, channels) for name in ("u", "dt", "z")}
    narrow |= {name: random(rows, states) for name in ("B", "C")}
    narrow |= {name: random(channels) for name in ("D", "dt_bias")}
    # Time constants from half a token to a hundred: chunks must pass their states on.
    made: dict[str, Tensor | None] = {name: x.to(dtype) for name, x in narrow.items()}
    made["A"] = -torch.exp(1.5 * random(channels, states) - 1.5).to(wide)
    count = {"none": 0, "shared": 1, "own": segments.count}[start]
    made["initial_state"] = random(count, channels, states).to(wide) if count else None
    return {name: None if x is None else x.to(device) for name, x in made.items()}


def recurrence(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, for one segment, written again: h (E, n) -> y (N, E), h."""
    rows = []
    for t in range(u.shape[0]):
        step = torch.log1p(torch.exp(dt[t] + dt_bias))
        h = torch.exp(torch.outer(step, torch.ones_like(B[t])) * A) * h
        h = h + torch.outer(step * u[t], B[t])
        rows.append((h * C[t]).sum(1) + D * u[t])
    return torch.stack(rows) * z / (1 + torch.exp(-z)), h


@pytest.mark.parametrize("op", [selective_scan_chunked, selective_scan_reference])
@pytest.mark.parametrize("rows", [1, 15, 16, 63, 257, 4200])
def test_definition(op: Callable[..., tuple[Tensor, Tensor]], rows: int) -> None:
    """To 1e-10 in float64, at lengths of one lane and of many, of one block and of several."""
    tensors = inputs(Segments((rows,)), channels=2, states=3)
    state = tensors.pop("initial_state")
    want, want_final = recurrence(**tensors, h=state[0])
    y, final = op(**tensors, segments=Segments((rows,)), initial_state=state)
    torch.testing.assert_close(y, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(final[0], want_final, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lengths", [(1,), (63,), (5, 1, 40, 2), (7, 7, 7), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("start", ["none", "shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twins(
    agree: Callable[..., None],
    lengths: tuple[int, ...],
    start: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    segments = Segments(lengths)
    tensors = inputs(segments, start=start, dtype=dtype, device=device)
    agree(selective_scan_chunked, selective_scan_reference, tensors, {"segments": segments})


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (37, 16), (130, 8), (24, 3)])
def test_widths(agree: Callable[..., None], channels: int, states: int, device: str) -> None:
    segments = Segments((9, 32))
    tensors = inputs(segments, channels, states, dtype=torch.float32, device=device)
    agree(selective_scan_chunked, selective_scan_reference, tensors, {"segments": segments})


@pytest.mark.parametrize("lengths", [(40,), (20, 20), (3, 30, 7), (1,) * 40], ids=str)
@pytest.mark.parametrize(("lanes", "steps"), [(1, 1), (1, 7), (4, 1), (3, 4), (2, 50)])
def test_any_cut_into_blocks_and_lanes(
    agree: Callable[..., None],
    lengths: tuple[int, ...],
    lanes: int,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Segments begin and end anywhere in a lane, and go over the edges of lanes and blocks."""
    monkeypatch.setattr(scan_module, "STEP_ELEMENTS", 3 * 2 * lanes)
    monkeypatch.setattr(scan_module, "BLOCK_ELEMENTS", 3 * 2 * lanes * steps)
    segments = Segments(lengths)
    tensors = inputs(segments, channels=3, states=2)
    agree(selective_scan_chunked, selective_scan_reference, tensors, {"segments": segments})


@pytest.mark.parametrize("start", ["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(agree: Callable[..., None], start: str, dtype: torch.dtype, device: str) -> None:
    """The decode step is the scan of segments of one row."""
    segments = Segments((1,) * 6)
    tensors = inputs(segments, 37, 16, start, dtype, device=device)

    def reference(initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_reference(**rest, segments=segments, initial_state=initial_state)

    def step(initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        return scan_step(**rest, state=initial_state)

    agree(step, reference, tensors)


@pytest.mark.parametrize("lengths", [(1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("start", ["none", "own"])
def test_the_door(agree: Callable[..., None], lengths: tuple[int, ...], start: str) -> None:
    """hymba.ops.selective_scan, whichever form it takes."""
    segments = Segments(lengths)
    fixed = {"segments": segments}
    agree(ops.selective_scan, selective_scan_reference, inputs(segments, start=start), fixed)


def test_inputs_that_are_views(agree: Callable[..., None]) -> None:
    """In the model u and z are slices of one projection, B and C of another."""
    segments = Segments((9, 20))
    tensors = inputs(segments, channels=6, states=4)
    wide = torch.randn(29, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = {"u": wide[:, :6], "z": wide[:, 6:12], "B": wide[:, 12:16], "C": wide[:, 16:]}
    views |= {"dt": tensors["dt"].T.contiguous().T, "A": tensors["A"].T.contiguous().T}
    assert not any(x.is_contiguous() for x in views.values())
    fixed = {"segments": segments}
    agree(selective_scan_chunked, selective_scan_reference, tensors | views, fixed)


EXTREMES = {
    "fast forgetting": {"A": -1e6},
    "faster than float32 can say": {"A": -1e30, "dt": 80.0},
    "no forgetting": {"A": -1e-12},
    "long steps": {"dt": 1e4},
    "no steps": {"dt": -200.0},
    "long steps, no forgetting": {"A": -1e-9, "dt": 1e4},
    "slow and fast side by side": {"A": [-1e6, -1e-6], "dt": [1e4, -30.0]},
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_decay_is_safe(agree: Callable[..., None], case: str, dtype: torch.dtype) -> None:
    """No division by a product of decays, no exponential of a large number: where the recurrence
    is finite, so are the chunks, forward and backward."""
    segments = Segments((50, 30))
    tensors = inputs(segments, channels=4, states=4, dtype=dtype)
    for name, value in EXTREMES[case].items():
        values = torch.tensor(value, dtype=dtype).reshape(-1)
        tensors[name] = values.repeat_interleave(4 // len(values)).expand_as(tensors[name]).clone()
    fixed = {"segments": segments}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    agree(selective_scan_chunked, selective_scan_reference, tensors, fixed, tolerance)


def test_gradcheck() -> None:
    """Against finite differences, so not even the recurrence is trusted."""
    segments = Segments((3, 18))
    tensors = inputs(segments, channels=2, states=2)
    names = list(tensors)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_chunked(**dict(zip(names, values, strict=True)), segments=segments)

    values = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(scan, values, fast_mode=True)


def test_only_the_state_or_only_the_output_may_matter() -> None:
    """A loss that looks at one of the two outputs gives the other no gradient, not NaN."""
    segments = Segments((5, 20))
    for which in (0, 1):
        grads = []
        for op in (selective_scan_chunked, selective_scan_reference):
            tensors = {k: x.requires_grad_() for k, x in inputs(segments).items()}
            out = op(**tensors, segments=segments)[which]
            given = list(tensors.values())
            grads.append(torch.autograd.grad(out.sum(), given, materialize_grads=True))
        for name, got, want in zip(tensors, *grads, strict=True):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10, msg=name)


@given(cut=st.integers(1, 39), seed=st.integers(0, 9))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_two_parts_are_the_whole(cut: int, seed: int) -> None:
    whole, rows = Segments((40,)), ("u", "dt", "z", "B", "C")
    tensors = inputs(whole, seed=seed)
    want, want_final = selective_scan_chunked(**tensors, segments=whole)
    first, second = ({k: tensors[k][part] for k in rows} for part in (slice(cut), slice(cut, None)))
    y1, state = selective_scan_chunked(**tensors | first, segments=Segments((cut,)))
    second |= {"initial_state": state}
    y2, final = selective_scan_chunked(**tensors | second, segments=Segments((40 - cut,)))
    torch.testing.assert_close(torch.cat([y1, y2]), want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(final, want_final, atol=1e-11, rtol=1e-11)


@given(st.lists(st.integers(1, 45), min_size=1, max_size=6), st.integers(0, 9))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_segments_do_not_know_each_other(lengths: list[int], seed: int) -> None:
    """Side by side in any lengths, each is what it is alone, wherever chunks cut it."""
    segments = Segments(tuple(lengths))
    tensors = inputs(segments, channels=3, states=2, seed=seed)
    y, final = selective_scan_chunked(**tensors, segments=segments)
    for index, (start, length) in enumerate(segments):
        part = {k: tensors[k][start : start + length] for k in ("u", "dt", "z", "B", "C")}
        state = tensors["initial_state"][index : index + 1]
        alone = tensors | part | {"initial_state": state, "segments": Segments((length,))}
        want, want_final = selective_scan_chunked(**alone)
        torch.testing.assert_close(y[start : start + length], want, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(final[index], want_final[0], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["u", "dt"])
def test_a_broken_sequence_spoils_nobody_elses(name: str, bad: float) -> None:
    """A server batches strangers: one that overflows must not turn its neighbours into NaN. Its
    state must be dropped at the border, not multiplied by zero."""
    segments = Segments((40, 40, 40))
    tensors = inputs(segments)
    tensors[name][40:80] = bad
    y, final = selective_scan_chunked(**tensors, segments=segments)
    broken = [not x.isfinite().all() for x in y.split(40)]
    assert broken == [False, True, False]
    assert final[[0, 2]].isfinite().all()


def test_states_stay_wide() -> None:
    """bfloat16 rows, float32 state: rounding a state at every token would add up."""
    tensors = inputs(Segments((9,)), dtype=torch.bfloat16)
    for op in (selective_scan_chunked, selective_scan_reference):
        y, final = op(**tensors, segments=Segments((9,)))
        assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
