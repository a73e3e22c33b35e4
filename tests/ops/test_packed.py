"""Matrices in few bits: the layout keeps every code, rounding is to nearest, sizes need not fit."""

from __future__ import annotations

import pytest
import torch

from hymba import ops
from hymba.ops.packed import (
    TILE,
    Packed,
    decode,
    dequantize,
    pack,
    packed_rows,
    quantize,
    round_to,
    unpack,
)
from hymba.schemes import SCHEMES, Scheme, SchemeError, scheme_named

SHAPES = [(1, 1), (3, 31), (32, 64), (33, 100), (70, 129), (132, 320)]
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)


def any_codes(shape: tuple[int, int], scheme: Scheme) -> torch.Tensor:
    """All that there are, drawn."""
    bytes_ = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
    if scheme.kind == "e4m3":
        bytes_[bytes_ & 127 == 127] = 0  # not numbers
    return decode(bytes_, scheme)


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / 50


@ALL
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_layout_keeps_every_code_and_scale(scheme: Scheme, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    groups = scheme.groups(columns)
    codes = any_codes((rows, groups * scheme.group), scheme)
    scales = torch.rand(rows, groups, generator=generator).half()
    packed = pack(codes, scales, columns, scheme)
    assert packed.tiles.shape == (-(-rows // TILE), groups * scheme.group_bytes)
    got = unpack(packed)
    assert torch.equal(got[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got[1], scales)
    wide = codes.view(rows, groups, -1).float() * scales.float()[..., None]
    assert torch.equal(dequantize(packed), wide.flatten(1)[:, :columns])


def e4m3(byte: int) -> float:
    """A sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    number = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -number if sign else number


def test_every_float_code_is_its_number_and_nearest() -> None:
    scheme = SCHEMES["fp8"]
    bytes_ = torch.tensor([x for x in range(256) if x & 127 != 127], dtype=torch.uint8)
    codes = decode(bytes_, scheme).float()
    assert codes.tolist() == [e4m3(x) for x in bytes_.tolist()]
    assert (codes.max(), codes.min()) == (scheme.most, scheme.least)
    x = torch.cat([weight(1, 999)[0] * 1000, torch.tensor([0.0, 464, 500, -1e9, 1e-9])])
    got = round_to(x, torch.tensor(1.0), scheme).float()
    off = (codes[:, None] - x).abs().min(0).values
    assert torch.equal((got - x).abs(), off)


def test_the_layout_is_the_one_that_is_written_down() -> None:
    """Byte by byte, from the module's own words."""
    for scheme in SCHEMES.values():
        rows, columns = 40, 2 * scheme.group
        codes = any_codes((rows, columns), scheme)
        scales = torch.rand(rows, 2).half()
        tiles = pack(codes, scales, columns, scheme).tiles
        for row, column in [(0, 0), (15, 7), (16, 4), (31, columns - 1), (39, scheme.group + 5)]:
            tile, lane = divmod(row, 32)
            half, r = divmod(lane, 16)
            group, c = divmod(column, scheme.group)
            start = group * scheme.group_bytes + half * 16 * scheme.group * scheme.bits // 8
            if scheme.bits == 4:
                piece, inside = divmod(c, 8)
                byte = int(tiles[tile, start + 64 * piece + 4 * r + inside % 4])
                code = (byte >> 4 if inside >= 4 else byte & 15) - 8
            else:
                piece, inside = divmod(c, 4)
                code = int(tiles[tile, start + 64 * piece + 4 * r + inside])
                code = e4m3(code) if scheme.kind == "e4m3" else code - 128
            assert code == codes[row, column].float()
            end = group * scheme.group_bytes + 32 * scheme.group * scheme.bits // 8
            kept = tiles[tile, end + 2 * lane : end + 2 * lane + 2].clone().view(torch.float16)
            assert kept == scales[row, group]


@ALL
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_number_is_further_from_its_code_than_half_a_step(
    scheme: Scheme, rows: int, columns: int
) -> None:
    w = weight(rows, columns)
    packed = quantize(w, scheme)
    codes, scales = unpack(packed)
    codes = codes.float()[:, :columns]
    steps = scales.float().abs().repeat_interleave(scheme.group, dim=1)[:, :columns]
    if scheme.kind == "e4m3":  # from one code to the next: an eighth of the power of two below
        steps = steps * 2.0 ** (codes.abs().log2().floor().clamp(min=-6) - 3)
    clipped = (codes == scheme.most) | (codes == scheme.least)
    off = (dequantize(packed) - w).abs()
    assert (off <= steps * 0.5001)[~clipped].all()
    assert (off <= steps).all()  # where the code on the other side was missing
    error = float(off.norm() / w.norm())
    assert error < {"int8": 0.007, "int4": 0.1, "fp8": 0.026}[scheme.name]


@ALL
def test_zeros_stay_zeros_and_great_numbers_are_refused(scheme: Scheme) -> None:
    assert not dequantize(quantize(torch.zeros(3, 40), scheme)).any()
    for wrong in (float("nan"), float("inf"), 1e30):
        with pytest.raises(SchemeError, match="it holds numbers"):
            quantize(torch.full((2, 40), wrong), scheme)


@ALL
def test_products_and_looked_up_rows_are_those_of_the_matrix(scheme: Scheme) -> None:
    packed = quantize(weight(70, 129), scheme)
    matrix, x = dequantize(packed), weight(5, 129)
    assert torch.allclose(ops.packed_linear(x, packed), x @ matrix.T, rtol=0, atol=2e-2)
    ids = torch.tensor([69, 0, 31, 32, 0])
    assert torch.equal(packed_rows(ids, packed), matrix[ids])
    assert packed_rows(ids[:0], packed).shape == (0, 129)
    with pytest.raises(ValueError, match="packed_linear: x has size 128 where 129"):
        ops.packed_linear(x[:, 1:], packed)


def test_rows_get_gradients_and_weights_none() -> None:
    packed = quantize(weight(40, 64), SCHEMES["int4"])
    x = weight(3, 64).requires_grad_()
    ops.packed_linear(x, packed).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dequantize(packed).sum(0).expand(3, -1), atol=1e-5)


def test_an_unknown_scheme_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SchemeError, match="called 'int5': int8, int4, fp8; did you mean int"):
        scheme_named("int5")


def test_a_packed_matrix_is_as_small_as_it_says() -> None:
    for name, most in (("int8", 0.26), ("fp8", 0.26), ("int4", 0.141)):
        packed = quantize(weight(3200, 1600)[:64], SCHEMES[name])
        assert isinstance(packed, Packed)
        assert packed.tiles.nbytes <= most * 4 * 64 * 1600
