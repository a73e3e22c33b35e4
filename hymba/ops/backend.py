"""Which implementation serves an op, chosen once a device and said once.

    "triton"      GPU kernels, `<op>_triton.py` (the default on NVIDIA GPUs from Ampere on)
    "numba"       CPU kernels of a few ops, for inference, in ops/cpu/ (the default on a CPU where
                  numba is); all other ops and calls as "torch"
    "torch"       plain PyTorch, correct on any device and fast on a CPU (the default elsewhere)
    "reference"   the slow and obvious twin, for checking

HYMBA_BACKEND overrides. Kernels keep float32 sums, so float64 tensors always go to plain PyTorch.
On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hymba.errors import UserError

BACKENDS = ("triton", "numba", "torch", "reference")
CHAINED_ROWS = 256
log = logging.getLogger("hymba")


@cache
def backend(device_type: str) -> str:
    """The backend for tensors on such a device ("cpu", "cuda", "mps")."""
    missing = _no_kernels(device_type)
    asked = os.environ.get("HYMBA_BACKEND") or None
    if asked is None and device_type == "cpu":
        return "numba" if find_spec("numba") else "torch"
    if asked is None:
        if missing:
            log.warning("hymba: no kernels for %s (%s); using plain PyTorch", device_type, missing)
        return "torch" if missing else "triton"
    if asked not in BACKENDS:
        raise UserError(f"HYMBA_BACKEND={asked!r} is not one of {', '.join(BACKENDS)}")
    if asked == "triton" and missing:
        raise UserError(f"HYMBA_BACKEND=triton: no kernels for {device_type} ({missing})")
    if asked == "numba" and (device_type != "cpu" or not find_spec("numba")):
        raise UserError("HYMBA_BACKEND=numba is for CPUs and needs: pip install 'hymba[cpu]'")
    return asked


def _no_kernels(device_type: str) -> str:
    """Why there are none for a device; empty where there are."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "only in Triton's interpreter, TRITON_INTERPRET=1"
    if device_type != "cuda" or torch.version.hip:
        return "they were written for NVIDIA GPUs"
    return "" if torch.cuda.get_device_capability() >= (8, 0) else "it is older than Ampere"


def twin(op: str, x: Tensor) -> Callable[..., Any]:
    """The implementation of an op for tensors such as x."""
    _choose(x.device.type)
    return _chosen[op, x.device.type, x.dtype == torch.float64]


ON_CPU = {  # what ops/cpu/ has
    "add_rms_norm",
    "attention",
    "causal_conv",
    "fuse_heads",
    "packed_linear",
    "rms_norm",
    "rms_norms",
    "rotate",
    "selective_scan",
    "swiglu",
}
FILES = {  # each op's, in ops/; its kernels are in <file>_triton.py
    "add_rms_norm": "norm",
    "attention": "attention",
    "attention_step": "attention_step",
    "causal_conv": "conv",
    "conv_step": "step",
    "fuse_heads": "norm",
    "fuse_linear": "thin",
    "linear": "thin",
    "linear_add": "thin",
    "linear_cross_entropy": "loss",
    "narrow_linear": "thin",
    "norm_linear": "thin",
    "norm_swiglu": "thin",
    "packed_fuse_linear": "packed",
    "packed_linear": "packed",
    "packed_linear_add": "packed",
    "packed_norm_linear": "packed",
    "packed_norm_swiglu": "packed",
    "packed_rows": "packed",
    "rms_norm": "norm",
    "rms_norms": "norms",
    "rope_and_store": "step",
    "rotate": "rotary",
    "selective_scan": "scan",
    "ssm_step": "step",
    "state_step": "step",
    "swiglu": "swiglu",
}
_chosen: dict[tuple[str, str, bool], Callable[..., Any]] = {}  # by op, device, float64


