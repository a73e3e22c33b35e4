"""Products with packed matrices on a GPU, against the matrix written out: any size and scheme.

Small sizes run on a CPU (kernels in Triton's interpreter), large ones on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hymba import ops  # noqa: E402
from hymba.ops import nvrtc, packed_cuda, packed_triton  # noqa: E402
from hymba.ops import packed as plain  # noqa: E402
from hymba.ops.packed import Packed, decode, dequantize, pack  # noqa: E402
from hymba.ops.packed_cuda import Input  # noqa: E402
from hymba.ops.packed_triton import MOST_ROWS, Cut, Tiling  # noqa: E402
from hymba.schemes import SCHEMES, Scheme  # noqa: E402

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
SMALL = [(1, 1), (40, 100), (33, 160), (70, 129), (96, 64)]  # rows and columns of the matrix
LARGE = [(10000, 1600), (1600, 3200), (1600, 5504), (32001, 1600), (132, 3200), (3200, 100)]
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
SIZES = pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=str)
# A float32 sum; and the result's own rounding (the interpreter cuts bfloat16 off).
EPS = 1e-6
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def matrix(sizes: tuple[int, int], scheme: Scheme, device: str) -> Packed:
    """Every code and both signs of scales; what is read beyond the columns would show."""
    rows, columns = sizes
    if device == "cpu" and sizes in LARGE:
        pytest.skip("too large for the interpreter")
    generator = torch.Generator().manual_seed(rows + columns)
    groups = scheme.groups(columns)
    shape = rows, groups * scheme.group
    raw = torch.randint(0, 2**scheme.bits, shape, generator=generator).to(torch.uint8)
    if scheme.kind == "e4m3":
        raw[raw & 127 == 127] = 0  # not numbers
    scales = torch.randn(rows, groups, generator=generator) / 50
    packed = pack(decode(raw, scheme), scales.half(), columns, scheme)
    return packed._replace(tiles=packed.tiles.to(device))


def activations(count: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of different sizes, a slice of wider ones (the CUDA source wants whole 16 bytes)."""
    more = 8 if nvrtc.present() else 3
    x = torch.randn(count, columns + more, generator=torch.Generator().manual_seed(count))
    x *= torch.arange(1, count + 1)[:, None]
    return x.to(device, dtype)[:, :columns]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Row by row: a wrong row among large ones must show."""
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    off = (got.double() - want).norm(dim=1)
    assert (off <= ALLOWED[dtype] * want.norm(dim=1) + 1e-12).all()


@ALL
@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 9, 20, MOST_ROWS + 1])
def test_products(
    count: int, dtype: torch.dtype, sizes: tuple[int, int], scheme: Scheme, device: str, source: str
) -> None:
    packed = matrix(sizes, scheme, device)
    x = activations(count, sizes[1], dtype, device)
    want = x.double() @ dequantize(packed, torch.float64).T
    got = packed_triton.packed_linear(x, packed)
    if count > MOST_ROWS and dtype != torch.float32:  # the weights are rounded too
        assert (got.double() - want).norm() <= 6e-3 * want.norm()
        return
    close(got, want, dtype)
    assert torch.equal(packed_triton.packed_linear(x, packed), got)


@ALL
@SIZES
def test_rows_are_the_matrix_s_own(sizes: tuple[int, int], scheme: Scheme, device: str) -> None:
    """Looked up and written out: no sum, so no error."""
    packed = matrix(sizes, scheme, device)
    rows, columns = sizes
    ids = torch.tensor([rows - 1, 0, min(rows - 1, 31), rows // 2], device=device)
    assert torch.equal(packed_triton.packed_rows(ids, packed), plain.packed_rows(ids, packed))
    assert packed_triton.packed_rows(ids[:0], packed).shape == (0, columns)
    for dtype in (torch.float32, torch.float16):
        got = packed_triton.dequantize(packed, dtype)
        assert torch.equal(got, dequantize(packed, dtype))


@ALL
def test_a_row_does_not_depend_on_the_rows_beside_it(
    scheme: Scheme, device: str, source: str
) -> None:
    packed = matrix((70, 129) if device == "cpu" else (1600, 3200), scheme, device)
    dtype = torch.bfloat16 if source == "cuda" else torch.float32
    x = activations(20, packed.columns, dtype, device)
    together = packed_triton.packed_linear(x, packed)
    for row in (0, 7, 19):
        for first in (row, max(0, row - 5)):
            if device == "cpu" and first == row:
                continue  # numpy multiplies a single row in another order
            got = packed_triton.packed_linear(x[first : row + 1], packed)
            assert torch.equal(got[-1], together[row])


@ALL
@pytest.mark.parametrize("cut", [Cut(1, 64, 1), Cut(2, 64, 2), Cut(2, 128, 4)], ids=str)
def test_any_cut(cut: Cut, scheme: Scheme, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns, the last of them not full."""
    monkeypatch.setattr(packed_triton, "TILING", Tiling(cut, cut))
    packed = matrix((70, 321), scheme, device)
    x = activations(2, packed.columns, torch.bfloat16, device)
    want = x.double() @ dequantize(packed, torch.float64).T
    close(packed_triton.packed_linear(x, packed), want, x.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
def test_what_cuda_serves(scheme: Scheme) -> None:
    """All that a model has, or a wrong question would leave it to Triton without a word."""
    if not nvrtc.present():
        pytest.skip("needs cuda-core")
    held = matrix((1600, 3200), scheme, "cuda")
    rows, norm = (activations(n, 3200, torch.bfloat16, "cuda") for n in (5, 1))
    inputs = [Input(rows, norm[0]), Input(rows.contiguous(), norm[0])]
    residual = activations(5, 1600, torch.bfloat16, "cuda")
    assert packed_cuda.supports(held, inputs, residual)
    assert packed_cuda.supports(held, [Input(rows[:1, ::1])], None)
    odd = torch.empty(held.tiles.numel() + 4, dtype=torch.uint8, device="cuda")[4:]
    for wrong in (
        (held, [Input(rows.half())], None),
        (held, [Input(rows, norm[0].float())], None),
        (held, [Input(rows)], residual.float()),
        (held._replace(tiles=odd.view(held.tiles.shape)), [Input(rows)], None),
        (held._replace(columns=3196), [Input(rows)], None),
        (held, [Input(activations(5, 3203, torch.bfloat16, "cuda")[:, 3:])], None),
    ):
        assert not packed_cuda.supports(*wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
@pytest.mark.parametrize("cut", [(1, 1), (3, 2), (4, 4), (16, 6), (32, 1)], ids=str)
@pytest.mark.parametrize("count", [2, 12, 32])
def test_any_cut_in_cuda(
    cut: tuple[int, int], count: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that are full and turns that are not, warps with a group more than others."""
    if not nvrtc.present():
        pytest.skip("needs cuda-core")
    cuts = packed_cuda.Tiling(*[packed_cuda.Cut(*cut)] * 6)
    monkeypatch.setattr(packed_cuda, "TILINGS", {4: cuts, 8: cuts})
    packed = matrix((70, 1000), scheme, "cuda")
    x, norm = (activations(n, 1000, torch.bfloat16, "cuda") for n in (count, 1))
    want = x.double() @ dequantize(packed, torch.float64).T
    close(packed_triton.packed_linear(x, packed), want, x.dtype)
    want = plain.packed_norm_linear(x.double(), norm[0].double(), EPS, packed)
    off = packed_triton.packed_norm_linear(x, norm[0], EPS, packed).double() - want
    assert (off.norm(dim=1) <= 1.2e-2 * want.norm(dim=1)).all()


@ALL
def test_the_door(scheme: Scheme, device: str) -> None:
    """Rows that need a gradient get it, by the reference."""
    packed = matrix((40, 100), scheme, device)
    x = activations(2, 100, torch.float32, device)
    want = x.double() @ dequantize(packed, torch.float64).T
    off = (ops.packed_linear(x, packed).double() - want).norm(dim=1)
    assert (off < 2e-2 * want.norm(dim=1)).all()  # a CPU's kernels round activations
    ops.packed_linear(x.requires_grad_(), packed).sum().backward()
    assert torch.allclose(x.grad.double(), dequantize(packed, torch.float64).sum(0), rtol=1e-4)


@ALL
@pytest.mark.parametrize("sizes", [(64, 100), (128, 160), (192, 104), (11008, 1600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5, 20, MOST_ROWS + 1])
def test_products_with_their_neighbours(
    count: int, dtype: torch.dtype, sizes: tuple[int, int], scheme: Scheme, device: str, source: str
) -> None:
    """The plain forms' numbers, of which the matrix is exact and all else rounds at one place."""
    if device == "cpu" and sizes[0] > 1000:
        pytest.skip("too large for the interpreter")
    held, (rows, columns) = matrix(sizes, scheme, device), sizes
    held.tiles.view(torch.float16).view(len(held.tiles), scheme.groups(columns), -1)[..., -32:] /= (
        columns**0.5 * scheme.most / 50
    )  # products of about 1, or swiglu is a step
    x = activations(count, columns, dtype, device)
    weight = activations(1, columns, dtype, device)[0]
    other = activations(count + 1, columns, dtype, device)[1:]
    residual = activations(count, rows + 1, dtype, device)[:, 1:] / 8
    calls = {
        "packed_norm_linear": lambda x, w, r: (x, w, EPS, held),
        "packed_norm_swiglu": lambda x, w, r: (x, w, EPS, held),
        "packed_linear_add": lambda x, w, r: (x, held, r),
        "packed_fuse_linear": lambda x, w, r: (x, other.to(x), w, w.flip(0), EPS, held, r),
    }
    for name, args in calls.items():
        got = getattr(packed_triton, name)(*args(x, weight, residual))
        want = getattr(plain, name)(*args(x.double(), weight.double(), residual.double()))
        allowed = 4e-6 if dtype == torch.float32 else 1.2e-2 if device == "cuda" else 3e-2
        assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all(), name
        assert (got.double() - want).norm() <= allowed * want.norm(), name
        assert torch.equal(getattr(packed_triton, name)(*args(x, weight, residual)), got), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
@pytest.mark.parametrize("count", [1, 8, MOST_ROWS + 1])
def test_in_a_graph(count: int, scheme: Scheme) -> None:
    """Two products behind each other and a look-up, captured, with other activations later."""
    first, second = matrix((3200, 1600), scheme, "cuda"), matrix((1600, 3200), scheme, "cuda")
    x = activations(count, 1600, torch.bfloat16, "cuda").contiguous()
    ids = torch.arange(count, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        inner = packed_triton.packed_linear(x, first) / 1000
        return packed_triton.packed_linear(inner, second), packed_triton.packed_rows(ids, first)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        x.normal_()
        ids.random_(0, 3200)
        graph.replay()
        want = step()
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
