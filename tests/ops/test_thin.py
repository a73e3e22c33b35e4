"""Thin products: the plain forms are those of the ops they stand for, the kernels give the same.

Small sizes run on a CPU (kernels in Triton's interpreter), large ones on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.ops import thin

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
EPS = 1e-6
NAMES = "linear", "norm_linear", "norm_swiglu", "fuse_linear", "linear_add"
SMALL = [(1, 5, 3), (2, 37, 20)]  # rows, outputs, columns
LARGE = [(1, 8960, 1600), (2, 5504, 1600), (2, 1600, 5504), (1, 1600, 3200), (2, 132, 3200)]
LARGE += [(2, 32001, 1600)]


@pytest.fixture
def device(device: str) -> str:
    """For the kernels' tests, which alone ask for it."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here; the interpreter is for machines without")
    return device


def inputs(
    sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Any]:
    """All that any of them reads; rows are slices of wider ones, weights views of larger ones."""
    rows, outputs, columns = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (made * scale).to(device, dtype)

    x, y = random(rows, 2 * columns + 3)[:, :-3].split(columns, dim=1)
    weights = random(2, outputs, columns + 8, scale=columns**-0.5)[:, :, :columns]
    return {
        "x": x,
        "attention": x,
        "ssm": 3 * y,
        "norm_weight": 1 + random(columns, scale=0.2),
        "attention_weight": 1 + random(columns, scale=0.2),
        "ssm_weight": 1 + random(columns, scale=0.2),
        "weight": weights[0],
        "gate_weight": weights[0],
        "up_weight": weights[1],
        "residual": random(rows, outputs + 1)[:, 1:],
        "eps": EPS,
    }


ARGS = {
    "linear": ("x", "weight"),
    "norm_linear": ("x", "norm_weight", "eps", "weight"),
    "norm_swiglu": ("x", "norm_weight", "eps", "gate_weight", "up_weight"),
    "fuse_linear": (
        "attention", "ssm", "attention_weight", "ssm_weight", "eps", "weight", "residual",
    ),
    "linear_add": ("x", "weight", "residual"),
}  # fmt: skip


def call(op: Callable[..., Tensor], name: str, given: dict[str, Any]) -> Tensor:
    return op(*(given[arg] for arg in ARGS[name]))


