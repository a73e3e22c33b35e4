"""The convolution's kernels against the reference: outputs, final states and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import Segments, conv_triton  # noqa: E402
from hymba.ops.conv import causal_conv_reference  # noqa: E402
from hymba.ops.conv_triton import Tile, causal_conv  # noqa: E402

Agree = Callable[..., None]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape: int, seed: int = 0, dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def inputs(
    segments: Segments, channels: int, taps: int, dtype: torch.dtype, start: str, device: str
) -> dict[str, Tensor | None]:
    states = {"none": 0, "shared": 1, "own": segments.count}[start]
    kind = {"dtype": dtype, "device": device}
    state = random(states, taps - 1, channels, seed=3, **kind) if states else None
    return {
        "x": random(segments.total, channels, **kind),
        "weight": random(channels, taps, seed=1, **kind),
        "bias": random(channels, seed=2, **kind),
        "initial_state": state,
    }


@pytest.fixture
def short_walks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs in time and in channels, even for few rows."""
    if device == "cpu":
        monkeypatch.setattr(conv_triton, "forward_tile", lambda *_: Tile(8, 16, 2, 1))
        monkeypatch.setattr(conv_triton, "backward_tile", lambda *_: Tile(8, 16, 4, 1))


# One row; the tile and one more; documents shorter than the taps, at a tile's end and across it.
LENGTHS = [(1,), (17,), (8, 8), (7, 1, 1, 8), (6, 3, 2), (1, 2, 3, 1, 1, 5), (1,) * 5]


@pytest.mark.usefixtures("short_walks")
@KINDS
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("start", ["none", "shared", "own"])
def test_reference(
    agree: Agree, lengths: tuple[int, ...], start: str, dtype: torch.dtype, device: str
) -> None:
    segments = Segments(lengths)
    tensors = inputs(segments, 5, 4, dtype, start, device)
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


@pytest.mark.usefixtures("short_walks")
@pytest.mark.parametrize("taps", [1, 2, 3, 7])
@pytest.mark.parametrize("start", ["none", "shared", "own"])
def test_any_number_of_taps(agree: Agree, taps: int, start: str, device: str) -> None:
    segments = Segments((4, 1, 9, 3))
    tensors = inputs(segments, 24, taps, torch.float32, start, device) | {"bias": None}
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes for a GPU")
@KINDS
@pytest.mark.parametrize("lengths", [(1,), (63,), (1000,), (700, 1, 2, 64, 31, 3, 199), (1,) * 130])
@pytest.mark.parametrize("channels", [100, 3200])
@pytest.mark.parametrize("start", ["none", "shared", "own"])
def test_sizes(
    agree: Agree, lengths: tuple[int, ...], channels: int, start: str, dtype: torch.dtype
) -> None:
    segments = Segments(lengths)
    tensors = inputs(segments, channels, 4, dtype, start, "cuda")
    agree(causal_conv, causal_conv_reference, tensors, {"segments": segments})


def test_views(agree: Agree, device: str) -> None:
    """x is a slice of a wider projection; a state is one for all, expanded."""
    segments = Segments((4, 9))
    tensors = inputs(segments, 5, 4, torch.float32, "shared", device)
    wide = random(13, 11, dtype=torch.float32, device=device)
    state = tensors["initial_state"]
    assert state is not None
    many = {"initial_state": state.expand(2, 3, 5)}
    for x in (wide[:, 2:7], wide[:, :10:2], random(5, 13, dtype=wide.dtype, device=device).T):
        given = tensors | {"x": x} | many
        agree(causal_conv, causal_conv_reference, given, {"segments": segments})


def test_mixed_dtypes(agree: Agree, device: str) -> None:
    """Inputs in bfloat16, weights and states in float32, as autocast has them."""
    segments = Segments((4, 9))
    tensors = inputs(segments, 5, 4, torch.float32, "own", device)
    x = tensors["x"]
    assert x is not None

    def reference(x: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        out, final = causal_conv_reference(x.float(), **given, segments=segments)
        return out.to(x.dtype), final.to(x.dtype)

    def kernel(x: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, **given, segments=segments)

    agree(kernel, reference, tensors | {"x": x.bfloat16()})


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "initial_state"])
def test_only_what_is_wanted(wanted: str, device: str) -> None:
    """One gradient at a time; and nothing pulls on the final state."""
    segments, grads = Segments((4, 9)), []
    for op in (causal_conv, causal_conv_reference):
        tensors = inputs(segments, 5, 4, torch.float32, "own", device)
        leaf = tensors[wanted]
        assert leaf is not None
        out, _ = op(**tensors | {wanted: leaf.requires_grad_()}, segments=segments)
        grads += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_other_documents_do_not_matter(device: str) -> None:
    """A number that is not finite stays in its document, both ways."""
    segments = Segments((5, 6))
    tensors = inputs(segments, 5, 4, torch.float32, "own", device)
    x = tensors["x"]
    assert x is not None
    x[:5] = float("nan")
    out, final = causal_conv(**tensors | {"x": x.requires_grad_()}, segments=segments)
    (dx,) = torch.autograd.grad(out[5:].sum(), x)
    assert out[:5].isnan().all() and out[5:].isfinite().all()
    assert final[0].isnan().all() and final[1].isfinite().all()
    assert dx[5:].isfinite().all()


@pytest.mark.parametrize("start", ["none", "shared", "own"])
def test_as_an_operator(start: str, device: str) -> None:
    tensors = inputs(Segments((3, 2)), 5, 4, torch.float32, start, device)
    x, weight, bias, state = (t if t is None else t.requires_grad_() for t in tensors.values())
    torch.library.opcheck(conv_triton._causal_conv.op, (x, weight, bias, [3, 2], state))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled(agree: Agree) -> None:
    segments = Segments((700, 3, 297))
    tensors = inputs(segments, 100, 4, torch.float32, "shared", "cuda")
    compiled = torch.compile(causal_conv, fullgraph=True)
    agree(compiled, causal_conv_reference, tensors, {"segments": segments})
