"""The CPU's attention against the mask written out, in float64: every source of keys, odd sizes;
and that a row's numbers do not depend on how its prompt was cut, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hymba import ops
from hymba.ops import Meta, Past, Segments
from hymba.ops.attention import attention_reference
from hymba.ops.backend import forget
from hymba.ops.cpu import attention as kernels
from hymba.ops.cpu import simd
from hymba.ops.cpu.team import Team

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
WINDOWS = [None, 3, 40, 1024]
SHAPES = [(2, 1, 16, 16), (6, 2, 10, 5), (5, 5, 8, 24), (10, 2, 64, 128), (3, 1, 70, 33)]


class Case:
    """Random inputs; q, k and v are slices of wider rows, a past is in a ring's order."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        shape: tuple[int, int, int, int] = (10, 2, 64, 128),
        window: int | None = None,
        meta: int = 0,
        begins: tuple[int, ...] = (),
        past: torch.dtype = torch.float32,
    ):
        self.segments, self.window, self.past = Segments(lengths), window, None
        (H, G, h, e), N = shape, sum(lengths)
        generator = torch.Generator().manual_seed(N)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        wide = random(N, H * h + G * h + G * e + 3)[:, 3:]
        q, k, v = wide.split([H * h, G * h, G * e], dim=1)
        self.rows = q.unflatten(1, (H, h)), k.unflatten(1, (G, h)), v.unflatten(1, (G, e))
        self.meta = Meta(random(meta, G, h), random(meta, G, e)) if meta else None
        if begins:
            places = max(begins) if window is None else window + 1
            sizes = len(begins), G, places
            k, v = random(*sizes, h).to(past), random(*sizes, e).to(past)
            self.past = Past(k, v, ring(begins, places), begins)

    def run(self, op=kernels.attention) -> Tensor:
        return op(*self.rows, self.segments, self.window, self.meta, self.past)

    def wanted(self) -> Tensor:
        rows = (x.double() for x in self.rows)
        meta = None if self.meta is None else Meta(*(x.double() for x in self.meta))
        past = self.past
        if past is not None:
            past = past._replace(k=past.k.double(), v=past.v.double())
        return attention_reference(*rows, self.segments, self.window, meta, past)


def ring(begins: tuple[int, ...], places: int) -> Tensor:
    positions = torch.full((len(begins), places), -1)
    for index, begin in enumerate(begins):
        for position in range(begin):
            positions[index, position % places] = position
    return positions


def close(got: Tensor, want: Tensor, allowed: float = 2e-6) -> None:
    assert got.shape == want.shape
    off = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.max() < 10 * allowed and off.mean() < allowed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("meta", [0, 3, 130])
def test_new_rows(shape: tuple[int, int, int, int], window: int | None, meta: int) -> None:
    for lengths in ((1,), (63,), (5, 1, 140)):
        case = Case(lengths, shape, window, meta)
        close(case.run(), case.wanted())


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("past", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("meta", [0, 3])
def test_behind_a_past(
    shape: tuple[int, int, int, int], window: int | None, past: torch.dtype, meta: int
) -> None:
    """Sequences without a past, with a short one and one around its ring more than once."""
    for lengths in ((1, 1, 1), (150, 7, 33)):
        case = Case(lengths, shape, window, meta, (0, 5, 300), past)
        close(case.run(), case.wanted())


def cut(case: Case, index: int, first: int, end: int) -> Tensor:
    """Rows first .. end of a segment by themselves, those before them in a cache."""
    start = case.segments.starts[index]
    q, k, v = (x[start : start + end] for x in case.rows)
    past = None
    if first:
        places = first if case.window is None else min(first, case.window + 1)
        positions = ring((first,), places)
        k_past, v_past = (x[positions[0]].transpose(0, 1)[None] for x in (k, v))
        past = Past(k_past, v_past, positions, (first,))
    new = (x[first:] for x in (q, k, v))
    return kernels.attention(*new, Segments((end - first,)), case.window, case.meta, past)


@pytest.mark.parametrize("window", [None, 20, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_however_it_comes(
    window: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others or alone, in one go or in chunks, by any number of threads: bit for bit."""
    case = Case((30, 300, 4), window=window, meta=5)
    whole = case.run()
    team = Team(threads)
    monkeypatch.setattr(kernels, "team", lambda: team)
    assert torch.equal(case.run(), whole)
    for index, (start, length) in enumerate(case.segments):
        for chunk in (1000, 128, 37):
            spans = [(first, min(first + chunk, length)) for first in range(0, length, chunk)]
            parts = [cut(case, index, *span) for span in spans]
            assert torch.equal(torch.cat(parts), whole[start : start + length])
    team.close()


def test_segments_do_not_know_each_other() -> None:
    case = Case((40, 9, 140), meta=3)
    want = case.run()
    for x in case.rows:
        x[40:49] = torch.nan
    got = case.run()
    assert torch.equal(got[:40], want[:40]) and torch.equal(got[49:], want[49:])
    assert got[40:49].isnan().all()


def test_huge_scores() -> None:
    """The softmax is a choice of one key, never inf / inf."""
    case = Case((70,), window=20)
    case.rows[0].mul_(1e4)
    assert case.run().isfinite().all()


def test_a_past_that_lacks_what_is_seen() -> None:
    case = Case((5,), window=8, begins=(30,))
    assert case.past is not None
    case.past.positions[0, 22 % 9] = -1  # of the first row's window the first
    assert kernels.attention(*case.rows, case.segments, 8, None, case.past) is None
    close(case.run(ops.attention), case.wanted())


NARROW = """
from hymba.ops.cpu import dense
from tests.ops.cpu.test_attention import Case, close
assert dense.WIDE == 1
for case in (Case((150, 7), window=40, meta=3), Case((9, 30), window=20, begins=(3, 50))):
    close(case.run(), case.wanted())
"""


@pytest.mark.slow
@pytest.mark.skipif(not simd.X86, reason="takes features away from an x86")
def test_narrower_registers() -> None:
    """As on a CPU with AVX2 alone, where they hold fewer sums."""
    kept = [f"+{x}" for x in sorted(simd.FEATURES) if not x.startswith("avx512")]
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ",".join(kept)}
    done = subprocess.run(
        [sys.executable, "-c", NARROW], env=os.environ | told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors(dtype: torch.dtype) -> None:
    case = Case((70, 9), window=20, meta=3)
    case.rows = tuple(x.to(dtype) for x in case.rows)
    case.meta = Meta(*(x.to(dtype) for x in case.meta))
    got = case.run()
    assert got.dtype == dtype
    close(got, case.wanted(), 4e-3)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_door(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for inference alone."""
    monkeypatch.setenv("HYMBA_BACKEND", backend)
    forget()
    calls = []
    kernel = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a: calls.append(1) or kernel(*a))
    case = Case((9, 4), window=3, meta=2)
    used = 1 if backend == "numba" else 0
    case.run(ops.attention)
    assert len(calls) == used
    case.rows = tuple(x.detach().requires_grad_() for x in case.rows)
    case.run(ops.attention).sum().backward()
    assert len(calls) == used and all(x.grad.any() for x in case.rows)
    case.rows = tuple(x.detach().double() for x in case.rows)
    case.meta = Meta(*(x.double() for x in case.meta))
    case.run(ops.attention)
    assert len(calls) == used
    forget()
