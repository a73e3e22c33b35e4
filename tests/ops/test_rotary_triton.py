"""The rotary kernel against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import rotary, rotary_triton  # noqa: E402
from hymba.ops.rotary_triton import rotate  # noqa: E402

Agree = Callable[..., None]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def tables(rows: int, width: int, device: str) -> dict[str, Tensor]:
    angles = torch.arange(rows * width // 2, device=device).view(rows, 1, width // 2) * 0.37
    return {"cos": angles.cos(), "sin": angles.sin()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (7, 5, 6), (13, 3, 16), (0, 2, 4), (1000, 25, 64)], ids=str
)
def test_plain(agree: Agree, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    if shape[0] == 1000 and device == "cpu":
        pytest.skip("for a GPU")
    x = random(*shape, dtype=dtype, device=device)
    agree(rotate, rotary.rotate, {"x": x}, tables(shape[0], shape[2], device))


def test_views(agree: Agree, device: str) -> None:
    """Queries and keys are slices of one projection; a gradient may be a transposed one."""
    wide, fixed = random(9, 40, dtype=torch.float32, device=device), tables(9, 8, device)
    for x in (wide[:, 3:27].unflatten(-1, (3, 8)), wide.view(9, 5, 8)[:, 1:4].transpose(1, 2).mT):
        agree(rotate, rotary.rotate, {"x": x}, fixed)
    x = random(2, 9, 8, dtype=torch.float32, device=device).transpose(0, 1)
    agree(rotate, rotary.rotate, {"x": x}, fixed)
    agree(rotate, rotary.rotate, {"x": random(9, 8, 2, dtype=x.dtype, device=device).mT}, fixed)


def test_as_an_operator(device: str) -> None:
    x = random(4, 3, 6, dtype=torch.float32, device=device).requires_grad_()
    torch.library.opcheck(rotary_triton._rotate.op, (x, *tables(4, 6, device).values(), False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled(agree: Agree) -> None:
    x = random(63, 5, 64, dtype=torch.float32, device="cuda")
    compiled = torch.compile(rotate, fullgraph=True)
    agree(compiled, rotary.rotate, {"x": x}, tables(63, 64, "cuda"))