def _choose(device_type: str) -> bool:
    """Fill in what a device has, all at once: a compiler looks into the table only once."""
    if ("rms_norm", device_type, False) not in _chosen:
        chosen = backend(device_type)
        found = {
            (op, device_type, double): _find(op, file, chosen, double)
            for op, file in FILES.items()
            for double in (False, True)
        }
        _chosen.update(found)  # at once: another thread may be looking
    return True


# A constant to a compiler, which would else look into the imports. This is what the decorator
# torch.compiler.assume_constant_result does, but for importing the compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(op: str, file: str, chosen: str, double: bool) -> Callable[..., Any]:
    where = f"hymba.ops.{file}"
    if chosen == "triton" and not double:
        where += "_triton"
    if chosen == "numba" and op in ON_CPU and not double:
        where = "hymba.ops.cpu.door"
    module = importlib.import_module(where)
    plain = getattr(module, op)
    # An op with one plain form (a norm) is its own reference.
    return getattr(module, f"{op}_reference", plain) if chosen == "reference" else plain


def forget() -> None:
    """Choose again at the next call, for tests."""
    _chosen.clear()
    backend.cache_clear()


Keep = Callable[[Any, tuple[Any, ...], Any], None]
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors as a custom op `hymba::<name>`: one node to a compiler.

    A custom op costs the host tens of microseconds more than what it does, and a training step is
    hundreds of calls, a decoded token a thousand. So where nothing traces, a function whose
    gradients flow is a plain autograd.Function, and any other stays the plain function."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str]):
        self.function = function
        self.op = torch.library.custom_op(f"hymba::{name}", function, mutates_args=mutates)
        self.register_fake = self.op.register_fake
        self.differentiable: Callable[..., Any] = self.op  # which refuses what has no gradients

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0:  # of torch.func.jvp too
            _refuse_duals(tensors)
        if watched() or any(type(x) not in _PLAIN for x in tensors):
            return self.op(*args)
        return (self.differentiable if wants_grad(*tensors) else self.function)(*args)

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Keep = lambda ctx, inputs, output: None
    ) -> None:
        """As `torch.library.custom_op` has it: setup_context(ctx, inputs, output) keeps what
        backward(ctx, *gradients) needs."""
        self.op.register_autograd(backward, setup_context=setup_context)
        self.differentiable = _function(self.function, backward, setup_context).apply


def _function(
    function: Callable[..., Any], gradients: Callable[..., Any], keep: Keep
) -> type[torch.autograd.Function]:
    # Not with a setup_context of its own, for which torch looks at the signature in every call.
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            keep(ctx, args, output)
            return output

        backward = staticmethod(gradients)

    return Differentiable


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: make an `Operator`, which writes to the arguments named in `mutates`."""
    return lambda function: Operator(name, function, mutates)


def watched() -> bool:
    """Whether a dispatch mode or torch.func wants to see calls."""
    watching = bool(torch._C._len_torch_dispatch_stack())
    return watching or torch._C._functorch.peek_interpreter_stack() is not None


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient through these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _refuse_duals(tensors: Sequence[Tensor]) -> None:
    """A dual number's tangent would be lost without a word."""
    for x in tensors:
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "kernels have no forward-mode derivatives: set HYMBA_BACKEND=torch"
            )


def dense_last(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as kernels read it; a view mostly is so."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# Triton's own two, called from the host, take some microseconds each.


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest that is x or more, for x of 1 or more."""
    return 1 << (x - 1).bit_length()


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def chains(x: Tensor, rows: int = 0) -> bool:
    """Should a kernel that reads x be put in place while the one before it ends? It can, from
    Hopper on; and where there are more than `CHAINED_ROWS` rows what that saves is nothing."""
    return rows <= CHAINED_ROWS and x.is_cuda and _is_hopper(x.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a Triton kernel on the device of its first argument, whichever is the current one.

    One that is CHAINED (see `chains`) may start before the kernel in front of it has ended, so it
    must wait, `chain_triton.wait`, before it reads or writes what others write or read."""
    x = args[0]
    if meta.get("CHAINED"):
        meta["launch_pdl"] = True
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        kernel[grid](*args, **meta)
