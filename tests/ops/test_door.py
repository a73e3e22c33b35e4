"""What the door refuses. Kernels do not look at sizes: they would read beyond a tensor's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hymba import ops
from hymba.ops import Segments
from hymba.ops.backend import forget
from hymba.schemes import SCHEMES


@pytest.fixture(params=["torch", "triton"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels run on the GPU here; these tensors are on the CPU")
    monkeypatch.setenv("HYMBA_BACKEND", request.param)
    forget()
    yield request.param
    forget()


one = torch.ones
four = Segments((4,))
few = ops.Packed(torch.zeros(2, 576, dtype=torch.uint8), 64, 32, SCHEMES["int4"])
WRONG: dict[str, Callable[[], object]] = {
    "attention: segments": lambda: ops.attention(*(one(6, 1, 4),) * 3, four),
    "attention: k": lambda: ops.attention(one(4, 1, 4), *(one(3, 1, 4),) * 2, four),
    "causal_conv: segments": lambda: ops.causal_conv(one(6, 4), one(4, 4), None, four),
    "causal_conv: weight": lambda: ops.causal_conv(one(4, 4), one(3, 4), None, four),
    "linear_cross_entropy: labels": lambda: ops.linear_cross_entropy(
        one(4, 8), one(20, 8), one(3).long()
    ),
    "packed_linear: x": lambda: ops.packed_linear(one(2, 33), few),
    "packed_norm_linear: norm_weight": lambda: ops.packed_norm_linear(
        one(2, 32), one(33), 1e-6, few
    ),
    "packed_linear_add: residual": lambda: ops.packed_linear_add(one(2, 32), few, one(2, 63)),
    "packed_fuse_linear: ssm": lambda: ops.packed_fuse_linear(
        one(2, 32), one(3, 32), one(32), one(32), 1e-6, few, one(2, 64)
    ),
    "packed_fuse_linear: rows": lambda: ops.packed_fuse_linear(
        one(2, 32), one(2, 32), one(32), one(32), 1e-6, few, one(3, 64)
    ),
    "rms_norm: weight": lambda: ops.rms_norm(one(2, 16), one(8), 1e-6),
    "swiglu: up": lambda: ops.swiglu(one(4, 16), one(3, 16)),
    "rotate: cos": lambda: ops.rotate(one(6, 2, 4), one(4, 1, 2), one(4, 1, 2)),
    "selective_scan: segments": lambda: ops.selective_scan(
        *(one(6, 4),) * 2, one(4, 8), *(one(6, 8),) * 2, one(4), one(6, 4), one(4), four
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_sizes_that_do_not_fit(what: str, chosen: str) -> None:
    with pytest.raises(ValueError, match=what):
        WRONG[what]()


def test_a_word_that_does_not_exist_is_no_number(chosen: str) -> None:
    """A plausible loss would hide a tokenizer that is not the model's."""
    for label in (20, 120, -1):
        given = one(2, 8), one(20, 8), torch.tensor([3, label])
        if chosen == "triton":
            assert ops.linear_cross_entropy(*given).isnan()
        else:
            with pytest.raises(IndexError):
                ops.linear_cross_entropy(*given)


def test_losses_are_differentiated_once(chosen: str) -> None:
    """Their gradients are made in forward, so a second derivative would be silently wrong."""
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, torch.randn(20, 8), torch.tensor([1, 2, 3, 4]))
    with pytest.raises(RuntimeError, match="once"):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        grad.square().sum().backward()


def test_forward_mode_is_refused(chosen: str) -> None:
    if chosen == "torch":
        pytest.skip("plain PyTorch has it")

    def tangent(x: Tensor) -> Tensor:
        return forward_ad.unpack_dual(ops.rms_norm(x, one(8), 1e-6)).tangent

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        tangent(forward_ad.make_dual(one(2, 8), one(2, 8)))
    with pytest.raises(NotImplementedError, match="forward-mode"):  # not zeros
        torch.func.jvp(lambda x: ops.rms_norm(x, one(8), 1e-6), (one(2, 8),), (one(2, 8),))
