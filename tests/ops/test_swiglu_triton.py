"""The kernels of silu(gate) * up against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import swiglu as plain_op  # noqa: E402
from hymba.ops import swiglu_triton  # noqa: E402
from hymba.ops.swiglu_triton import swiglu  # noqa: E402

Agree = Callable[..., None]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype, device: str) -> Tensor:
    x = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return plain_op(gate.double(), up.double()).to(gate.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (7, 3, 24), (0, 4), (1001, 1376)], ids=str)
def test_plain(agree: Agree, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    if shape[0] > 1000 and device == "cpu":
        pytest.skip("for a GPU")
    kind = {"dtype": dtype, "device": device}
    agree(swiglu, plain, {"gate": random(*shape, **kind), "up": random(*shape, seed=1, **kind)})


def test_halves_of_one_projection(agree: Agree, device: str) -> None:
    """Rows of a slice do not follow each other; here a block of columns is no whole row either."""
    wide = random(5, 2 * (swiglu_triton.BLOCK + 7), dtype=torch.float32, device=device)
    gate, up = wide.chunk(2, dim=-1)
    assert not gate.is_contiguous()
    agree(swiglu, plain, {"gate": gate, "up": up})
    agree(swiglu, plain, {"gate": wide[:, :8:2], "up": wide[:, 3:7]})


def test_far_from_zero(device: str) -> None:
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=device).requires_grad_()
    up = torch.ones_like(gate)
    out = swiglu(gate, up)
    assert out.tolist() == [0, 0, 90, 200]
    assert torch.autograd.grad(out.sum(), gate)[0].tolist() == [0, 0, 1, 1]


def test_as_an_operator(device: str) -> None:
    gate, up = (random(4, 6, seed=s, dtype=torch.float32, device=device) for s in (0, 1))
    torch.library.opcheck(swiglu_triton._swiglu.op, (gate.requires_grad_(), up.requires_grad_()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled(agree: Agree) -> None:
    gate, up = (random(63, 100, seed=s, dtype=torch.float32, device="cuda") for s in (0, 1))
    agree(torch.compile(swiglu, fullgraph=True), plain, {"gate": gate, "up": up})
