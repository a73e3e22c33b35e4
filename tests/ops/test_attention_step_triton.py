"""Attention over pages: the kernels against the slow twin.

On a CPU they run in Triton's interpreter, so sizes there are tiny.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from hymba.ops import attention_step_triton as kernels
from hymba.ops.attention_step_triton import TILING, attention_step, splits_of
from tests.ops.test_attention_step import ROWS, check, pages_of

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
MODEL = (25, 5), (64, 128)  # heads and widths of the 1.5B
CUTS = {
    "as it is": TILING,
    "one split": TILING._replace(splits=1, block=16),
    "three splits": TILING._replace(splits=3, block=16),
    "five, two at once": TILING._replace(splits=5, block=16, parts=2),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("meta", [0, 5, 35])
@pytest.mark.parametrize(("counts", "size"), [*ROWS, ((1, 70, 96, 97), 48)], ids=str)
def test_small(
    counts: tuple[int, ...],
    size: int,
    meta: int,
    dtype: torch.dtype,
    cut: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages of whole tiles and others, one page a row, nothing, one place, a page and one."""
    monkeypatch.setattr(kernels, "TILING", CUTS[cut])
    given = pages_of(counts, size, meta, dtype=dtype, device=device)
    first = attention_step(**given)
    check(first, given)
    assert torch.equal(attention_step(**given), first)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("heads", [(25, 5), (8, 8), (20, 1)], ids=str)
def test_heads(
    heads: tuple[int, int], cut: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TILING", CUTS[cut])
    given = pages_of((20, 50), 32, 3, heads, (32, 32), device=device)
    check(attention_step(**given), given)
    given = pages_of((18,), 32, 0, heads, (20, 36), device=device)
    check(attention_step(**given), given)


LARGE = [
    ("pages", (0, 1, 8192, 5000, 257), 256, 128, *MODEL),
    ("rings", (0, 1, 1024, 1025) * 32, 1025, 128, *MODEL),
    ("few rings", (1025, 700), 1025, 128, *MODEL),
    ("alone", (16384,), 256, 128, *MODEL),
    ("one page a slot", (16000, 3), 16384, 128, *MODEL),
    ("odd pages", (333, 1000), 100, 128, *MODEL),
    ("all queries of a head", (7, 77), 77, 3, (40, 1), (32, 32)),
    ("odd widths", (7, 333, 500), 64, 7, (6, 2), (80, 48)),
    ("a head each", (100, 2000), 256, 0, (8, 8), (32, 32)),
]


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case[0])
def test_large(
    case: tuple[Any, ...],
    dtype: torch.dtype,
    chain: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    monkeypatch.setattr(kernels, "TILING", TILING._replace(chain=chain))
    _, counts, size, meta, heads, widths = case
    given = pages_of(counts, size, meta, heads, widths, dtype, device)
    first = attention_step(**given)
    check(first, given)
    for _ in range(20):
        assert torch.equal(attention_step(**given), first)


@pytest.mark.parametrize("pairs", [1, 5, 80, 640, 5000])
@pytest.mark.parametrize("tiles", [1, 9, 65, 1000])
def test_splits(pairs: int, tiles: int) -> None:
    assert 1 <= splits_of(pairs, tiles, TILING) <= max(64, tiles)
    assert -(-tiles // splits_of(pairs, tiles, TILING)) <= TILING.most


def flat(given: dict[str, Any]) -> tuple[Any, ...]:
    names = "q", "store_k", "store_v", "table", "counts", "most"
    return (*(given[name] for name in names), *given["meta"])


def test_operator_is_registered_as_it_is(device: str) -> None:
    given = pages_of((3, 4), 4, 2, device=device)
    torch.library.opcheck(kernels.step_operator.op, flat(given))


def test_compiled_and_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph of the compiler, and in a CUDA graph that serves other rows later."""
    if device == "cpu":
        pytest.skip("on a GPU")
    monkeypatch.undo()  # the compiler does not follow memory that is made NaN
    given = pages_of((100, 1000), 256, 128, *MODEL, torch.bfloat16, device)
    args = flat(given)
    want = kernels.step_operator(*args)
    compiled = torch.compile(lambda *x: kernels.step_operator(*x), fullgraph=True)
    assert torch.equal(compiled(*args), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.step_operator(*args)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
    given["table"].copy_(given["table"].flip(0))
    given["counts"].copy_(given["counts"].flip(0))
    graph.replay()
    assert torch.equal(out, kernels.step_operator(*args)) and not torch.equal(out, want)
