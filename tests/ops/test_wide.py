"""Wide products: the kernels give what the plain forms give, for any rows, sizes and tilings.

Small sizes run on a CPU (kernels in Triton's interpreter), large ones on a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.ops import wide

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
NAMES = "wide_linear", "wide_add", "wide_swiglu"
# Rows, outputs, columns.
SMALL = [(1, 5, 3), (9, 70, 100), (17, 130, 264), (100, 64, 128), (128, 40, 500), (130, 9, 8)]
LARGE = [(16, 8960, 1600), (33, 5504, 1600), (100, 1600, 5504), (128, 1600, 3200), (128, 330, 1602)]


@pytest.fixture
def device(device: str) -> str:
    """For the kernels' tests, which alone ask for it."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here; the interpreter is for machines without")
    return device


def inputs(
    name: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """An op's arguments; rows are slices of wider ones, weights views of larger ones."""
    rows, outputs, columns = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (made * scale).to(device, dtype)

    x = random(rows, columns + 3)[:, 3:]
    weights = random(2, outputs, columns + 8, scale=columns**-0.5)[:, :, :columns]
    residual = random(rows, outputs + 1)[:, 1:]
    more = {"wide_linear": (), "wide_add": (residual,), "wide_swiglu": (weights[1],)}
    return x, weights[0], *more[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plain(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, *more = args = inputs(name, sizes, dtype)
    want = F.linear(x, weight)
    if name == "wide_add":
        want = want + more[0]
    if name == "wide_swiglu":
        want = ops.swiglu(want, F.linear(x, more[0]))
    for module in (wide, ops):
        got = getattr(module, name)(*args)
        # A sum is rounded once in place of twice.
        torch.testing.assert_close(
            got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-9, atol=1e-2
        )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Next to float64 no farther than the plain form, and the same every time."""
    from hymba.ops import wide_triton

    if device == "cpu" and sizes in LARGE:
        pytest.skip("too large for the interpreter")
    args = inputs(name, sizes, dtype, device)
    want = getattr(wide, name)(*(x.double() for x in args))
    got, plain = (getattr(module, name)(*args) for module in (wide_triton, wide))
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    allowed = 1.2 * (plain.double() - want).norm() + 1e-6 * want.norm()
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off, and does not round
        allowed = 3e-2 * want.norm()
    assert (got.double() - want).norm() <= allowed
    assert torch.equal(getattr(wide_triton, name)(*args), got)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 3, 9])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tilings(
    name: str, flipped: bool, splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tiling gives the same, also with more parts than there are columns for."""
    from hymba.ops import wide_triton

    tile = wide_triton.Tiling(64, 32, 4, 3, splits, flipped)
    monkeypatch.setattr(wide_triton, "tile_of", lambda *sizes: tile)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for sizes in [(20, 70, 200), (100, 64, 136)]:
        args = inputs(name, sizes, dtype, device)
        want = getattr(wide, name)(*(x.double() for x in args))
        got = getattr(wide_triton, name)(*args)
        assert (got.double() - want).norm() < (3e-6 if device == "cpu" else 1e-2) * want.norm()


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name: str, device: str) -> None:
    from hymba.ops import wide_triton

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight, *more = inputs(name, (20, 40, 72), dtype, device)
    want = getattr(wide_triton, name)(x, weight, *more)
    x[7:] = float("nan")
    got = getattr(wide_triton, name)(x, weight, *more)
    assert torch.equal(got[:7], want[:7]) and got[7:].isnan().all()


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_as_they_are(name: str, device: str) -> None:
    from hymba.ops import wide_triton

    x, weight, *more = inputs(name, SMALL[1], torch.float32, device)
    torch.library.opcheck(getattr(wide_triton, name).op, (x, weight, *more))
    none = [t[:0] for t in more] if name == "wide_add" else more
    assert getattr(wide_triton, name)(x[:0], weight, *none).shape == (0, 70)


def test_chained_kernels_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a chain of kernels that start before the one before them has ended sees all of what
    it wrote, replayed as a graph too."""
    if device == "cpu":
        pytest.skip("on a GPU")
    from hymba.ops import wide_triton as kernels

    def chain(x: Tensor) -> Tensor:
        for _ in range(20):
            y = kernels.wide_swiglu(kernels.wide_linear(x, across), *ups)
            x = kernels.wide_add(y, down, x)
        return x

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16() / shape[-1] ** 0.5

    ups, down, across = (
        [random(5504, 1600) for _ in range(2)],
        random(1600, 5504),
        random(1600, 1600),
    )
    for rows in (16, 100):
        x = random(rows, 1600)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "chains", lambda *_: False)
            want = chain(x)
        assert torch.equal(chain(x), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x)
        for _ in range(5):
            graph.replay()
            assert torch.equal(out, want)


def test_the_door() -> None:
    for name in NAMES:
        x, weight, *more = inputs(name, (2, 6, 4))
        with pytest.raises(ValueError, match=name):
            getattr(ops, name)(x, weight[:, 1:], *more)
        for wrong in more:
            with pytest.raises(ValueError, match=name):
                getattr(ops, name)(x, weight, wrong[:1])
    x, weight, residual = inputs("wide_add", (2, 6, 4))
    with pytest.raises(ValueError, match="wide_add"):
        ops.wide_add(x, weight, residual[:, 1:])
