"""Cross-entropy by kernel against its reference: the loss, its gradients, and what it holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import loss_triton  # noqa: E402
from hymba.ops.loss import linear_cross_entropy_reference  # noqa: E402
from hymba.ops.loss_triton import linear_cross_entropy  # noqa: E402

Agree = Callable[..., None]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def inputs(
    rows: int, words: int, device: str, dtype: torch.dtype = torch.float32, width: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels; every third label does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (rows, words))
    labels = torch.randint(0, words, (rows,), generator=generator)
    labels[2::3] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


@pytest.fixture
def small(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and several blocks of words."""
    monkeypatch.setattr(loss_triton, "BLOCK", 16)
    monkeypatch.setattr(loss_triton, "CHUNK_ROWS", 8)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows", [1, 8, 19])
@pytest.mark.parametrize("words", [16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids="z {}".format)
def test_reference(
    agree: Agree, rows: int, words: int, dtype: torch.dtype, z_loss: float, device: str
) -> None:
    hidden, weight, labels = inputs(rows, words, device, dtype)
    tensors = {"hidden": hidden, "weight": weight}
    fixed = {"labels": labels, "z_loss": z_loss}
    agree(linear_cross_entropy, reference, tensors, fixed)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """In float32, whatever the inputs are."""
    return linear_cross_entropy_reference(hidden.float(), weight.float(), labels, z_loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes for a GPU")
@pytest.mark.parametrize("rows", [1, 63, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4], ids="z {}".format)
def test_sizes(agree: Agree, rows: int, dtype: torch.dtype, z_loss: float) -> None:
    """More rows than a chunk has, and the odd number of words of the 1.5B."""
    hidden, weight, labels = inputs(rows, 32001, "cuda", dtype, width=100)
    weight /= 10
    tensors = {"hidden": hidden, "weight": weight}
    agree(linear_cross_entropy, reference, tensors, {"labels": labels, "z_loss": z_loss})


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_counts(rows: int, z_loss: float, device: str) -> None:
    """A row of padding alone: a loss of 0 with gradients of 0, not NaN."""
    hidden, weight, labels = inputs(rows, 11, device)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100), z_loss)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("which", ["hidden", "weight", "neither"])
def test_a_frozen_side(which: str, device: str) -> None:
    found = []
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels = inputs(9, 11, device)
        tensors = {"hidden": hidden, "weight": weight}
        if which in tensors:
            tensors[which].requires_grad_()
        loss = op(hidden, weight, labels)
        assert loss.requires_grad == (which in tensors)
        found.append(torch.autograd.grad(loss, tensors[which]) if which in tensors else (loss,))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_what_follows_scales_it(device: str) -> None:
    """Gradients are made in forward, so backward must scale them, every time it is called."""
    hidden, weight, labels = inputs(9, 11, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    leaves = [hidden, weight]
    one = torch.autograd.grad(loss, leaves, retain_graph=True)
    three = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(one, three, again, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, c)


def test_huge_logits(device: str) -> None:
    hidden, weight, labels = inputs(9, 11, device)
    loss = linear_cross_entropy((1e4 * hidden).requires_grad_(), weight, labels)
    loss.backward()
    assert loss.isfinite()


def test_views(agree: Agree, device: str) -> None:
    hidden, weight, labels = inputs(9, 11, device, width=10)
    tensors = {"hidden": hidden[:, ::2], "weight": weight.T.contiguous().T[:, ::2]}
    assert not any(x.is_contiguous() for x in tensors.values())
    fixed = {"labels": labels.repeat_interleave(2)[::2]}
    agree(linear_cross_entropy, linear_cross_entropy_reference, tensors, fixed)


def test_autocast(device: str) -> None:
    """Products in bfloat16, gradients in the dtype of what they belong to."""
    hidden, weight, labels = inputs(9, 11, device)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels).backward()
    exact = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    linear_cross_entropy_reference(*exact, labels).backward()
    for got, want in zip((hidden, weight), exact, strict=True):
        assert got.grad is not None and want.grad is not None
        off = (got.grad - want.grad).norm() / want.grad.norm()
        assert got.grad.dtype == torch.float32 and 1e-5 < off < 0.02


def test_as_an_operator(device: str) -> None:
    hidden, weight, labels = inputs(5, 7, device)
    args = hidden.requires_grad_(), weight.requires_grad_(), labels
    torch.library.opcheck(loss_triton._linear_cross_entropy.op, (*args, 0.1, True, True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled(agree: Agree) -> None:
    hidden, weight, labels = inputs(63, 101, "cuda", width=16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    tensors = {"hidden": hidden, "weight": weight}
    agree(compiled, linear_cross_entropy_reference, tensors, {"labels": labels})
