"""The CPU's norms, fusion, gate and rotation against plain PyTorch in float64, at odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba import ops
from hymba.ops import norm, norms, rotary
from hymba.ops.backend import forget
from hymba.ops.cpu import rows as kernels
from hymba.ops.cpu.team import Team
from hymba.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
EPS = 1e-6
SIZES = [(1, 1), (7, 5), (63, 16), (130, 100), (40, 1600), (3, 5504)]
Op = Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    """A slice of wider rows, as a model's are of a projection."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-1], shape[-1] + 3, generator=generator)[..., 3:]


def inputs(count: int, size: int) -> dict[str, tuple[Op, Op, tuple[Any, ...]]]:
    """name: the kernel, its twin, what both are given."""
    x, y = random(count, size), random(count, size, seed=1)
    a, b = random(size, seed=2), random(size, seed=3)
    heads, angles = random(count, 3, 2 * size, seed=4), random(count, 1, size, seed=5)
    turns = angles.cos(), angles.sin()
    return {
        "rms_norm": (kernels.rms_norm, norm.rms_norm, (x, a, EPS)),
        "add_rms_norm": (kernels.add_rms_norm, norm.add_rms_norm, (x, y, a, EPS)),
        "fuse_heads": (kernels.fuse_heads, norm.fuse_heads, (x, y, a, b, EPS)),
        "swiglu": (kernels.swiglu, swiglu, (10 * x, y)),
        "rotate": (kernels.rotate, rotary.rotate, (heads, *turns)),
    }


def wide(values: tuple[Any, ...]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in values]


def each(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", inputs(1, 1))
def test_twins(name: str, size: tuple[int, int]) -> None:
    kernel, twin, values = inputs(*size)[name]
    for got, want in zip(each(kernel(*values)), each(twin(*wide(values))), strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got.double() - want).norm() <= 5e-7 * want.norm()


@pytest.mark.parametrize("name", inputs(1, 1))
def test_rows_do_not_know_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor how many threads there are."""
    kernel, _, values = inputs(300, 400)[name]
    whole = each(kernel(*values))
    team = Team(3)
    monkeypatch.setattr(kernels, "team", lambda: team)
    assert all(map(torch.equal, each(kernel(*values)), whole))
    for row in (0, 137, 299):
        some = [x[row : row + 1] if isinstance(x, Tensor) and len(x) == 300 else x for x in values]
        for got, want in zip(each(kernel(*some)), whole, strict=True):
            assert torch.equal(got[0], want[row])
    team.close()


def test_any_number_of_dimensions() -> None:
    x, weight = random(2, 3, 24), random(24, seed=1)
    torch.testing.assert_close(kernels.rms_norm(x, weight, EPS), norm.rms_norm(x, weight, EPS))
    assert kernels.rms_norm(x[:0], weight, EPS).shape == (0, 3, 24)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", inputs(1, 1))
def test_the_door(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for inference in float32 alone: narrow numbers are rounded in the released order."""
    monkeypatch.setenv("HYMBA_BACKEND", backend)
    forget()
    calls: list[str] = []
    kernel, twin, values = inputs(9, 20)[name]
    monkeypatch.setattr(kernels, name, lambda *a: calls.append(name) or kernel(*a))
    op, want = getattr(ops, name), [name] if backend == "numba" else []
    op(*values)
    assert calls == want
    for dtype in (torch.float64, torch.bfloat16):
        given = [x.to(dtype) if isinstance(x, Tensor) else x for x in values]
        assert all(map(torch.equal, each(op(*given)), each(twin(*given))))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, each(op(*values)), each(twin(*values))))
    values[0].requires_grad_()
    each(op(*values))[0].sum().backward()
    assert calls == want and values[0].grad.any()
    with torch.no_grad():
        op(*values)
    assert calls == 2 * want
    forget()


def test_neighbouring_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_BACKEND", "numba")
    forget()
    x, weights = random(40, 132), [random(size, seed=size) for size in (100, 16, 16)]
    for got, want in zip(
        ops.rms_norms(x, weights, EPS), norms.rms_norms(x, weights, EPS), strict=True
    ):
        torch.testing.assert_close(got, want)
    forget()