def unfused(name: str, x: dict[str, Any]) -> Tensor:
    """As a block has them."""
    if name == "linear":
        return F.linear(x["x"], x["weight"])
    if name == "linear_add":
        return F.linear(x["x"], x["weight"]) + x["residual"]
    if name == "fuse_linear":
        heads = (x[arg] for arg in ARGS[name][:5])
        return F.linear(ops.fuse_heads(*heads), x["weight"]) + x["residual"]
    normed = ops.rms_norm(x["x"], x["norm_weight"], EPS)
    if name == "norm_linear":
        return F.linear(normed, x["weight"])
    return ops.swiglu(F.linear(normed, x["gate_weight"]), F.linear(normed, x["up_weight"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plain(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = inputs(sizes, dtype)
    want = unfused(name, given)
    assert torch.equal(call(getattr(thin, name), name, given), want)
    assert torch.equal(call(getattr(ops, name), name, given), want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Next to float64 no farther than the plain form, which rounds at the same places."""
    from hymba.ops import thin_triton

    if device == "cpu" and sizes in LARGE:
        pytest.skip("too large for the interpreter")
    given = inputs(sizes, dtype, device)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    want = call(getattr(thin, name), name, exact)
    got = call(getattr(thin_triton, name), name, given)
    plain = call(getattr(thin, name), name, given)
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    # Beside the plain form's own error, a few roundings of float32 sums. (The interpreter cuts
    # bfloat16 off in place of rounding, always in the same direction.)
    allowed = 1.2 * (plain.double() - want).norm() + 1e-6 * want.norm()
    if device == "cpu" and dtype == torch.bfloat16:
        allowed = 3e-2 * want.norm()
    assert (got.double() - want).norm() <= allowed
    assert torch.equal(call(getattr(thin_triton, name), name, given), got)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 5, 3), (20, 33, 600), (128, 132, 3200), (3, 132, 3200), (63, 132, 3202), (300, 48, 1600)],
    ids=str,
)
def test_narrow(sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Any number of rows, a sum of each in the same order always; columns of any number."""
    from hymba.ops import thin_triton

    if device == "cpu" and sizes[2] > 1000:
        pytest.skip("too large for the interpreter")
    given = inputs(sizes, dtype, device)
    x, weight = given["x"], given["weight"]
    want = F.linear(x.double(), weight.double())
    got = thin_triton.narrow_linear(x, weight)
    assert got.dtype == dtype
    # A sum, and for bfloat16 the result's own rounding.
    assert (got.double() - want).norm() < (3e-6 if dtype == torch.float32 else 6e-3) * want.norm()
    assert torch.equal(thin_triton.narrow_linear(x, weight), got)
    assert torch.equal(thin.narrow_linear(x, weight), F.linear(x, weight))
    assert thin_triton.narrow_linear(x[:0], weight).shape == (0, sizes[1])
    torch.library.opcheck(thin_triton.narrow_linear.op, (x, weight))


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_roundings_are_those_of_the_plain_form(name: str, device: str) -> None:
    """Nearly every number is the same in bfloat16: sums in another order seldom round elsewhere."""
    from hymba.ops import thin_triton

    if device == "cpu":
        pytest.skip("the interpreter does not round")
    given = inputs((2, 1600, 3200), torch.bfloat16, device)
    got = call(getattr(thin_triton, name), name, given)
    want = call(getattr(thin, name), name, given)
    # Plain swiglu rounds the gate alone too.
    assert (got == want).float().mean() > (0.6 if name == "norm_swiglu" else 0.98)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_as_they_are(name: str, device: str) -> None:
    from hymba.ops import thin_triton

    given = inputs(SMALL[1], torch.float32, device)
    args = tuple(given[arg] for arg in ARGS[name])
    torch.library.opcheck(getattr(thin_triton, name).op, args)
    none = given | {k: v[:0] for k, v in given.items() if k in ("x", "attention", "ssm")}
    none["residual"] = given["residual"][:0]
    assert call(getattr(thin_triton, name), name, none).shape == (0, 37)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("features", [1, 132, 1600, 5504, 32001])
@pytest.mark.parametrize("columns", [16, 2048, 4096, 8192, 65536])
def test_tiles(rows: int, features: int, columns: int) -> None:
    from hymba.ops.thin_triton import TILING, tile_of

    outputs, warps = tile_of(rows, features, columns, 1, TILING)
    assert outputs >= 1 and outputs & (outputs - 1) == 0 and warps in (2, 4, 8)
    assert outputs * columns <= max(columns, 256 * 32 * warps)


def test_chained_kernels_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a chain of kernels that start before the one before them has ended sees all of what
    it wrote, replayed as a graph too."""
    if device == "cpu":
        pytest.skip("on a GPU")
    from hymba.ops import thin_triton as kernels

    def chain(x: Tensor) -> Tensor:
        for _ in range(20):
            y = kernels.norm_swiglu(x, given["norm_weight"], EPS, *ups)
            x = kernels.linear_add(y, down, x)
        return x

    given = inputs((2, 1600, 1600), torch.bfloat16, device)
    ups = [torch.randn(5504, 1600, device=device).bfloat16() / 40 for _ in range(2)]
    down = torch.randn(1600, 5504, device=device).bfloat16() / 75
    monkeypatch.setattr(kernels, "TILING", kernels.TILING._replace(chain=False))
    want = chain(given["x"])
    monkeypatch.undo()
    assert torch.equal(chain(given["x"]), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(given["x"])
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, want)


def test_the_door() -> None:
    given = inputs((2, 6, 4))
    with pytest.raises(ValueError, match="narrow_linear"):
        ops.narrow_linear(given["x"], given["weight"][:, 1:])
    wrong = {
        "linear": {"weight": given["weight"][:, :3], "x": torch.ones(3, 4)},
        "norm_linear": {"norm_weight": given["norm_weight"][:3], "x": torch.ones(9, 4)},
        "norm_swiglu": {"up_weight": given["up_weight"][:5]},
        "fuse_linear": {"ssm": given["ssm"][:1], "residual": given["residual"][:, :5]},
        "linear_add": {"weight": given["weight"][:5], "residual": given["residual"][:1]},
    }
    for name, changes in wrong.items():
        for arg, value in changes.items():
            with pytest.raises(ValueError, match=name):
                call(getattr(ops, name), name, given | {arg: value})
