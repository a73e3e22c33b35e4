"""Packed products on a CPU against their slow twins: the quantised way against the same integers in
torch, the exact way against the matrix written out, at odd sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.ops.backend import forget
from hymba.ops.cpu import tiles
from hymba.ops.cpu.team import Team
from hymba.ops.cpu.tiles import packed_linear, packed_linear_int8_reference
from hymba.ops.packed import (
    Packed,
    _name_faster,
    dequantize,
    pack,
    packed_linear_reference,
    quantize,
)
from hymba.schemes import SCHEMES, Scheme

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
ODD = [Scheme("odd4", 4, 48), Scheme("odd8", 8, 16)]
WHOLE = [scheme for scheme in SCHEMES.values() if scheme.kind == "int"]
KNOWN = pytest.mark.parametrize("scheme", WHOLE, ids=lambda scheme: scheme.name)
ALL = pytest.mark.parametrize("scheme", [*WHOLE, *ODD], ids=lambda scheme: scheme.name)
SIZES = [(1, 1), (31, 64), (40, 100), (132, 96), (320, 1600), (70, 5504)]  # rows and columns
COUNTS = [1, 2, 3, 4, 7, 130]


def matrix(rows: int, columns: int, scheme: Scheme) -> Packed:
    """Every code and both signs of scales; what is read beyond the columns would show."""
    generator = torch.Generator().manual_seed(rows + columns)
    groups = scheme.groups(columns)
    shape = rows, groups * scheme.group
    codes = torch.randint(-scheme.most - 1, scheme.most + 1, shape, generator=generator)
    scales = torch.randn(rows, groups, generator=generator) / 50
    return pack(codes.to(torch.int8), scales.half(), columns, scheme)


def activations(count: int, columns: int) -> Tensor:
    """Rows and groups of different sizes, a slice of wider ones."""
    x = torch.randn(count, columns + 3, generator=torch.Generator().manual_seed(count))
    x *= torch.linspace(0.1, 3, columns + 3) * torch.arange(1, count + 1)[:, None]
    return x[:, :columns]


def error(got: Tensor, want: Tensor) -> float:
    """Of the worst row."""
    assert got.shape == want.shape
    off = (got.double() - want.double()).norm(dim=1)
    return float((off / (want.double().norm(dim=1) + 1e-30)).max())


@ALL
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes: tuple[int, int], scheme: Scheme) -> None:
    packed = matrix(*sizes, scheme)
    written_out = dequantize(packed, torch.float64).T
    for count in COUNTS:
        x = activations(count, sizes[1])
        got, want = packed_linear(x, packed), x.double() @ written_out
        assert error(got, packed_linear_int8_reference(x, packed)) < 2e-6
        # A rounding of some 0.3 of a step of which 127 are the largest; less in one column.
        assert sizes[1] == 1 or 1e-3 < error(got, want) < 2e-2
        assert error(packed_linear(x, packed, exact=True), want) < 2e-6


@KNOWN
@pytest.mark.parametrize("exact", [False, True])
def test_a_row_does_not_depend_on_those_beside_it(scheme: Scheme, exact: bool) -> None:
    packed, x = matrix(70, 200, scheme), activations(11, 200)
    alone = torch.cat([packed_linear(row[None], packed, exact) for row in x])
    for count in range(1, 12):
        assert torch.equal(packed_linear(x[:count], packed, exact), alone[:count])
    assert torch.equal(packed_linear(x.flip(0), packed, exact).flip(0), alone)


@KNOWN
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nor_on_threads(scheme: Scheme, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels, too, are cut anywhere; and threads beyond the cores take pieces as others do."""
    packed, x = matrix(3000, 640, scheme), activations(9, 640)
    want = packed_linear(x, packed)
    team = Team(threads)
    monkeypatch.setattr(tiles, "team", lambda: team)
    for _ in range(20):
        assert torch.equal(packed_linear(x, packed), want)
    team.close()


@KNOWN
@pytest.mark.parametrize("exact", [False, True])
def test_more_rows_than_a_panel(scheme: Scheme, exact: bool) -> None:
    packed, x = matrix(33, 64, scheme), activations(tiles.PANEL + 5, 64)
    got = packed_linear(x, packed, exact)
    for row in (0, tiles.PANEL - 1, tiles.PANEL, tiles.PANEL + 4):
        assert torch.equal(got[row], packed_linear(x[row : row + 1], packed, exact)[0])


@KNOWN
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite_stays_in_its_row(scheme: Scheme, exact: bool) -> None:
    packed, x = matrix(40, 100, scheme), activations(7, 100)
    want = packed_linear(x, packed, exact)
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = x.clone()
        wrong[2, 50] = bad
        got = packed_linear(wrong, packed, exact)
        assert not torch.isfinite(got[2]).any()
        assert torch.equal(got[[0, 1, 3, 4, 5, 6]], want[[0, 1, 3, 4, 5, 6]])


@KNOWN
def test_zeros_and_what_is_nearly_zero(scheme: Scheme) -> None:
    packed = matrix(40, 100, scheme)
    for size in (0.0, 1e-38, 1e-42):
        got = packed_linear(torch.full((2, 100), size), packed)
        assert (got.abs() < 1e-33).all()


