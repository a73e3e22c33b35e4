# mypy: allow-untyped-defs, allow-incomplete-defs
"""Products with matrices in few bits as GPU kernels; see `hymba.ops.packed` for their layout.

In bfloat16 a CUDA twin of twice the speed serves where it can be compiled (`packed_cuda`); this one
takes any size and dtype.

What bounds them: for a few rows the bytes of the matrix, read once as they lie, and hardly less the
instructions that make numbers of codes, of which a byte holds two. So there are as few as can be:

    word of a row    | c7 c3 | c6 c2 | c5 c1 | c4 c0 |      8 codes of 4 bits, columns 0 to 7
    and a mask       |    c3 |       |    c1 |       |      two codes, each in 16 bits of its own
    or 0x4300        |  128 + c3     |  128 + c1     |      which are bfloat16 numbers now
    minus 136        |  code         |  code         |      one instruction for two

Codes are exact in bfloat16, and so is their product with an activation on the tensor cores, which
cost the same for one row as for eight. Only a group's sum (16 or 32 rows by 1 or 8) meets its
scales, in float32: nothing is rounded but sums. Activations of 32 bits go in three bfloat16 parts.
Floats of 8 bits (e4m3) have their exponent and mantissa where bfloat16 has them once they are moved
by 4 bits; 2^120 is the difference of what exponents begin at, for those below normal ones too.
The columns of a word come in another order than they lie in memory; the activations are put in that
order instead, they are few.

    program    a tile of 32 rows, or half of one where there are few tiles; all its columns
    turn       so many groups; the bytes of the next turn are on their way meanwhile
    warp       some of the turn's groups; in the end the groups' sums are added, in a fixed order

No sum is shared between programs, so results are the same every time, and a row's numbers do not
depend on the rows beside it. The first bytes are asked for before the kernel in front has ended
(`chain_triton`). More than `MOST_ROWS` rows are cheaper with the matrix written out in their own
dtype and a library's product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import packed_cuda
from hymba.ops.backend import cdiv, chains, dense_last, launch, next_power_of_2, operator
from hymba.ops.chain_triton import wait
from hymba.ops.norm_triton import fuse_heads, rms_norm
from hymba.ops.packed import TILE, Packed
from hymba.ops.packed_cuda import MOST_ROWS, PROCESSORS, Input
from hymba.ops.step_triton import dot_type
from hymba.ops.swiglu_triton import swiglu
from hymba.schemes import SCHEMES

# Rows of activations that a program takes, the narrowest of a matrix instruction. Also for one row,
# which then is what it is beside others: one row's own program gave wrong sums on an H200.
BLOCK = 8


class Cut(NamedTuple):
    """What a program does at a time."""

    halves: int  # of a tile
    columns: int  # of a turn
    warps: int
    registers: int | None = None  # of a thread at most: more programs at a time


class Tiling(NamedTuple):
    """How the work is cut; module-wide so that a benchmark can try others."""

    many: Cut = Cut(2, 512, 4)  # tiles for all processors
    few: Cut = Cut(1, 2048, 8)
    chain: bool = True  # starts while the kernel before it ends


TILING = Tiling()


@triton.jit
def _two(pair, DOT: tl.constexpr):
    """The two bfloat16 numbers in a word, as a last dimension."""
    if DOT == tl.bfloat16:
        low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _codes(w, BITS: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr):
    """Words (G, M, P) -> codes (G, M, columns), as numbers, in the order that `_ordered` makes."""
    if BITS == 4:
        a = (w & 0x000F000F) | 0x43004300
        b = ((w >> 4) & 0x000F000F) | 0x43004300
        c = ((w >> 8) & 0x000F000F) | 0x43004300
        d = ((w >> 12) & 0x000F000F) | 0x43004300
        y = _two(tl.join(tl.join(a, c), tl.join(b, d)), DOT)
        y -= 136.0
    elif KIND == "e4m3":  # exponent and mantissa where bfloat16 has them; its exponent is of -127
        b = tl.join(w, w >> 8)
        y = _two((b & 0x00800080) << 8 | (b & 0x007F007F) << 4, DOT)
        y *= 2.0**120
    else:  # the lower 7 bits as above; the eighth tells whether 128 or 256 has to go
        b = tl.join(w, w >> 8)
        y = _two((b & 0x007F007F) | 0x43004300, DOT)
        y -= _two((b & 0x00800080) ^ 0x43804380, DOT)
    return tl.reshape(y, (w.shape[0], w.shape[1], w.shape[2] * 32 // BITS))


@triton.jit
def _ordered(x, BITS: tl.constexpr, BACK: tl.constexpr = False):
    """(G, M, columns) in their own order -> in that of `_codes`; or back."""
    G: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    if BITS == 4:
        y = tl.reshape(x, (G, M, C // 8, 2, 2, 2))
        y = tl.permute(y, (0, 1, 2, 4, 5, 3)) if BACK else tl.permute(y, (0, 1, 2, 5, 3, 4))
    else:
        y = tl.permute(tl.reshape(x, (G, M, C // 4, 2, 2)), (0, 1, 2, 4, 3))
    return tl.reshape(y, (G, M, C))


@triton.jit
def _turn(words, scales, g, groups, apart, apart_s, P: tl.constexpr, HALVES: tl.constexpr):
    """Words (G, HALVES, 16 P) as they lie and scales (G, HALVES, 16) of groups g. Two halves are
    those of a tile, or `apart` words from each other."""
    STRIDE: tl.constexpr = 32 * P + 16  # words of a group, 32 scales among them
    word, row, half = tl.arange(0, 16 * P), tl.arange(0, 16), tl.arange(0, HALVES)
    there = (g < groups)[:, None, None]
    at = (g[:, None] * STRIDE + half[None, :] * (apart + 16 * P))[:, :, None] + word[None, None, :]
    w = tl.load(words + at, mask=there, other=0, eviction_policy="evict_first")
    at = (g[:, None] * STRIDE + half[None, :] * (apart_s + 8))[:, :, None] * 2 + row[None, None, :]
    return w, tl.load(scales + at, mask=there, other=0.0, eviction_policy="evict_first")


@triton.jit
def _rows_of(w, P: tl.constexpr, HALVES: tl.constexpr):
    """Words (G, HALVES, 16 P) as they lie -> (G, HALVES * 16, P)."""
    G: tl.constexpr = w.shape[0]
    w = tl.permute(tl.reshape(w, (G, HALVES, P, 16)), (0, 1, 3, 2))
    return tl.reshape(w, (G, HALVES * 16, P))


@triton.jit
def _rounded(x, kind: tl.constexpr):
    return x.to(kind).to(tl.float32)


@triton.jit
def _piece(
    x, n, g, S, D, groups,
    GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns of groups g of the rows that start at x (1, ROWS, 1): (G, ROWS, GROUP)."""
    at = (g * GROUP)[:, None, None] + tl.arange(0, GROUP)[None, None, :]
    there = (n < S)[None, :, None] & (g < groups)[:, None, None]
    if not EVEN:
        there = there & (at < D)
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit(do_not_specialize=["S", "F", "D", "groups", "tiles"])
def _packed_linear_kernel(
    x, words, scales, norm_weight, residual, out, S, F, D, groups, tiles, eps, stride_x, stride_r,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr,
    HALVES: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    DOT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = GROUP * BITS // 32  # words of a row's group
    STRIDE: tl.constexpr = 32 * P + 16
    kind: tl.constexpr = out.dtype.element_ty
    EACH: tl.constexpr = 1 if GATED else HALVES  # halves of a tile
    tile, half = tl.program_id(0) // (2 // EACH), tl.program_id(0) % (2 // EACH)
    words += tile.to(tl.int64) * groups * STRIDE + half * 16 * P
    scales += tile.to(tl.int64) * groups * 2 * STRIDE + 64 * P + half * 16
    apart = tiles * groups * STRIDE - 16 * P if GATED else 0
    apart_s = tiles * groups * STRIDE - 8 if GATED else 0
    turn = tl.arange(0, TURN)
    n = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x += (n * stride_x)[None, :, None]
    acc = tl.zeros([TURN, HALVES * 16, ROWS], tl.float32)
    w, s = _turn(words, scales, turn, groups, apart, apart_s, P, HALVES)
    wait(CHAINED)
    if NORM:
        squares = tl.zeros([TURN, ROWS, GROUP], tl.float32)
        for first in range(0, groups, TURN):
            v = _piece(x, n, first + turn, S, D, groups, GROUP, EVEN).to(tl.float32)
            squares += v * v
        root = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / D + eps)[None, :, None]
    for first in range(0, groups, TURN):
        g = first + turn
        next_w, next_s = _turn(words, scales, g + TURN, groups, apart, apart_s, P, HALVES)
        v = _piece(x, n, g, S, D, groups, GROUP, EVEN)
        if NORM:
            at = (g * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
            weight = tl.load(norm_weight + at, mask=at < D, other=0.0).to(tl.float32)
            v = (_rounded(v.to(tl.float32) * root, kind) * weight[:, None, :]).to(kind)
        v = _ordered(v, BITS)
        codes = _codes(_rows_of(w, P, HALVES), BITS, KIND, DOT)
        part = v.to(DOT)
        y = tl.dot(codes, tl.permute(part, (0, 2, 1)), input_precision="ieee")
        for _ in tl.static_range(PARTS - 1):
            v = v.to(tl.float32) - part.to(tl.float32)
            part = v.to(DOT)
            y = tl.dot(codes, tl.permute(part, (0, 2, 1)), y, input_precision="ieee")
        acc += y * tl.reshape(s, (TURN, HALVES * 16)).to(tl.float32)[:, :, None]
        w, s = next_w, next_s
    y = tl.sum(acc, 0)  # (rows of the matrix, ROWS)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, 16, ROWS)), (1, 2, 0)))
        gate = _rounded(gate, kind)
        y = gate * tl.sigmoid(gate) * _rounded(up, kind)
    row = tile * 32 + half * 16 + tl.arange(0, EACH * 16)
    there = (row < F)[:, None] & (n < S)[None, :]
    if ADDED:
        more = tl.load(residual + n[None, :] * stride_r + row[:, None], mask=there, other=0.0)
        y = _rounded(y, kind) + more.to(tl.float32)
    tl.store(out + n[None, :] * F + row[:, None], y.to(kind), mask=there)


@triton.jit(do_not_specialize=["F", "groups"])
def _dequantize_kernel(
    words, scales, out, F, D, groups,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A turn of a tile, written out: (32, TURN * GROUP) of out (F, D)."""
    P: tl.constexpr = GROUP * BITS // 32
    STRIDE: tl.constexpr = 32 * P + 16
    tile, g = tl.program_id(0).to(tl.int64), tl.program_id(1) * TURN + tl.arange(0, TURN)
    words += tile * groups * STRIDE
    scales += tile * groups * 2 * STRIDE + 64 * P
    w, s = _turn(words, scales, g, groups, 0, 0, P, 2)
    codes = _ordered(_codes(_rows_of(w, P, 2), BITS, KIND, DOT), BITS, BACK=True)
    y = codes.to(tl.float32) * tl.reshape(s, (TURN, 32)).to(tl.float32)[:, :, None]
    row = tile * 32 + tl.arange(0, 32)
    column = g[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    there = (row < F)[None, :, None] & (column < D)
    tl.store(out + row[None, :, None] * D + column, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _packed_rows_kernel(
    ids, words, scales, out, D, groups,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    DOT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Row ids[i] of the matrix, written out as row i of out (N, D)."""
    P: tl.constexpr = GROUP * BITS // 32
    STRIDE: tl.constexpr = 32 * P + 16
    g, piece = tl.arange(0, GROUPS), tl.arange(0, P)
    i = tl.program_id(0).to(tl.int64)
    wait(CHAINED)
    row = tl.load(ids + i)
    tile, r = row // 32, row % 32
    words += tile * groups * STRIDE + r // 16 * (16 * P) + r % 16
    scales += tile * groups * 2 * STRIDE + 64 * P + r
    at = g[:, None, None] * STRIDE + piece[None, None, :] * 16
    w = tl.load(words + at, mask=(g < groups)[:, None, None], other=0)  # (G, 1, P)
    s = tl.load(scales + g * (2 * STRIDE), mask=g < groups, other=0.0).to(tl.float32)
    y = _ordered(_codes(w, BITS, KIND, DOT), BITS, BACK=True).to(tl.float32) * s[:, None, None]
    column = g[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    tl.store(out + i * D + column, y.to(out.dtype.element_ty), mask=column < D)


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """As `hymba.ops.packed.packed_linear_reference`, without gradients."""
    if len(x) > MOST_ROWS:
        return F.linear(x, dequantize(packed, x.dtype))
    return _product(packed, x)


def packed_norm_linear(x: Tensor, norm_weight: Tensor, eps: float, packed: Packed) -> Tensor:
    """As `hymba.ops.packed.packed_norm_linear`."""
    if len(x) > MOST_ROWS:
        return packed_linear(rms_norm(x, norm_weight, eps), packed)
    return _product(packed, x, norm_weight, eps)


def packed_norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Packed) -> Tensor:
    """As `hymba.ops.packed.packed_norm_swiglu`."""
    if len(x) > MOST_ROWS:
        return swiglu(*packed_norm_linear(x, norm_weight, eps, gate_up).chunk(2, dim=-1))
    return _product(gate_up, x, norm_weight, eps, gated=True)


def packed_fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    packed: Packed,
    residual: Tensor,
) -> Tensor:
    """As `hymba.ops.packed.packed_fuse_linear`."""
    if len(attention) > MOST_ROWS:
        fused = fuse_heads(attention, ssm, attention_weight, ssm_weight, eps)
        return packed_linear_add(fused, packed, residual)
    return _product(
        packed, attention, attention_weight, eps, residual, other=ssm, other_norm=ssm_weight
    )


def packed_linear_add(x: Tensor, packed: Packed, residual: Tensor) -> Tensor:
    """As `hymba.ops.packed.packed_linear_add`."""
    if len(x) > MOST_ROWS:
        return residual + packed_linear(x, packed)
    return _product(packed, x, residual=residual)


def packed_rows(ids: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `hymba.ops.packed.packed_rows`."""
    return _rows(ids, packed.tiles, packed.columns, packed.scheme.name, dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `hymba.ops.packed.dequantize`."""
    return _dequantize(packed.tiles, packed.rows, packed.columns, packed.scheme.name, dtype)


def _words(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The same bytes as whole words and as scales."""
    return tiles.view(torch.int32), tiles.view(torch.float16)


def cut_of(rows: int, groups: int, group: int) -> Cut:
    """For a matrix of so many rows and groups; `columns` are those of whole groups."""
    cut = TILING.many if rows >= TILE * PROCESSORS else TILING.few
    turn = min(cut.columns // group, next_power_of_2(groups))
    return cut._replace(columns=turn * group, warps=min(cut.warps, max(1, turn)))


def _product(
    packed: Packed,
    x: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    other: Tensor | None = None,
    other_norm: Tensor | None = None,
) -> Tensor:
    tiles, rows, columns, scheme = packed
    return _operator(
        tiles, rows, columns, scheme.name, gated, x, norm, eps, residual, other, other_norm
    )  # fmt: skip


@operator("packed_linear")
def _operator(
    tiles: Tensor,
    rows: int,
    columns: int,
    scheme: str,
    gated: bool,
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    other: Tensor | None,
    other_norm: Tensor | None,
) -> Tensor:
    """x (N, columns) -> (N, rows): residual + F.linear(rms_norm(x), matrix), both if given, or the
    mean with the norm of `other`; gated: (N, rows / 2), the first half of the rows through swiglu
    with the second."""
    packed = Packed(tiles, rows, columns, SCHEMES[scheme])
    x, residual = dense_last(x), None if residual is None else dense_last(residual)
    inputs = [Input(x, norm)]
    if other is not None:
        inputs.append(Input(dense_last(other), other_norm))
    if x.numel() and packed_cuda.supports(packed, inputs, residual):
        return packed_cuda.product(packed, inputs, eps, residual, gated)
    if other is not None and norm is not None and other_norm is not None:
        x, norm = fuse_heads(x, other, norm, other_norm, eps), None
    return _thin(packed, x, norm, eps, residual, gated)


@_operator.register_fake
def _(
    tiles: Tensor, rows: int, columns: int, scheme: str, gated: bool, x: Tensor, *_: Any
) -> Tensor:
    return x.new_empty(len(x), rows // 2 if gated else rows)


def _thin(
    packed: Packed,
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    tiles, rows, columns, scheme = packed
    rows, count, group = rows // 2 if gated else rows, len(x), scheme.group
    out = x.new_empty(count, rows)
    if out.numel():
        groups, words = scheme.groups(columns), _words(tiles)
        cut, dot = cut_of(rows, groups, group), dot_type(x)
        parts = 1
        if x.is_cuda and x.dtype != torch.bfloat16:
            parts, dot = 3 if x.dtype == torch.float32 else 2, tl.bfloat16
        count_tiles = cdiv(rows, TILE)
        launch(
            _packed_linear_kernel,
            (count_tiles * (2 if gated else 2 // cut.halves), cdiv(count, BLOCK)),
            x, *words, x if norm is None else norm.contiguous(),
            x if residual is None else residual, out, count, rows, columns, groups, count_tiles,
            eps, x.stride(0), 0 if residual is None else residual.stride(0), BITS=scheme.bits,
            KIND=scheme.kind, GROUP=group, TURN=cut.columns // group,
            HALVES=2 if gated else cut.halves, ROWS=BLOCK, EVEN=columns % group == 0, PARTS=parts,
            DOT=dot, NORM=norm is not None, GATED=gated, ADDED=residual is not None,
            CHAINED=TILING.chain and chains(x), num_warps=cut.warps, maxnreg=cut.registers,
        )  # fmt: skip
    return out


@operator("packed_dequantize")
def _dequantize(tiles: Tensor, rows: int, columns: int, scheme: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(rows, columns, dtype=dtype, device=tiles.device)
    if out.numel():
        how = SCHEMES[scheme]
        groups = how.groups(columns)
        turn = min(256 // how.group, next_power_of_2(groups))
        launch(
            _dequantize_kernel, (len(tiles), cdiv(groups, turn)), *_words(tiles), out, rows,
            columns, groups, BITS=how.bits, KIND=how.kind, GROUP=how.group, TURN=turn,
            DOT=_exact(tiles), num_warps=4,
        )  # fmt: skip
    return out


@_dequantize.register_fake
def _(tiles: Tensor, rows: int, columns: int, scheme: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=tiles.device)


@operator("packed_rows")
def _rows(ids: Tensor, tiles: Tensor, columns: int, scheme: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(ids), columns, dtype=dtype, device=tiles.device)
    if out.numel():
        how = SCHEMES[scheme]
        groups = how.groups(columns)
        launch(
            _packed_rows_kernel, (len(ids),), ids.contiguous(), *_words(tiles), out, columns,
            groups, BITS=how.bits, KIND=how.kind, GROUP=how.group,
            GROUPS=next_power_of_2(groups), DOT=_exact(tiles),
            CHAINED=TILING.chain and chains(tiles), num_warps=4,
        )  # fmt: skip
    return out


@_rows.register_fake
def _(ids: Tensor, tiles: Tensor, columns: int, scheme: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(ids), columns, dtype=dtype, device=tiles.device)


def _exact(tiles: Tensor) -> Any:
    """What codes become; the interpreter knows no bfloat16."""
    return tl.bfloat16 if tiles.is_cuda else tl.float32
