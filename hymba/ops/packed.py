"""Matrices in few bits, laid out for the kernels that multiply with them.

    weight (rows, columns) ~ codes (rows, columns) * scales (rows, groups)

Rows go in tiles of 32, two halves of 16; a tile is one stream of bytes, read from first to last.
For each group of G columns it holds

    codes of half 0 | codes of half 1 | 32 scales, float16

and a half's codes are pieces of 64 bytes in which bytes 4r to 4r + 3 belong to row r: with 8 bits
those of 4 columns, with 4 bits those of 8, the first 4 in the low halves of the bytes, the others
in the high ones. So one load of a piece is a vector of 16 rows: sums stay in their lanes, and the
product of four neighbouring codes with four activations is one instruction where there is one
(VNNI, dp4a). Whole codes are stored with 2^(bits - 1) added, unsigned; codes of e4m3 as they are.
Missing rows and columns of the last tile and the last group are zeros.

The layout is also that of files (`hymba.weights`), so that a folder is mapped, not converted.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.ops.backend import twin
from hymba.schemes import Scheme, SchemeError

TILE = 32
HALF = 16
CODES = {"int": torch.int8, "e4m3": torch.float8_e4m3fn}  # by a scheme's kind
log = logging.getLogger("hymba")


class Packed(NamedTuple):
    tiles: Tensor  # (T, groups * scheme.group_bytes) uint8
    rows: int
    columns: int
    scheme: Scheme


def quantize(weight: Tensor, scheme: Scheme) -> Packed:
    """Round to nearest: of a few scales for each group the one with the least squared error."""
    rows, columns = weight.shape
    parts = []
    for some in weight.split(16 * TILE):  # what is made on the way stays in a CPU's caches
        codes, scales = nearest(grouped(some, scheme), scheme)
        parts.append(pack(codes.flatten(1), scales, columns, scheme).tiles)
    return Packed(torch.cat(parts), rows, columns, scheme)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, columns) -> (rows, groups, G) float32, the last group padded with zeros."""
    rows, columns = weight.shape
    if not bool(torch.isfinite(weight).all()):
        raise SchemeError("it holds numbers that are not finite")
    groups = scheme.groups(columns)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * scheme.group - columns))
    return padded.view(rows, groups, scheme.group)