@KNOWN
def test_tiles_may_lie_anywhere(scheme: Scheme) -> None:
    """A file that is mapped puts them where it wants."""
    packed, x = matrix(40, 100, scheme), activations(3, 100)
    raw = torch.zeros(packed.tiles.numel() + 64, dtype=torch.uint8)
    for at in (1, 2, 8, 33):
        moved = raw[at : at + packed.tiles.numel()].view(packed.tiles.shape)
        moved.copy_(packed.tiles)
        for exact in (False, True):
            want = packed_linear(x, packed, exact)
            assert torch.equal(packed_linear(x, packed._replace(tiles=moved), exact), want)


@KNOWN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations(scheme: Scheme, dtype: torch.dtype) -> None:
    packed, x = matrix(40, 96, scheme), (activations(3, 96) / 10).to(dtype)
    got = packed_linear(x, packed)
    assert got.dtype == dtype
    assert torch.equal(got, packed_linear(x.float(), packed).to(dtype))


@KNOWN
def test_no_rows(scheme: Scheme) -> None:
    assert packed_linear(torch.ones(0, 100), matrix(40, 100, scheme)).shape == (0, 40)


def test_columns_must_fit() -> None:
    with pytest.raises(ValueError, match="x has 101 columns where 100 are needed"):
        packed_linear(torch.ones(1, 101), matrix(40, 100, SCHEMES["int4"]))


def test_floats_go_the_slow_way_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _name_faster.cache_clear()
    x, packed = activations(2, 100), quantize(activations(40, 100), SCHEMES["fp8"])
    with pytest.raises(ValueError, match="fp8 has no whole codes"):
        packed_linear(x, packed)
    for _ in range(2):
        assert torch.equal(ops.packed_linear(x, packed), packed_linear_reference(x, packed))
    assert [record.getMessage() for record in caplog.records] == [
        "hymba: fp8 is slow on a CPU: take int8, as small and nearer"
    ]


@pytest.mark.parametrize("scheme", [Scheme("a", 4, 8), Scheme("b", 2, 32)], ids=str)
def test_schemes_without_kernels(scheme: Scheme) -> None:
    with pytest.raises(ValueError, match="no kernel for . bits in groups of"):
        tiles.kernels(scheme.bits, scheme.group)


EXACT = """
import torch
from hymba.ops.cpu.tiles import packed_linear
from tests.ops.cpu.test_tiles import SCHEMES, activations, dequantize, error, matrix
packed, x = matrix(40, 100, SCHEMES["int4"]), activations(3, 100)
print(error(packed_linear(x, packed), x.double() @ dequantize(packed, torch.float64).T) < 2e-6)
"""


@pytest.mark.parametrize("asked", ["0", "1"])
def test_exact_by_the_environment(asked: str) -> None:
    env = os.environ | {"HYMBA_EXACT": asked}
    done = subprocess.run([sys.executable, "-c", EXACT], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(asked == "1"), done.stderr


@pytest.mark.parametrize("asked", [None, "torch", "numba"])
def test_the_door(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by default; and never where a gradient is wanted, or doubles come."""
    if asked:
        monkeypatch.setenv("HYMBA_BACKEND", asked)
    else:
        monkeypatch.delenv("HYMBA_BACKEND", raising=False)
    forget()
    packed, x = matrix(40, 100, SCHEMES["int8"]), activations(3, 100)
    kernels, plain = packed_linear(x, packed), x @ dequantize(packed).T
    taken, other = (plain, kernels) if asked == "torch" else (kernels, plain)
    assert error(ops.packed_linear(x, packed), taken) < 2e-6 < 1e-3 < error(taken, other)
    assert error(ops.packed_linear(x.double(), packed), plain) < 2e-6
    ops.packed_linear(x.requires_grad_(), packed).sum().backward()
    assert torch.allclose(x.grad, dequantize(packed).sum(0), rtol=1e-4)
    forget()


@pytest.mark.parametrize("chosen", ["torch", "numba"])
@pytest.mark.parametrize("count", [1, 5])
def test_products_with_their_neighbours(
    chosen: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever serves: the same four products, of which only inputs are rounded, on a CPU."""
    monkeypatch.setenv("HYMBA_BACKEND", chosen)
    forget()
    generator = torch.Generator().manual_seed(count)
    held = quantize(torch.randn(128, 96, generator=generator) / 10, SCHEMES["int4"])
    x, y, residual = (torch.randn(count, n, generator=generator) for n in (96, 96, 128))
    one, two = torch.randn(2, 96, generator=generator)
    weight = dequantize(held, torch.float64)

    def normed(rows: Tensor, by: Tensor) -> Tensor:
        return F.rms_norm(rows.double(), (96,), by.double(), 1e-6)

    gate, up = (normed(x, one) @ weight.T).chunk(2, dim=-1)
    pairs = [
        (ops.packed_norm_linear(x, one, 1e-6, held), normed(x, one) @ weight.T),
        (ops.packed_norm_swiglu(x, one, 1e-6, held), F.silu(gate) * up),
        (ops.packed_linear_add(x, held, residual), residual + x.double() @ weight.T),
        (
            ops.packed_fuse_linear(x, y, one, two, 1e-6, held, residual),
            residual + (normed(x, one) + normed(y, two)) / 2 @ weight.T,
        ),
    ]
    for got, want in pairs:
        assert (got - want).norm() <= (1e-6 if chosen == "torch" else 2e-2) * want.norm()
    forget()
