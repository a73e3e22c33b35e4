"""Attention's kernels: which keys are seen, exactly, and outputs and gradients of the reference.

Without a GPU the kernels run in Triton's interpreter, with blocks of 16 so that few rows make
many blocks; on one, at the sizes of the models with the blocks they really have.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba.ops import Meta, Past, Segments  # noqa: E402
from hymba.ops import attention_backward_triton as backward_module  # noqa: E402
from hymba.ops import attention_triton as module  # noqa: E402
from hymba.ops.attention import attention_reference  # noqa: E402
from hymba.ops.attention_triton import attention, attention_chunk  # noqa: E402

pytestmark = pytest.mark.usefixtures("unwritten_is_nan", "blocks")
Agree = Callable[..., None]
Op = Callable[..., Tensor]
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones for the interpreter."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        return

    def small(*_: Any) -> tuple[int, int, dict[str, int]]:
        return 16, 16, {"num_warps": 4, "num_stages": 1}

    monkeypatch.setattr(module, "forward_blocks", small)
    monkeypatch.setattr(backward_module, "query_blocks", small)
    monkeypatch.setattr(backward_module, "key_blocks", small)
    monkeypatch.setattr(backward_module, "CHUNK", 16)
    backward_module.key_items.cache_clear()


@pytest.fixture
def small_only(device: str) -> None:
    if device == "cuda":
        pytest.skip("as on a CPU")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(
    segments: Segments,
    heads: tuple[int, int],
    widths: tuple[int, int],
    meta: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor | None]:
    (query, shared), (h, e) = heads, widths
    made = {
        "q": random(segments.total, query, h, dtype=dtype),
        "k": random(segments.total, shared, h, seed=1, dtype=dtype),
        "v": random(segments.total, shared, e, seed=2, dtype=dtype),
        "meta_k": random(meta, shared, h, seed=3, dtype=dtype) if meta else None,
        "meta_v": random(meta, shared, e, seed=4, dtype=dtype) if meta else None,
    }
    return {name: None if x is None else x.to(device) for name, x in made.items()}


def named(op: Op) -> Op:
    """The op with its keys and values as named tensors, so that gradients have names."""

    def call(
        meta_k: Tensor | None,
        meta_v: Tensor | None,
        segments: Segments,
        window: int | None,
        past_k: Tensor | None = None,
        past_v: Tensor | None = None,
        places: Tensor | None = None,
        lengths: tuple[int, ...] = (),
        **rows: Tensor,
    ) -> Tensor:
        meta = None if meta_k is None or meta_v is None else Meta(meta_k, meta_v)
        past = None
        if past_k is not None and past_v is not None and places is not None:
            past = Past(past_k, past_v, places, lengths)
        return op(**rows, segments=segments, window=window, meta=meta, past=past)

    return call


def ring(lengths: tuple[int, ...], window: int | None, places: int, device: str) -> Tensor:
    """Positions as a cache has them: p in place p % places, negative where none is."""
    positions = torch.full((len(lengths), places), -1)
    for index, length in enumerate(lengths):
        for position in range(length):
            positions[index, position % places] = position
    return positions.to(device)


@pytest.mark.parametrize("window", [None, 1, 6, 15, 50])
@pytest.mark.parametrize("lengths", [(1,), (37,), (4, 1, 17)], ids=str)
@pytest.mark.parametrize("meta", [0, 3, 16])
def test_which_keys_are_seen(
    lengths: tuple[int, ...], window: int | None, meta: int, device: str
) -> None:
    """Equal scores and values that are one-hot make the output say which keys it came from."""
    if device == "cuda":
        lengths = tuple(9 * length for length in lengths)
    segments = Segments(lengths)
    width = meta + max(lengths)
    places = torch.arange(width, device=device) - meta
    rows = torch.cat([torch.arange(n, device=device) for n in lengths])[:, None]
    want = (places <= rows) & ((places < 0) | (window is None) | (rows - places <= (window or 0)))
    for dtype in (torch.float32, torch.bfloat16)[: 1 if device == "cpu" else 2]:  # blocks of each
        one_hot = torch.eye(width, device=device, dtype=dtype)[:, None]  # (width, 1, width)
        v = torch.cat([one_hot[meta : meta + n] for n in lengths])
        zeros = one_hot.new_zeros(segments.total, 1, 2)
        front = Meta(zeros.new_zeros(meta, 1, 2), one_hot[:meta]) if meta else None
        shares = attention(zeros, zeros, v, segments, window, front)[:, 0].float()
        assert torch.equal(shares > 0, want)
        torch.testing.assert_close(shares, want / want.sum(1, keepdim=True), atol=1e-6, rtol=1e-2)


@KINDS
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("window", [None, 20])
def test_twins(
    agree: Agree, dtype: torch.dtype, which: int, window: int | None, device: str
) -> None:
    """Grouped heads, values twice as wide as keys, meta keys with gradients, packed documents."""
    lengths = [(1,), (33,), (5, 1, 19), (16, 16)][which]
    heads, widths, meta = (4, 2), (8, 16), 19
    if device == "cuda":
        lengths = [(1,), (63,), (1000,), (700, 1, 300, 64)][which]
        heads, widths, meta, window = (25, 5), (64, 128), 128, window and 130
    segments = Segments(lengths)
    inputs = tensors(segments, heads, widths, meta, dtype, device)
    fixed = {"segments": segments, "window": window}
    agree(named(attention), named(attention_reference), inputs, fixed)


@pytest.mark.parametrize(
    ("heads", "widths", "meta"),
    [((4, 4), (6, 6), 0), ((5, 1), (20, 10), 1), ((4, 2), (16, 16), 16), ((2, 1), (5, 40), 0)],
)
def test_heads_and_widths(
    agree: Agree, heads: tuple[int, int], widths: tuple[int, int], meta: int, device: str
) -> None:
    segments = Segments((7, 20) if device == "cpu" else (100, 7, 300))
    inputs = tensors(segments, heads, widths, meta, torch.float32, device)
    fixed = {"segments": segments, "window": 9}
    agree(named(attention), named(attention_reference), inputs, fixed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="many rows")
@KINDS
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize(
    ("heads", "widths", "meta"),
    [
        ((25, 5), (64, 128), 128),
        ((8, 2), (128, 128), 0),
        ((8, 8), (64, 64), 0),
        ((4, 2), (128, 256), 7),
    ],
)
def test_sizes_of_models(
    agree: Agree,
    dtype: torch.dtype,
    window: int | None,
    heads: tuple[int, int],
    widths: tuple[int, int],
    meta: int,
) -> None:
    segments = Segments((1500, 64, 1, 700))
    inputs = tensors(segments, heads, widths, meta, dtype, "cuda")
    fixed = {"segments": segments, "window": window}
    agree(named(attention), named(attention_reference), inputs, fixed)


@KINDS
@pytest.mark.parametrize("lengths", [(3, 20, 1), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("meta", [0, 3])
def test_behind_a_past(
    agree: Agree,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    window: int | None,
    meta: int,
    device: str,
) -> None:
    """No past, one before the window's edge, one whose ring has wrapped; places in any order."""
    begins, heads, widths = (0, 3, 21), (6, 2), (8, 16)
    if device == "cuda":
        lengths, begins = tuple(40 * n for n in lengths), (0, 300, 2100)
        heads, widths, meta, window = (25, 5), (64, 128), 40 * meta, window and 1000
    segments, places = Segments(lengths), max(begins) if window is None else window + 1
    inputs = tensors(segments, heads, widths, meta, dtype, device)
    shape = (3, heads[1], places)
    inputs["past_k"] = random(*shape, widths[0], seed=5, dtype=dtype).to(device)
    inputs["past_v"] = random(*shape, widths[1], seed=6, dtype=dtype).to(device)
    positions = ring(begins, window, places, device)
    fixed = {"segments": segments, "window": window, "places": positions, "lengths": begins}
    agree(named(attention), named(attention_reference), inputs, fixed, gradients=False)


