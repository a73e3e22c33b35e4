"""The norms' kernels against the plain ops: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import norm, norm_triton, norms, norms_triton  # noqa: E402

EPS = 1e-6
Agree = Callable[..., None]
Rows = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def short_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs even for few rows, and less for the interpreter to do."""
    if device == "cpu":
        for name in ("forward_tile", "backward_tile"):
            monkeypatch.setattr(norm_triton, name, small_tile)
        monkeypatch.setattr(norms_triton, "ROWS", 4)


def small_tile(width: int, tensors: int, size: int = 4) -> norm_triton.Tile:
    return norm_triton.Tile(4, 1 << (width - 1).bit_length(), 1, programs=2)


@pytest.fixture
def rows(device: str) -> Rows:
    """rows(*shape, dtype, seed): of another size each, so that a mistaken scale shows."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        if len(shape) > 1:
            x *= torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)).sqrt()
        return x.to(device, dtype)

    return make


def shapes(device: str) -> list[tuple[int, ...]]:
    small = [(1, 2), (7, 24), (3, 2, 5), (40, 16)]
    return small if device == "cpu" else [*small, (1000, 100), (1001, 1600), (63, 3200), (9000, 16)]


@KINDS
@pytest.mark.parametrize("which", range(8))
def test_rms_norm(agree: Agree, rows: Rows, dtype: torch.dtype, which: int, device: str) -> None:
    if which >= len(shapes(device)):
        pytest.skip("for a GPU")
    shape = shapes(device)[which]
    fixed = {"eps": EPS}
    tensors = {"x": rows(*shape, dtype=dtype), "weight": rows(shape[-1], dtype=dtype, seed=1)}
    agree(norm_triton.rms_norm, norm.rms_norm, tensors, fixed)
    tensors["residual"] = rows(*shape, dtype=dtype, seed=2)
    agree(norm_triton.add_rms_norm, norm.add_rms_norm, tensors, fixed)


@KINDS
@pytest.mark.parametrize("which", range(8))
def test_fuse_heads(agree: Agree, rows: Rows, dtype: torch.dtype, which: int, device: str) -> None:
    if which >= len(shapes(device)):
        pytest.skip("for a GPU")
    shape = shapes(device)[which]
    tensors = {
        "attention": rows(*shape, dtype=dtype),
        "ssm": rows(*shape, dtype=dtype, seed=1),
        "attention_weight": rows(shape[-1], dtype=dtype, seed=2),
        "ssm_weight": rows(shape[-1], dtype=dtype, seed=3),
    }
    agree(norm_triton.fuse_heads, norm.fuse_heads, tensors, {"eps": EPS})


@KINDS
@pytest.mark.parametrize("widths", [(5, 3, 3), (8, 1, 16), (4, 7)], ids=str)
def test_rms_norms(
    agree: Agree, rows: Rows, dtype: torch.dtype, widths: tuple[int, ...], device: str
) -> None:
    """Of a slice, of three neighbours and of another number of them."""
    if device == "cuda":
        widths = tuple(20 * width for width in widths)
    wide = rows(37, sum(widths) + 3, dtype=dtype)
    weights = {f"w{i}": rows(w, dtype=dtype, seed=1 + i) for i, w in enumerate(widths)}

    def with_list(op: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, **given: tuple(op(x, list(given.values()), EPS))

    twins = with_list(norms_triton.rms_norms), with_list(norms.rms_norms)
    agree(*twins, {"x": wide[:, 2:-1]} | weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_order_of_roundings(rows: Rows, dtype: torch.dtype, device: str) -> None:
    """Nearly bit for bit: the square sums are added up in another order, which moves a number
    across a boundary now and then. A rounding less would move many."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts numbers off where bfloat16 rounds")
    x, y = rows(64, 24, dtype=dtype), rows(64, 24, dtype=dtype, seed=1)
    w, v = rows(24, dtype=dtype, seed=2), rows(24, dtype=dtype, seed=3)
    for op, tensors in (("rms_norm", (x, w)), ("fuse_heads", (x, y, w, v))):
        got, want = (getattr(module, op)(*tensors, EPS) for module in (norm_triton, norm))
        assert (got != want).float().mean() < 0.01
    got, want = (module.add_rms_norm(x, y, w, EPS) for module in (norm_triton, norm))
    assert torch.equal(got[1], want[1])
    assert (got[0] != want[0]).float().mean() < 0.01


def test_views(agree: Agree, rows: Rows) -> None:
    """Slices of columns, transposed rows, and a gradient that is one number repeated."""
    wide, weight = rows(9, 40), rows(12, seed=1)
    for x in (wide[:, 3:15], rows(12, 9).T, wide[:, 3:27:2]):
        assert not x.is_contiguous()
        agree(norm_triton.rms_norm, norm.rms_norm, {"x": x, "weight": weight}, {"eps": EPS})
        tensors = {"x": x, "residual": wide[:, 20:32], "weight": weight}
        agree(norm_triton.add_rms_norm, norm.add_rms_norm, tensors, {"eps": EPS})
        tensors = {"a": x, "b": wide[:, 20:32], "wa": weight, "wb": rows(12, seed=4)}
        agree(fused_by_name(norm_triton), fused_by_name(norm), tensors)
    grads = []
    for op in (norm_triton.rms_norm, norm.rms_norm):
        x = wide.clone().requires_grad_()
        grads.append(torch.autograd.grad(op(x, rows(40, seed=1), EPS).sum(), x)[0])
    torch.testing.assert_close(*grads)