def nearest(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """x (rows, groups, G) -> codes (rows, groups, G), scales (rows, groups) float16."""
    scales = best_scales(x, scheme)
    return round_to(x, scales, scheme), scales


def best_scales(x: Tensor, scheme: Scheme) -> Tensor:
    """x (..., G) -> (...) float16: of those that make a group's largest number one of `_ends`."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    best, least = torch.zeros_like(largest).half(), torch.full_like(largest, torch.inf)
    for steps in _ends(scheme):
        scale = (largest / steps).half()
        if not bool(torch.isfinite(scale).all()):
            limit = int(65504 * min(map(abs, _ends(scheme))))
            raise SchemeError(f"it holds numbers above {limit:,}")
        error = (round_to(x, scale, scheme).float() * scale[..., None].float() - x).square().sum(-1)
        best, least = torch.where(error < least, scale, best), error.minimum(least)
    return best


def _ends(scheme: Scheme) -> tuple[float, ...]:
    """There is a whole code more on the negative side, so the largest number may become that one,
    by a negative scale if it is positive. Floats are as fine in one octave as in the next: their
    codes of the highest are tried."""
    if scheme.kind == "e4m3":
        return 448, 416, 384, 352, 320, 288, 256, 240
    return scheme.most, scheme.most + 0.5, scheme.least, scheme.least + 0.5


def round_to(x: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """x (..., G), scales (...) -> codes (..., G), in the dtype of `CODES`."""
    wide = scales.float()[..., None]
    numbers = torch.where(wide == 0, 0, x / wide).clamp(scheme.least, scheme.most)
    # A float rounds as it becomes narrow, a whole number would be cut off.
    return (numbers.round() if scheme.kind == "int" else numbers).to(CODES[scheme.kind])


def encode(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes as bytes; those of 4 bits are not put together yet."""
    if scheme.kind == "e4m3":
        return codes.view(torch.uint8)
    return (codes.short() + scheme.zero).to(torch.uint8)


def decode(raw: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `encode`."""
    if scheme.kind == "e4m3":
        return raw.view(torch.float8_e4m3fn)
    return (raw.short() - scheme.zero).to(torch.int8)


def pack(codes: Tensor, scales: Tensor, columns: int, scheme: Scheme) -> Packed:
    """codes (rows, groups * G), scales (rows, groups) float16, laid out."""
    rows, groups = scales.shape
    tiles, size = -(-rows // TILE), codes.shape[1]
    raw = torch.full((tiles * TILE, size), scheme.zero, dtype=torch.uint8, device=codes.device)
    raw[:rows] = encode(codes, scheme)
    raw = raw.view(tiles, 2, HALF, groups, -1)
    if scheme.bits == 4:
        low, high = raw.view(tiles, 2, HALF, groups, scheme.group // 8, 2, 4).unbind(-2)
        raw = low | high << 4
    else:
        raw = raw.view(tiles, 2, HALF, groups, scheme.group // 4, 4)
    raw = raw.permute(0, 3, 1, 4, 2, 5).reshape(tiles, groups, -1)
    ends = scales.new_zeros(tiles * TILE, groups, dtype=torch.float16)
    ends[:rows] = scales
    ends = ends.view(tiles, TILE, groups).transpose(1, 2).contiguous()
    ends = ends.view(torch.uint8).view(tiles, groups, 2 * TILE)
    return Packed(torch.cat([raw, ends], dim=-1).flatten(1), rows, columns, scheme)


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """What `pack` was given: codes (rows, groups * G), scales (rows, groups) float16."""
    return _unpack(packed.tiles, packed.scheme, packed.rows)


def _unpack(tiles: Tensor, scheme: Scheme, rows: int) -> tuple[Tensor, Tensor]:
    count, groups = len(tiles), tiles.shape[1] // scheme.group_bytes
    parts = tiles.view(count, groups, scheme.group_bytes)
    raw, ends = parts[..., : -2 * TILE], parts[..., -2 * TILE :]
    pieces = scheme.group * scheme.bits // 32
    raw = raw.reshape(count, groups, 2, pieces, HALF, 4).permute(0, 2, 4, 1, 3, 5)
    # (T, 2, 16, groups, pieces, 4)
    if scheme.bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], dim=-2)
    codes = decode(raw.reshape(count * TILE, groups * scheme.group), scheme)
    scales = ends.contiguous().view(torch.float16).view(count, groups, TILE)
    return codes[:rows], scales.transpose(1, 2).reshape(count * TILE, groups)[:rows]


def _weights(tiles: Tensor, packed: Packed, rows: int, dtype: torch.dtype) -> Tensor:
    codes, scales = _unpack(tiles, packed.scheme, rows)
    wide = codes.view(*scales.shape, packed.scheme.group).float() * scales[..., None].float()
    return wide.flatten(1)[:, : packed.columns].to(dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns)."""
    return _weights(packed.tiles, packed, packed.rows, dtype)


def packed_rows(ids: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (N,) of the matrix, (N, columns): an embedding's look-up."""
    scheme, tile, row = packed.scheme, ids // TILE, ids % TILE
    parts = packed.tiles.view(len(packed.tiles), -1, scheme.group_bytes)  # (T, groups, bytes)
    raw = parts[..., : -2 * TILE].unflatten(-1, (2, -1, HALF, 4))
    raw = raw[tile, :, row // HALF, :, row % HALF]  # (N, groups, pieces, 4)
    ends = parts[..., -2 * TILE :].unflatten(-1, (TILE, 2))[tile, :, row]  # (N, groups, 2)
    if scheme.bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], dim=-2)
    codes = decode(raw.flatten(2), scheme).float()  # (N, groups, G)
    wide = codes * ends.contiguous().view(torch.float16).float()
    return wide.flatten(1)[:, : packed.columns].to(dtype)


def packed_linear_reference(x: Tensor, packed: Packed) -> Tensor:
    """x (N, columns) -> (N, rows), in x's dtype. A tenth of the matrix is made at a time."""
    out = x.new_empty(len(x), packed.rows)
    step = -(-len(packed.tiles) // 10)
    for first in range(0, len(packed.tiles), step):
        tiles = packed.tiles[first : first + step]
        start = first * TILE
        rows = min(len(tiles) * TILE, packed.rows - start)
        out[:, start : start + rows] = x @ _weights(tiles, packed, rows, x.dtype).T
    return out


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """As the reference: plain PyTorch has no faster one. A CPU has; it is said once."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _name_faster(packed.scheme)
    return packed_linear_reference(x, packed)


@cache
def _name_faster(scheme: Scheme) -> None:
    if scheme.kind != "int":
        log.warning("hymba: %s is slow on a CPU: take int8, as small and nearer", scheme.name)
    elif find_spec("numba") is None:
        log.warning("hymba: weights in few bits are slow here without: pip install 'hymba[cpu]'")


# What a decode step has before and behind a product, one by one: each by what serves it.


def packed_norm_linear(x: Tensor, norm_weight: Tensor, eps: float, packed: Packed) -> Tensor:
    """x (S, columns) -> (S, rows), of its norm."""
    return _product(twin("rms_norm", x)(x, norm_weight, eps), packed)


def packed_norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_up: Packed) -> Tensor:
    """x (S, columns), the rows of gate and of up one behind the other -> (S, rows / 2)."""
    gate, up = packed_norm_linear(x, norm_weight, eps, gate_up).chunk(2, dim=-1)
    return twin("swiglu", gate)(gate, up)


def packed_linear_add(x: Tensor, packed: Packed, residual: Tensor) -> Tensor:
    """x (S, columns), residual (S, rows) -> (S, rows)."""
    return residual + _product(x, packed)


def packed_fuse_linear(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    packed: Packed,
    residual: Tensor,
) -> Tensor:
    """attention, ssm (S, columns), their norms' weights, residual (S, rows) -> (S, rows)."""
    fused = twin("fuse_heads", attention)(attention, ssm, attention_weight, ssm_weight, eps)
    return packed_linear_add(fused, packed, residual)


def _product(x: Tensor, packed: Packed) -> Tensor:
    return twin("packed_linear", x)(x, packed)
