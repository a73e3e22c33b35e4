"""The scan's kernels against the recurrence: Triton's, and on an NVIDIA GPU CUDA's too.

On a CPU they run in Triton's interpreter, so sizes there are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from hymba.ops import Segments, nvrtc, scan_cuda
from hymba.ops.scan import selective_scan_reference
from hymba.ops.scan_triton import _scan, selective_scan

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def inputs(
    segments: Segments,
    channels: int,
    states: int,
    start: str = "own",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Activations in `dtype`; A and the state float32, as the model has them. Time constants from
    half a token to a hundred, so that tiles must pass their states on."""
    generator = torch.Generator().manual_seed(segments.total + channels)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = segments.total
    found: dict[str, Tensor | None] = {n: random(rows, channels) for n in ("u", "dt", "z")}
    found |= {name: random(rows, states) for name in ("B", "C")}
    found |= {name: random(channels) for name in ("D", "dt_bias")}
    found = {name: None if x is None else x.to(dtype) for name, x in found.items()}
    found["A"] = -torch.exp(1.5 * random(channels, states) - 1.5)
    count = {"none": 0, "shared": 1, "own": segments.count}[start]
    found["initial_state"] = random(count, channels, states) if count else None
    return {name: None if x is None else x.to(device) for name, x in found.items()}


def in_double(**given: Any) -> tuple[Tensor, Tensor]:
    """The reference on exact inputs, rounded where the kernels round."""
    dtype = given["u"].dtype
    wide = {k: x.double() if isinstance(x, Tensor) else x for k, x in given.items()}
    y, final = selective_scan_reference(**wide)
    return y.to(dtype), final.float()


SMALL = [((1,), 4, 8, "none"), ((35,), 6, 16, "own"), ((3, 33, 1), 10, 8, "shared")]
LARGE = [
    ((1,), 3200, 16, "own"),
    ((63,), 1602, 16, "shared"),
    ((1000,), 322, 8, "own"),
    ((1000, 1, 64, 437), 200, 16, "shared"),
    ((700,) * 9, 98, 16, "own"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_kernels_are_the_recurrence(
    case: tuple[tuple[int, ...], int, int, str],
    dtype: torch.dtype,
    device: str,
    source: str,
    agree: Callable[..., None],
) -> None:
    """Outputs, final states and every gradient, by name."""
    if device == "cpu" and case in LARGE:
        pytest.skip("too large for the interpreter")
    lengths, channels, states, start = case
    segments = Segments(lengths)
    given = inputs(segments, channels, states, start, dtype, device)
    agree(selective_scan, in_double, given, {"segments": segments})


def test_column_slices(device: str, source: str, agree: Callable[..., None]) -> None:
    """Rows of one projection's output, as the model passes them, are read where they lie."""
    segments = Segments((20, 5))
    given = inputs(segments, 8, 8, device=device)

    def sliced(**rows: Any) -> tuple[Tensor, Tensor]:
        names = ("u", "z", "dt", "B", "C")
        together = torch.cat([rows[n] for n in names], dim=1)
        parts = together.split([rows[n].shape[1] for n in names], dim=1)
        return selective_scan(**rows | dict(zip(names, parts, strict=True)))

    agree(sliced, in_double, given, {"segments": segments})


def test_states_and_channels_of_any_number(
    device: str, source: str, agree: Callable[..., None]
) -> None:
    segments = Segments((7,))
    agree(selective_scan, in_double, inputs(segments, 5, 3, device=device), {"segments": segments})


def test_extremes(device: str, source: str) -> None:
    """Very long and very short steps, and rates of minus infinity, give numbers."""
    segments = Segments((6,))
    given = inputs(segments, 4, 8, device=device)
    given["dt"][0], given["dt"][1], given["A"][0] = 80.0, -80.0, -torch.inf
    for got, want in zip(
        selective_scan(**given, segments=segments),
        in_double(**given, segments=segments),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_a_broken_sequence_spoils_nobody_elses(device: str, source: str) -> None:
    segments = Segments((9, 9, 9))
    given = inputs(segments, 4, 8, device=device)
    given["u"][9:18] = torch.nan
    y, final = selective_scan(**given, segments=segments)
    assert [bool(x.isfinite().all()) for x in y.split(9)] == [True, False, True]
    assert final[[0, 2]].isfinite().all()


def test_one_node_for_a_compiler(device: str, source: str) -> None:
    """torch's own checks of schema, fake, autograd registration and tracing."""
    given = inputs(Segments((5, 2)), 4, 8, "shared", device=device)
    state = given.pop("initial_state")
    order = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    tensors = [given[name].requires_grad_() for name in order]
    torch.library.opcheck(_scan.op, (*tensors, [5, 2], state.requires_grad_(), True))


@pytest.mark.gpu
def test_many_pieces_and_one(monkeypatch: pytest.MonkeyPatch, agree: Callable[..., None]) -> None:
    """Cut in time, whatever the cut."""
    if not torch.cuda.is_available() or not nvrtc.present():
        pytest.skip("needs a GPU and cuda-core")
    segments = Segments((300, 95, 513))
    given = inputs(segments, 130, 16, device="cuda")
    forward = scan_cuda.forward_plan(segments, 130)
    adjoint, backward = scan_cuda.backward_plan(segments, 130, 16)
    for tiles in (1, 3, 100):
        plans = forward._replace(tiles=tiles), (adjoint, backward._replace(tiles=tiles))
        monkeypatch.setattr(scan_cuda, "forward_plan", lambda *_, p=plans[0]: p)
        monkeypatch.setattr(scan_cuda, "backward_plan", lambda *_, p=plans[1]: p)
        agree(selective_scan, in_double, given, {"segments": segments})