def fused_by_name(module: object) -> Callable[..., Tensor]:
    return lambda a, b, wa, wb: module.fuse_heads(a, b, wa, wb, EPS)  # type: ignore[attr-defined]


def test_mixed_dtypes(agree: Agree, rows: Rows) -> None:
    """Weights in float32 and branches in bfloat16, as autocast has them."""
    a, b = rows(9, 12, dtype=torch.bfloat16), rows(9, 12, dtype=torch.bfloat16, seed=1)
    w, v = rows(12, seed=2), rows(12, seed=3)
    tensors = {"a": a, "b": b, "wa": w, "wb": v}
    agree(fused_by_name(norm_triton), fused_by_name(norm), tensors)
    agree(norm_triton.rms_norm, norm.rms_norm, {"x": a, "weight": w}, {"eps": EPS})
    tensors = {"x": a.float(), "residual": b, "weight": w}
    agree(norm_triton.add_rms_norm, norm.add_rms_norm, tensors, {"eps": EPS})


@pytest.mark.parametrize("wanted", ["x", "weight", "total alone"])
def test_only_what_is_wanted(rows: Rows, wanted: str) -> None:
    grads = []
    for op in (norm_triton.add_rms_norm, norm.add_rms_norm):
        x, weight = rows(9, 12).requires_grad_(wanted != "weight"), rows(12, seed=1)
        weight.requires_grad_(wanted == "weight")
        normed, total = op(x, rows(9, 12, seed=2), weight, EPS)
        out = total if wanted == "total alone" else normed
        leaf = weight if wanted == "weight" else x
        grads.append(torch.autograd.grad((out * rows(9, 12, seed=3)).sum(), leaf)[0])
    torch.testing.assert_close(*grads)


def test_no_rows(rows: Rows) -> None:
    x, w = rows(0, 12).requires_grad_(), rows(12).requires_grad_()
    outs = [norm_triton.rms_norm(x, w, EPS), norm_triton.fuse_heads(x, x, w, w, EPS)]
    outs += [*norm_triton.add_rms_norm(x, x, w, EPS)]
    outs += norms_triton.rms_norms(x, [w[:4], w[4:8], w[8:]], EPS)
    grads = torch.autograd.grad(sum(out.sum() for out in outs), [x, w])
    assert grads[0].shape == (0, 12) and (grads[1] == 0).all()


def test_as_operators(rows: Rows) -> None:
    """What torch.compile is told of them: shapes, dtypes, and how to go back."""
    x, y = rows(5, 6).requires_grad_(), rows(5, 6, seed=1).requires_grad_()
    w, v = rows(6, seed=2).requires_grad_(), rows(6, seed=3).requires_grad_()
    torch.library.opcheck(norm_triton._rms_norm.op, (x, w, EPS, x.dtype))
    torch.library.opcheck(norm_triton._add_rms_norm.op, (x, y, w, EPS, x.dtype))
    torch.library.opcheck(norm_triton._fuse_heads.op, (x, y, w, v, EPS, torch.bfloat16))
    three = [part.detach().requires_grad_() for part in w.split([3, 1, 2])]
    torch.library.opcheck(norms_triton._three_norms.op, (x, *three, EPS, x.dtype))


@pytest.mark.parametrize("twin", [norm, norm_triton], ids=["torch", "triton"])
def test_under_autocast_they_give_what_products_take(twin: Any, rows: Rows) -> None:
    """To the bit what a wide norm and a cast behind it give; gradients are those of its values.

    In float16: the interpreter cuts numbers off where bfloat16 rounds."""
    x, y, w, v = (rows(*shape, seed=i) for i, shape in enumerate([(5, 6), (5, 6), (6,), (6,)]))
    grad = rows(5, 6, seed=9).half()
    calls: list[Callable[..., Any]] = [
        lambda x, y, w, v: twin.rms_norm(x, w, EPS),
        lambda x, y, w, v: twin.add_rms_norm(x, y, w, EPS)[0],
        lambda x, y, w, v: twin.fuse_heads(x, y, w, v, EPS),
    ]
    for call in calls:
        wide, cast = ([t.clone().requires_grad_() for t in (x, y, w, v)] for _ in range(2))
        want = call(*wide)
        with torch.autocast(x.device.type, torch.float16):
            got = call(*cast)
        assert want.dtype == torch.float32 and torch.equal(got, want.half())
        want.backward(grad.float())
        got.backward(grad)
        for one, other in zip(cast, wide, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    with torch.autocast(x.device.type, torch.float16):
        parts = (norms_triton if twin is norm_triton else norms).rms_norms(
            x, w.split([3, 1, 2]), EPS
        )
        assert {part.dtype for part in parts} == {torch.float16}
        assert twin.rms_norm(x.double(), w.double(), EPS).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled(agree: Agree, rows: Rows, device: str) -> None:
    if device != "cuda":
        pytest.skip("for a GPU")

    @torch.compile(fullgraph=True)
    def both(x: Tensor, residual: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        normed, total = norm_triton.add_rms_norm(x, residual, weight, EPS)
        return norm_triton.fuse_heads(normed, total, weight, other, EPS)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        normed, total = norm.add_rms_norm(x, residual, weight, EPS)
        return norm.fuse_heads(normed, total, weight, other, EPS)

    tensors = {"x": rows(63, 100), "residual": rows(63, 100, seed=1)}
    tensors |= {"weight": rows(100, seed=2), "other": rows(100, seed=3)}
    agree(both, plain, tensors)
