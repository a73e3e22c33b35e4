"""Cross-entropy from hidden states: its twin, its gradients, and what it does not hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hymba.ops.loss import linear_cross_entropy, linear_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
loss_module = sys.modules["hymba.ops.loss"]


def inputs(
    rows: int, words: int, dtype: torch.dtype = torch.float64, width: int = 5
) -> list[Tensor]:
    """hidden, weight, labels; every third label does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, words))
    labels = torch.randint(0, words, (rows,), generator=generator)
    labels[2::3] = -100
    return [hidden, weight, labels]


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize("chunk", [1, 37 * 8, 1 << 24], ids=["row by row", "by 8", "at once"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids="z {}".format)
def test_twins(
    agree: Callable[..., None],
    rows: int,
    chunk: int,
    dtype: torch.dtype,
    z_loss: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that divide the rows, that do not, and one chunk of all."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk)
    hidden, weight, labels = (x.to(device) for x in inputs(rows, 37, dtype))
    fixed = {"labels": labels, "z_loss": z_loss}
    tensors = {"hidden": hidden, "weight": weight}
    agree(linear_cross_entropy, linear_cross_entropy_reference, tensors, fixed)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_reference])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_formula(op: Callable[..., Tensor], z_loss: float) -> None:
    hidden, weight, labels = inputs(7, 11)
    want = 0.0
    for row, label in zip(hidden, labels.tolist(), strict=True):
        scores = [math.exp(float(row @ word)) for word in weight]
        if label != -100:
            want -= math.log(scores[label] / sum(scores))
            want += z_loss * math.log(sum(scores)) ** 2
    assert op(hidden, weight, labels, z_loss).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradcheck(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 11 * 2)
    hidden, weight, labels = inputs(7, 11)

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, z_loss)

    values = [hidden.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(op, values, fast_mode=True)


def test_z_loss_pulls_the_sum_of_exponentials_to_one() -> None:
    """Two words with the same logit 3 predict the label as well as with -log 2; only the z-loss
    sees a difference, and its gradient there is 0."""
    weight, labels = torch.tensor([[1.0], [1.0]]), torch.tensor([0])
    for logit, pull in ((3.0, 3 + math.log(2)), (-math.log(2), 0.0)):
        hidden = torch.tensor([[logit]], requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, labels, 0.5)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2) + 0.5 * pull**2)
        assert hidden.grad is not None
        assert hidden.grad.item() == pytest.approx(pull, abs=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 6])
def test_nothing_counts(rows: int, z_loss: float) -> None:
    """A row of padding alone: a loss of 0 with gradients of 0, not NaN."""
    hidden, weight, _ = inputs(rows, 11)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100), z_loss)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("which", ["hidden", "weight", "neither"])
def test_a_frozen_side(which: str) -> None:
    """A frozen head, or a frozen body, gets no gradient and costs the other nothing."""
    grads = []
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels = inputs(9, 11)
        tensors = {"hidden": hidden, "weight": weight}
        if which in tensors:
            tensors[which].requires_grad_()
        loss = op(hidden, weight, labels)
        assert loss.requires_grad == (which in tensors)
        grads.append(torch.autograd.grad(loss, tensors[which]) if which in tensors else (loss,))
    torch.testing.assert_close(*grads)


def test_what_follows_scales_it() -> None:
    """Gradients are made in forward, so backward must scale them, every time it is called."""
    hidden, weight, labels = inputs(9, 11)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(three, 3 * one)
    assert torch.equal(one, again)


def test_huge_logits() -> None:
    hidden, weight, labels = inputs(9, 11, torch.float32)
    loss = linear_cross_entropy((1e4 * hidden).requires_grad_(), weight, labels)
    loss.backward()
    assert loss.isfinite()


def test_a_view_of_hidden_states(agree: Callable[..., None]) -> None:
    hidden, weight, labels = inputs(9, 11, width=10)
    tensors = {"hidden": hidden[:, ::2], "weight": weight.T.contiguous().T[:, ::2]}
    assert not any(x.is_contiguous() for x in tensors.values())
    agree(linear_cross_entropy, linear_cross_entropy_reference, tensors, {"labels": labels})


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_rows_times_words_is_never_held(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither made (beyond a chunk) nor kept for backward; the twin does both."""
    rows, words, chunk = 64, 50, 50 * 8
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk)
    found = {}
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels = inputs(rows, words)
        kept: list[int] = []

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        with Largest() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            op(hidden.requires_grad_(), weight.requires_grad_(), labels, z_loss).backward()
        found[op] = made.elements, max(kept)
    assert found[linear_cross_entropy] == (chunk, rows * 5)
    assert min(found[linear_cross_entropy_reference]) >= rows * words