@pytest.mark.parametrize("window", [None, 4])
def test_one_row_behind_a_past(window: int | None, device: str) -> None:
    """A chunk may be one row, which a decode step would give to kernels of its own."""
    segments, begins = Segments((1, 1, 1)), (0, 3, 21)
    inputs = tensors(segments, (4, 2), (8, 16), 3, torch.float32, device)
    rows = [inputs[name] for name in ("q", "k", "v")]
    positions = ring(begins, window, 21 if window is None else 5, device)
    shape = (3, 2, positions.shape[1])
    k, v = random(*shape, 8, seed=5).to(device), random(*shape, 16, seed=6).to(device)
    past = Past(k, v, positions, begins)
    meta = Meta(inputs["meta_k"], inputs["meta_v"])
    want = attention_reference(*rows, segments, window, meta, past)
    for op in (attention_chunk, attention):
        got = op(*rows, segments, window, meta, past)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("past", [False, True])
def test_inputs_that_are_views(agree: Agree, past: bool, device: str) -> None:
    """In the model q, k and v are slices of one projection; a cache hands out strided rows."""
    segments = Segments((4, 19))
    wide = random(23, 4 * 6 + 2 * 6 + 2 * 12).to(device)
    q, k, v = wide.split([24, 12, 24], dim=-1)
    inputs = tensors(segments, (4, 2), (6, 12), 3, torch.float32, device)
    inputs |= {
        "q": q.unflatten(1, (4, 6)),
        "k": k.unflatten(1, (2, 6)),
        "v": v.unflatten(1, (2, 12)),
    }
    fixed: dict[str, Any] = {"segments": segments, "window": 3}
    if past:
        fixed |= {"places": ring((2, 7), 3, 4, device), "lengths": (2, 7)}
        inputs["past_k"] = random(2, 2, 9, 6, seed=5).to(device)[:, :, :4]
        inputs["past_v"] = random(2, 9, 2, 12, seed=6).to(device).transpose(1, 2)[:, :, :4]
    agree(named(attention), named(attention_reference), inputs, fixed, gradients=not past)


