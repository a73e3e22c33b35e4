"""Attention under Hymba's mask: which keys are seen, exactly; and the fast forms against the slow.

A window of W shows W + 1 keys with the row's own, and meta keys never leave. One key more or less
changes logits by little at W = 1024, so it is counted here, not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from hymba import ops
from hymba.ops import Meta, Past, Segments
from hymba.ops.attention import attention, attention_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
attention_module = sys.modules["hymba.ops.attention"]
BOTH = pytest.mark.parametrize("op", [attention, attention_reference])
Op = Callable[..., Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rule(query: int, key: int, window: int | None) -> bool:
    """The mask, for text positions; meta keys are seen by every text row."""
    return key <= query and (window is None or query - key <= window)


def seen_by(
    op: Op, segments: Segments, window: int | None, meta: int = 0, past: Past | None = None
):
    """{(segment, query position): keys seen}, meta keys as -1, -2, ... Equal scores and values
    that are one-hot make the output say which keys it came from."""
    begins = past.lengths if past else (0,) * segments.count
    width = meta + max(b + n for b, n in zip(begins, segments.lengths, strict=True))
    one_hot = torch.eye(width, dtype=torch.float64)[:, None]  # (width, 1, width)
    spans = [range(b, b + n) for b, n in zip(begins, segments.lengths, strict=True)]
    v = torch.cat([one_hot[[meta + p for p in span]] for span in spans])
    front = Meta(torch.zeros(meta, 1, 2).double(), one_hot[:meta]) if meta else None
    if past is not None:
        values = one_hot[(meta + past.positions).clamp(0, width - 1), 0]  # (S, P, width)
        past = past._replace(v=values[:, None])
    q = k = torch.zeros(segments.total, 1, 2, dtype=torch.float64)
    shares = op(q, k, v, segments, window, front, past)[:, 0]
    found = {}
    rows = iter(shares)
    for index, span in enumerate(spans):
        for position in span:
            share = next(rows)
            keys = share.nonzero().flatten()
            assert torch.allclose(share[keys], torch.tensor(1 / len(keys)).double())
            found[index, position] = {k - meta if k >= meta else -1 - k for k in keys.tolist()}
    return found


@BOTH
def test_the_picture_in_the_docstring(op: Op) -> None:
    picture = attention_module.__doc__.split("q 0")[1].splitlines()[:5]
    drawn = [("q 0" + picture[0]), *picture[1:]]
    seen = seen_by(op, Segments((5,)), window=2, meta=2)
    for query, line in enumerate(drawn):
        marks = [c for c in line if c in "#."]
        assert marks[:2] == ["#", "#"]
        shown = {key for key, mark in enumerate(marks[2:]) if mark == "#"}
        assert seen[0, query] == shown | {-1, -2}


@BOTH
@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("window", [None, 1, 2, 6, 50])
@pytest.mark.parametrize("lengths", [(1,), (23,), (4, 1, 11), (9, 9)], ids=str)
def test_which_keys_are_seen(
    op: Op,
    lengths: tuple[int, ...],
    window: int | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With queries in blocks of any size, segments of any length, and meta keys."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    for meta in (0, 3):
        seen = seen_by(op, Segments(lengths), window, meta)
        for (_, query), keys in seen.items():
            want = {key for key in range(query + 1) if rule(query, key, window)}
            assert keys == want | set(range(-meta, 0))


def ring(lengths: tuple[int, ...], window: int | None, places: int, heads: int = 1) -> Past:
    """A past as a cache has it: position p in place p % places, -1 or less where none is."""
    positions = torch.full((len(lengths), places), -1)
    for index, length in enumerate(lengths):
        for position in range(length):
            positions[index, position % places] = position
    shape = (len(lengths), heads, places)
    return Past(
        torch.zeros(*shape, 2).double(), torch.zeros(*shape, 1).double(), positions, lengths
    )


@BOTH
@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (7, 7, 7), (3, 1, 9)], ids=str)
def test_which_keys_are_seen_behind_a_past(
    op: Op,
    lengths: tuple[int, ...],
    window: int | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences with no past, one before the window's edge and one whose ring has wrapped."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    begins = (0, 3, 21)
    past = ring(begins, window, places=21 if window is None else window + 1)
    for meta in (0, 2):
        seen = seen_by(op, Segments(lengths), window, meta, past)
        assert len(seen) == sum(lengths)
        for (_, query), keys in seen.items():
            want = {key for key in range(query + 1) if rule(query, key, window)}
            assert keys == want | set(range(-meta, 0))


def tensors(
    segments: Segments,
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    meta: int = 3,
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
        segments: Segments,
        window: int | None,
        meta_k: Tensor | None,
        meta_v: Tensor | None,
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


@pytest.mark.parametrize("lengths", [(1,), (63,), (5, 1, 17), (8, 8)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_twins(
    agree: Callable[..., None],
    lengths: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grouped heads, values twice as wide as keys, meta keys with gradients."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 16)
    segments = Segments(lengths)
    inputs = tensors(segments, (6, 2), (8, 16), dtype, device)
    fixed = {"segments": segments, "window": window}
    agree(named(attention), named(attention_reference), inputs, fixed)


@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (10, 2)])
@pytest.mark.parametrize("widths", [(6, 6), (6, 12), (10, 5)])
@pytest.mark.parametrize("meta", [0, 1])
def test_heads_and_widths(
    agree: Callable[..., None],
    heads: tuple[int, int],
    widths: tuple[int, int],
    meta: int,
    device: str,
) -> None:
    segments = Segments((7, 12))
    inputs = tensors(segments, heads, widths, torch.float64, device, meta)
    fixed = {"segments": segments, "window": 3}
    agree(named(attention), named(attention_reference), inputs, fixed)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 12, 1), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("meta", [0, 3])
def test_twins_behind_a_past(
    agree: Callable[..., None],
    lengths: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    meta: int,
    device: str,
) -> None:
    """A decode step, a chunk, and a mix of both, with rings in wrapped order."""
    segments, begins = Segments(lengths), (0, 3, 21)
    places = ring(begins, window, 21 if window is None else window + 1).positions
    inputs = tensors(segments, (6, 2), (8, 16), dtype, device, meta)
    shape = (3, 2, places.shape[1])
    inputs["past_k"] = random(*shape, 8, seed=5, dtype=dtype).to(device)
    inputs["past_v"] = random(*shape, 16, seed=6, dtype=dtype).to(device)
    fixed = {"segments": segments, "window": window, "places": places.to(device), "lengths": begins}
    agree(named(attention), named(attention_reference), inputs, fixed)


@BOTH
def test_order_of_places_does_not_matter(op: Op) -> None:
    """Keys are rotated before they are stored, so a ring is never unrolled."""
    segments, lengths = Segments((2, 2)), (9, 30)
    places = ring(lengths, 6, 7).positions
    inputs = tensors(segments, (4, 2), (6, 6), torch.float64, "cpu")
    rows = [inputs[name] for name in ("q", "k", "v")]
    k, v = random(2, 2, 7, 6, seed=5), random(2, 2, 7, 6, seed=6)
    want = op(*rows, segments, 6, None, Past(k, v, places, lengths))
    order = [3, 0, 6, 1, 5, 2, 4]
    other = Past(k[:, :, order], v[:, :, order], places[:, order], lengths)
    torch.testing.assert_close(op(*rows, segments, 6, None, other), want, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("past", [False, True])
def test_inputs_that_are_views(agree: Callable[..., None], past: bool) -> None:
    """In the model q, k and v are slices of one projection; a cache hands out strided rows."""
    segments = Segments((4, 9))
    wide = random(13, 4 * 6 + 2 * 6 + 2 * 12)
    q, k, v = wide.split([24, 12, 24], dim=-1)
    inputs = tensors(segments, (4, 2), (6, 12), torch.float64, "cpu")
    inputs |= {
        "q": q.unflatten(1, (4, 6)),
        "k": k.unflatten(1, (2, 6)),
        "v": v.unflatten(1, (2, 12)),
    }
    fixed = {"segments": segments, "window": 3}
    if past:
        fixed |= {"places": ring((2, 7), 3, 4).positions, "lengths": (2, 7)}
        inputs["past_k"] = random(2, 2, 9, 6, seed=5)[:, :, :4]
        inputs["past_v"] = random(2, 9, 2, 12, seed=6).transpose(1, 2)[:, :, :4]
    assert not any(inputs[name].is_contiguous() for name in ("q", "k", "v"))
    agree(named(attention), named(attention_reference), inputs, fixed)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_scores(past: bool, dtype: torch.dtype) -> None:
    """Scores of 1e5: the softmax is a choice of one key, never inf / inf."""
    segments = Segments((6, 6))
    inputs = tensors(segments, (4, 2), (8, 8), dtype, "cpu", meta=0)
    fixed = {"segments": segments, "window": 3}
    if past:
        inputs |= {name: random(2, 2, 4, 8, seed=5, dtype=dtype) for name in ("past_k", "past_v")}
        fixed |= {"places": ring((2, 7), 3, 4).positions, "lengths": (2, 7)}
    inputs["q"] = inputs["q"] * 1e5
    out = named(attention)(**inputs, **fixed)
    assert out.isfinite().all()
    if dtype == torch.float32:  # in bfloat16 the two best keys may be a tie
        want = named(attention_reference)(**inputs, **fixed)
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_gradcheck() -> None:
    segments = Segments((3, 5))
    inputs = tensors(segments, (4, 2), (4, 6), torch.float64, "cpu")
    names = list(inputs)

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return named(attention)(**given, segments=segments, window=2)

    values = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_segments_do_not_know_each_other() -> None:
    lengths = (4, 1, 9, 4)
    segments = Segments(lengths)
    inputs = tensors(segments, (4, 2), (6, 12), torch.float64, "cpu", meta=0)
    rows = [inputs[name] for name in ("q", "k", "v")]
    whole = attention(*rows, segments, 3)
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        part = slice(start, start + length)
        alone = attention(*(x[part] for x in rows), Segments((length,)), 3)
        torch.testing.assert_close(whole[part], alone, atol=1e-13, rtol=1e-13)
        broken = [x.clone() for x in rows]
        for x in broken:
            x[part] = float("nan")
        spoilt = attention(*broken, segments, 3)[:, 0, 0].isnan().nonzero().flatten()
        assert spoilt.tolist() == list(range(start, start + length))


def test_the_door_takes_what_the_op_takes() -> None:
    segments = Segments((4, 9))
    rows = [tensors(segments, (4, 2), (6, 12), torch.float64, "cpu")[n] for n in ("q", "k", "v")]
    assert torch.equal(ops.attention(*rows, segments, 3), attention(*rows, segments, 3))


def test_a_window_layer_costs_rows_times_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask or score of rows x rows is made: 64 rows and a window of 3, in blocks of 4, see
    slices of at most 7 keys."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 4)
    slices = [(f, e, k) for f, e, k in attention_module._query_blocks(64, 3)]
    assert [first for first, _, _ in slices] == list(range(0, 64, 4))
    assert max(end - key for _, end, key in slices) == 7
