"""Attention of a decode step: the kernels against the slow twin, and which keys they see.

On a CPU they run in Triton's interpreter, so sizes there are tiny.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from hymba.ops import Meta, Past, Segments
from hymba.ops import attention_decode_triton as kernels
from hymba.ops.attention import attention_reference
from hymba.ops.attention_decode_triton import attention_decode, splits_of

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
MODEL = (25, 5), (64, 128)  # heads and widths of the 1.5B


def inputs(
    begins: tuple[int, ...],
    places: int,
    meta: int,
    heads: tuple[int, int] = (6, 2),
    widths: tuple[int, int] = (8, 12),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rows behind rings of `places`; the cache is a view of a larger one, the rows are slices of
    one projection, as in a model."""
    (query, groups), (h, e), rows = heads, widths, len(begins)
    generator = torch.Generator().manual_seed(places + rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    positions = torch.full((rows, places), -1)
    for row, begin in enumerate(begins):
        held = torch.arange(max(0, begin - places), begin)
        positions[row, held % places] = held
    store_k, store_v = (random(rows, groups, places + 3, w)[:, :, :places] for w in widths)
    parts = [query * h, groups * h, groups * e, 5]
    q, k, v, _ = random(rows, sum(parts)).split(parts, dim=1)
    return {
        "q": q.unflatten(1, (query, h)),
        "k": k.unflatten(1, (groups, h)),
        "v": v.unflatten(1, (groups, e)),
        "segments": Segments((1,) * rows),
        "meta": Meta(random(meta, groups, h), random(meta, groups, e)) if meta else None,
        "past": Past(store_k, store_v, positions.to(device), begins),
    }


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """In float64, with the same roundings of the inputs."""
    past, meta = given["past"], given["meta"]
    double = {name: given[name].double() for name in ("q", "k", "v")}
    double["past"] = past._replace(k=past.k.double(), v=past.v.double())
    double["meta"] = meta and Meta(meta.k.double(), meta.v.double())
    return given | double


def check(window: int | None, given: dict[str, Any]) -> None:
    got = attention_decode(**given, window=window)
    want = attention_reference(**wide(given), window=window)
    assert got.dtype == given["q"].dtype and got.shape == want.shape
    assert torch.isfinite(got).all()
    allowed = {torch.float32: 2e-6, torch.bfloat16: 6e-3}[got.dtype]
    assert (got.double() - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize(
    ("begins", "places", "window"),
    [((0, 21, 140), 140, None), ((0, 5, 7, 60), 6, 5), ((9,), 9, None), ((300,), 130, 129)],
    ids=str,
)
def test_small(
    begins: tuple[int, ...],
    places: int,
    window: int | None,
    meta: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Rows without a past, before their window's edge and behind it, one split and several."""
    check(window, inputs(begins, places, meta, dtype=dtype, device=device))


LARGE = [
    ("global", (0, 1, 8192, 5000), 8192, None, 128, *MODEL),
    ("window", (0, 1024, 1025, 9000) * 32, 1025, 1024, 128, *MODEL),
    ("alone", (16384,), 16384, None, 128, *MODEL),
    ("many rows, no parts to add", tuple(range(300)), 41, 40, 0, *MODEL),
    ("all queries of a head", (7, 77), 77, None, 3, (40, 1), (32, 32)),
    ("odd widths", (7, 333, 500), 333, 332, 7, (6, 2), (80, 48)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case[0])
def test_large(case: tuple[Any, ...], dtype: torch.dtype, device: str) -> None:
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    _, begins, places, window, meta, heads, widths = case
    check(window, inputs(begins, places, meta, heads, widths, dtype, device))


def test_which_keys_are_seen(device: str) -> None:
    """Equal scores and one-hot values make the output say which keys it came from; the ring lies
    in any order, and one place that is still there is outside of the window."""
    window, places, begin = 5, 7, 20
    positions = torch.tensor([[16, 13, 19, 14, 18, 15, 17]])
    seen = {p for p in positions[0].tolist() if begin - p <= window}
    assert seen == {15, 16, 17, 18, 19}
    one_hot = torch.eye(begin + 1, device=device)
    keys = torch.zeros(1, 1, places, 8, device=device)
    past = Past(keys, one_hot[positions][:, None], positions.to(device), (begin,))
    row = torch.zeros(1, 1, 8, device=device)
    out = attention_decode(row, row, one_hot[begin][None, None], Segments((1,)), window, past=past)
    assert set(out[0, 0].nonzero().flatten().tolist()) == seen | {begin}
    torch.testing.assert_close(out.sum(), torch.tensor(1.0, device=device))


def test_what_is_not_seen_is_not_read(device: str) -> None:
    """Blocks without anything visible may hold what they like."""
    given = inputs((10, 200), 200, 0, device=device)
    given["past"].k[0, :, 64:], given["past"].v[0, :, 64:] = float("nan"), float("nan")
    got = attention_decode(**given)
    given["past"].k[0, :, 64:], given["past"].v[0, :, 64:] = 0, 0
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, attention_reference(**given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pairs", [1, 5, 80, 640, 5000])
@pytest.mark.parametrize("places", [0, 1, 64, 1025, 8192, 100_000])
def test_splits_hold_all_places(pairs: int, places: int) -> None:
    splits, each = splits_of(pairs, places, kernels.TILING)
    assert splits >= 1 and splits * each >= places and max(0, splits - 1) * each <= places
    assert each % 16 == 0 and each <= kernels.TILING.most


def test_only_new_tokens_behind_a_past() -> None:
    given = inputs((3, 4), 4, 0)
    with pytest.raises(ValueError, match="one new token a row"):
        attention_decode(**given | {"segments": Segments((2,))})
    with pytest.raises(ValueError, match="one new token a row"):
        attention_decode(**given | {"past": None})


def flat(given: dict[str, Any]) -> tuple[Any, ...]:
    past = given["past"]
    begin = torch.tensor(past.lengths, dtype=torch.int32, device=past.k.device)
    rows = (given["q"], given["k"], given["v"], past.k, past.v, past.positions, begin)
    return (*rows, None, *given["meta"])


def test_operator_is_registered_as_it_is(device: str) -> None:
    given = inputs((3, 4), 4, 2, device=device)
    torch.library.opcheck(kernels.decode_at.op, flat(given))


def test_compiled_and_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph of the compiler, and in a CUDA graph that serves other lengths later."""
    if device == "cpu":
        pytest.skip("on a GPU")
    monkeypatch.undo()  # the compiler does not follow memory that is made NaN
    heads, widths = MODEL
    given = inputs((100, 1000), 1025, 128, heads, widths, torch.bfloat16, device)
    args = list(flat(given))
    want = kernels.decode_at(*args)
    compiled = torch.compile(lambda *x: kernels.decode_at(*x), fullgraph=True)
    assert torch.equal(compiled(*args), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_at(*args)
    graph.replay()
    assert torch.equal(out, want)
    args[6].fill_(50)  # less is visible now
    graph.replay()
    assert torch.equal(out, kernels.decode_at(*args)) and not torch.equal(out, want)