def test_gradients_behind_a_past_are_the_plain_ones(
    agree: Agree, device: str, small_only: None
) -> None:
    segments = Segments((4, 9))
    inputs = tensors(segments, (4, 2), (6, 12), 3, torch.float32, device)
    inputs |= {"past_k": random(2, 2, 4, 6, seed=5), "past_v": random(2, 2, 4, 12, seed=6)}
    places = ring((2, 7), 3, 4, device)
    fixed = {"segments": segments, "window": 3, "places": places, "lengths": (2, 7)}
    agree(named(attention), named(attention_reference), inputs, fixed)


def test_a_gradient_that_is_one_number_repeated(device: str) -> None:
    """The gradient of a sum has strides of zero."""
    segments = Segments((4, 19))
    inputs = tensors(segments, (4, 2), (8, 16), 3, torch.float32, device)
    found = []
    for op in (attention, attention_reference):
        given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        named(op)(**given, segments=segments, window=5).sum().backward()
        found.append([x.grad for x in given.values()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_segments_do_not_know_each_other(device: str) -> None:
    """Not even their NaNs, though blocks of one reach into the rows of the next."""
    segments = Segments((4, 9, 20))
    inputs = tensors(segments, (4, 2), (8, 16), 3, torch.float32, device)
    want = named(attention)(**inputs, segments=segments, window=5)
    for name in ("q", "k", "v"):
        inputs[name][4:13] = float("nan")
    rows = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    got = named(attention)(**rows, segments=segments, window=5)
    spoilt = got[:, 0, 0].isnan().nonzero().flatten()
    assert spoilt.tolist() == list(range(4, 13))
    torch.testing.assert_close(got[13:], want[13:], atol=0, rtol=0)
    grads = torch.autograd.grad(got, [rows["q"], rows["k"], rows["v"]], torch.ones_like(got))
    for grad in grads:
        assert grad[:4].isfinite().all() and grad[13:].isfinite().all()


@KINDS
def test_huge_scores(dtype: torch.dtype, device: str) -> None:
    """Scores of 1e5: the softmax is a choice of one key, never inf / inf."""
    segments = Segments((6, 20))
    inputs = tensors(segments, (4, 2), (8, 8), 0, dtype, device)
    inputs["q"] = inputs["q"] * 1e5
    given = {name: x if x is None else x.requires_grad_() for name, x in inputs.items()}
    out = named(attention)(**given, segments=segments, window=3)
    rows = [given[name] for name in ("q", "k", "v")]
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), rows)))
    if dtype == torch.float32:  # in bfloat16 the two best keys may be a tie
        want = attention_reference(*rows, segments, 3)
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_no_rows(device: str) -> None:
    inputs = tensors(Segments(()), (4, 2), (8, 16), 3, torch.float32, device)
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    out = named(attention)(**given, segments=Segments(()), window=None)
    assert out.shape == (0, 4, 16)
    grads = torch.autograd.grad(out, [given["q"], given["meta_k"]], out)
    assert grads[0].shape == (0, 4, 8) and not grads[1].any()


