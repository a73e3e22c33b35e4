"""What tests share: devices, tiny models of every plan, unwritten memory, and twins that agree.

The models are *lively*: random weights of a size at which every part matters, so that logits have
a spread of about 3 and no bug drowns in a small number. (The real initialisation has logits near
zero, and a model of zeros agrees with everything.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.config import Config
from hymba.model.decoder import LanguageModel
from tests.plans import SIZES, plans

# Nothing here may reach for a network; what needs a hub answers from the disk or not at all.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the kernels' tests run in Triton's interpreter, which must be asked for before
# anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws without a generator of its own is the same in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Config]:
    """tiny("hymba") -> the config of a plan of tests/plans.py."""
    return plans().__getitem__


CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    kernels = request.path.name.endswith("_triton.py")
    if kernels and request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here; the interpreter is for machines without")
    return request.param


@pytest.fixture(scope="session")
def lively() -> Callable[..., LanguageModel]:
    """lively(config, seed=0, dtype=torch.float32) -> a model with weights that matter."""

    def build(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
        model, generator = LanguageModel(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _enliven(name, parameter, generator)
        return model.to(dtype).eval()

    return build


def _enliven(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name.endswith("A_log"):
        parameter.uniform_(-2, 2, generator=generator)  # memories of a token and of a hundred
    elif name.endswith("dt_bias"):
        parameter.uniform_(-4, 1, generator=generator)
    elif name.endswith((".D", "norm.weight", "scales.weight")):
        parameter.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        parameter.normal_(0, 0.5, generator=generator)
    elif name.endswith(("meta_tokens.weight", ".bias")):
        parameter.normal_(0, 1, generator=generator)
    else:
        parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5, generator=generator)


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, not the zeros it happens to hold on a quiet machine: a value that
    was never written but is read shows at once."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


# How far twins may be apart, as a share of the result's length: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def agree() -> Callable[..., None]:
    """agree(fast, slow, inputs, fixed): outputs and the gradient of every input, by name."""

    def check(
        fast: Callable[..., Any],
        slow: Callable[..., Any],
        inputs: dict[str, Tensor | None],
        fixed: dict[str, Any] | None = None,
        tolerance: float | None = None,
        gradients: bool = True,
    ) -> None:
        kinds = [x.dtype for x in inputs.values() if x is not None]
        allowed = tolerance or max(TOLERANCE[kind] for kind in kinds)
        got, want = (_run(op, inputs, fixed or {}, gradients) for op in (fast, slow))
        assert got.keys() == want.keys()
        for name in want:
            _close(name, got[name], want[name], allowed)

    return check


def _run(
    op: Callable[..., Any], inputs: dict[str, Tensor | None], fixed: dict[str, Any], gradients: bool
) -> dict[str, Tensor]:
    """{"out 0": ..., "gradient of u": ...}; every element of every output pulls on the inputs."""
    given = {
        name: None if x is None else x.detach().requires_grad_(gradients)
        for name, x in inputs.items()
    }
    outs = op(**given, **fixed)
    outs = outs if isinstance(outs, tuple) else (outs,)
    found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    if not gradients:
        return found
    generator = torch.Generator().manual_seed(7)
    pulls = [torch.randn(x.shape, generator=generator).to(x) for x in outs]
    names = [name for name, x in given.items() if x is not None]
    grads = torch.autograd.grad(outs, [given[name] for name in names], pulls)
    return found | {f"gradient of {name}": g for name, g in zip(names, grads, strict=True)}


def _close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, name
    assert torch.isfinite(want).all(), f"{name}: the reference itself is not finite"
    assert torch.isfinite(got).all(), f"{name} is not finite"
    off, size = (x.double().norm().item() for x in (got.double() - want.double(), want))
    assert off <= tolerance * size, f"{name} is off by {off:.2e} of {size:.2e}"


@pytest.fixture(scope="session")
def text() -> Callable[..., Tensor]:
    """text(length, seed=0) -> token ids of the tiny vocabulary; text([3, 5]) gives two."""

    def make(lengths: int | Iterable[int], seed: int = 0) -> Any:
        if not isinstance(lengths, int):
            return [make(length, seed + i) for i, length in enumerate(lengths)]
        generator = torch.Generator().manual_seed(1000 * lengths + seed)
        return torch.randint(0, SIZES["vocab_size"], (lengths,), generator=generator)

    return make
