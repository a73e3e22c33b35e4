"""RMSNorm and head fusion against their formulas, roundings included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba.ops import fuse_heads, rms_norm

EPS = 1e-6
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (7, 3, 24)])
def test_formula(shape: tuple[int, ...]) -> None:
    x, weight = rows(*shape), rows(shape[-1], seed=1)
    want = torch.stack(
        [r / (r.dot(r) / len(r) + EPS).sqrt() * weight for r in x.reshape(-1, shape[-1])]
    )
    torch.testing.assert_close(rms_norm(x, weight, EPS), want.view(shape), atol=1e-13, rtol=1e-13)


def test_eps_is_inside_the_root_and_counts() -> None:
    """For rows this small eps is most of the result; 1e-5 in its place would be seen."""
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    got = rms_norm(x, torch.ones(4, dtype=torch.float64), EPS)
    assert got[0, 0].item() == pytest.approx(1e-3 / (1e-6 + 1e-6) ** 0.5, rel=1e-12)
    assert (rms_norm(torch.zeros(2, 3), torch.ones(3), EPS) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_order_of_roundings(dtype: torch.dtype) -> None:
    """Statistics wide, cast back, *then* times the weight, as released: bit for bit. The other
    order rounds once less and differs somewhere in a few hundred numbers."""
    x, weight = rows(64, 24, dtype=dtype), rows(24, dtype=dtype, seed=1)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), wide.to(dtype) * weight)
    assert not torch.equal(rms_norm(x, weight, EPS), (wide * weight.float()).to(dtype))


def test_float64_is_not_computed_in_float32() -> None:
    x, weight = rows(5, 7), rows(7, seed=1)
    coarse = rms_norm(x.float(), weight.float(), EPS).double()
    assert 1e-9 < (rms_norm(x, weight, EPS) - coarse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fusion_is_the_mean_of_two_norms(dtype: torch.dtype) -> None:
    a, b = rows(63, 5, dtype=dtype), rows(63, 5, dtype=dtype, seed=1)
    wa, wb = rows(5, dtype=dtype, seed=2), rows(5, dtype=dtype, seed=3)
    got = fuse_heads(a, b, wa, wb, EPS)
    assert got.dtype == dtype
    assert torch.equal(got, (rms_norm(a, wa, EPS) + rms_norm(b, wb, EPS)) / 2)
    swapped = fuse_heads(b, a, wa, wb, EPS)
    assert not torch.allclose(got, swapped)  # each branch has its own weight


def test_gradients() -> None:
    def both(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
        return fuse_heads(a, b, wa, wb, EPS)

    inputs = [rows(3, 5), rows(3, 5, seed=1), rows(5, seed=2), rows(5, seed=3)]
    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in inputs])