def test_nothing_is_kept_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch, device: str, small_only: None
) -> None:
    asked = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda *a, **m: (asked.append(m["SAVE"]), launch(*a, **m))
    )
    inputs = tensors(Segments((5,)), (2, 1), (8, 16), 0, torch.float32, device)
    rows = [inputs[name] for name in ("q", "k", "v")]
    attention(*rows, Segments((5,)))
    rows[0].requires_grad_()
    with torch.no_grad():
        attention(*rows, Segments((5,)))
    attention(*rows, Segments((5,)))
    assert asked == [False, False, True]


@pytest.mark.parametrize("meta", [False, True])
def test_opcheck(meta: bool, device: str) -> None:
    segments = Segments((2, 3))
    inputs = tensors(segments, (1, 1), (8, 16), 3, torch.float32, device)
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    rows = [given[name] for name in ("q", "k", "v")]
    front = [given["meta_k"], given["meta_v"]] if meta else [None, None]
    torch.library.opcheck(module._attention.op, (*rows, [2, 3], 5, *front, True))
    with torch.no_grad():
        out, lse = module._attention(*rows, [2, 3], 5, *front, True)
        args = (out, *rows, out, lse, [2, 3], 5, *front)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    torch.library.opcheck(module._attention_backward.op, plain)
    past = [random(2, 1, 6, 8), random(2, 1, 6, 16)]
    cached = [x.to(device) for x in past] + [ring((2, 9), 5, 6, device), [2, 9]]
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in (*rows, [2, 3], 5, *front))
    torch.library.opcheck(module._attention_chunk.op, (*plain, *cached))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_compiled_whole() -> None:
    segments = Segments((100, 30))
    inputs = tensors(segments, (10, 5), (64, 128), 16, torch.bfloat16, "cuda")
    given = {name: x.requires_grad_() for name, x in inputs.items()}

    def call(**given: Tensor) -> Tensor:
        return named(attention)(**given, segments=segments, window=50)

    outs = [op(**given) for op in (call, torch.compile(call, fullgraph=True))]
    pull = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, list(given.values()), pull) for out in outs]
    torch.testing.assert_close(outs[1], outs[0], atol=0, rtol=0)
    torch.testing.assert_close(grads[1], grads[0], atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_in_a_graph_and_twice_the_same() -> None:
    segments = Segments((100, 30))
    inputs = tensors(segments, (10, 5), (64, 128), 16, torch.bfloat16, "cuda")

    def step() -> list[Tensor]:
        given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = named(attention)(**given, segments=segments, window=50)
        grads = torch.autograd.grad(out, list(given.values()), torch.ones_like(out))
        return [out.detach(), *grads]

    want, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)  # and sums have one order


@pytest.mark.parametrize("window", [None, 0, 7, 40])
@pytest.mark.parametrize("meta", [0, 5, 32])
def test_every_pair_is_in_one_item(window: int | None, meta: int) -> None:
    """The work tables: a row and a key it sees meet once, those with most work come first."""
    lengths, block = (40, 1, 23), 16
    segments, cpu = Segments(lengths), torch.device("cpu")
    rows = module.query_items(lengths, (3, 0, 9), block, window, cpu).tolist()
    assert sorted(item[4] for item in rows) == [0, 0, 0, 1, 2, 2]
    assert {(item[0], item[3]) for item in rows} == {(0, 3), (40, 0), (41, 9)}
    work = [min(first, first if window is None else window) for _, _, first, _, _ in rows]
    assert work == sorted(work, reverse=True)

    items, parts = backward_module.key_items(lengths, meta, block, window, cpu)
    assert parts == (4 if meta else 0)
    met: dict[tuple[str, int, int], int] = {}
    for origin, limit, at, first, end, part in items.tolist():
        for key in range(at, min(at + block, limit)):
            for row in range(first, end):
                pair = ("text", origin + key, origin + row) if part < 0 else ("meta", key, row)
                met[pair] = met.get(pair, 0) + 1
    assert set(met.values()) == {1}
    for start, length in segments:
        for row in range(length):
            for key in range(0 if window is None else max(0, row - window), row + 1):
                assert ("text", start + key, start + row) in met
    assert all(("meta", key, row) in met for key in range(meta) for row in range(segments.total))


def test_backward_can_be_imported_first() -> None:
    """The two files know each other; the door opens either."""
    assert importlib.import_module("hymba.ops.attention_backward_triton") is backward_module
