"""GPTQ of one matrix: better products than rounding to nearest, at sizes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba.ops.packed import dequantize, quantize, round_to, unpack
from hymba.quant.gptq import gptq
from hymba.schemes import SCHEMES, Scheme, SchemeError

each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
each_size = pytest.mark.parametrize("size", [(7, 8), (33, 100), (40, 132), (64, 64)], ids=str)


def rows_and_weight(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inputs that know much of each other, of very different sizes; a weight."""
    draw = torch.Generator().manual_seed(sum(size))
    mix = torch.randn(size[1] // 2 + 1, size[1], generator=draw)
    x = torch.randn(500, len(mix), generator=draw) @ mix
    x += 0.1 * torch.randn(x.shape, generator=draw)
    return x * torch.linspace(0.1, 3, size[1]), torch.randn(size, generator=draw)


def error_of(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((x @ (rounded - weight).T).square().sum())


@each_scheme
@each_size
def test_products_are_nearer(scheme: Scheme, size: tuple[int, int]) -> None:
    x, weight = rows_and_weight(size)
    nearest, ours = quantize(weight, scheme), gptq(weight, x.T @ x, scheme)
    assert (ours.rows, ours.columns) == size and ours.tiles.shape == nearest.tiles.shape
    before, after = (error_of(x, weight, dequantize(p)) for p in (nearest, ours))
    assert after < 0.6 * before
    assert torch.equal(unpack(ours)[1], unpack(nearest)[1])  # the same scales


@each_scheme
@each_size
def test_without_knowledge_it_is_rounding_to_nearest(scheme: Scheme, size: tuple[int, int]) -> None:
    _, weight = rows_and_weight(size)
    inputs = torch.linspace(1, 9, size[1])
    for hessian in (torch.zeros(size[1], size[1]), torch.diag(inputs), 5 * torch.eye(size[1])):
        assert torch.equal(gptq(weight, hessian, scheme).tiles, quantize(weight, scheme).tiles)


@each_scheme
def test_a_multiple_changes_nothing_and_nothing_is_changed(scheme: Scheme) -> None:
    x, weight = rows_and_weight((33, 100))
    hessian = x.T @ x
    given = hessian.clone(), weight.clone()
    once, again = gptq(weight, hessian, scheme), gptq(weight, hessian / len(x), scheme)
    same = (unpack(once)[0].float() == unpack(again)[0].float()).float().mean()
    assert same > 0.98  # ties fall as float32 rounds them
    assert torch.equal(hessian, given[0]) and torch.equal(weight, given[1])


def slowly(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """The definition: after each column the best of all that is still free, by least squares."""
    scales = unpack(quantize(weight, scheme))[1].float().repeat_interleave(scheme.group, 1)
    wide = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    order = hessian.diagonal().argsort(descending=True).tolist()
    goal, out = weight.double().clone(), torch.zeros_like(weight)
    for at, j in enumerate(order):
        scale = scales[:, j].double()
        code = round_to(goal[:, j, None], scale, scheme)[:, 0].double()
        lost = goal[:, j] - code * scale
        out[:, j] = (code * scale).float()
        free = order[at + 1 :]
        if free:  # what of the rest makes up for `lost`: solve H_ff d = H_fj
            d = torch.linalg.solve(wide[free][:, free], wide[free, j])
            goal[:, free] += lost[:, None] * d
    return out


@each_scheme
def test_is_the_definition(scheme: Scheme) -> None:
    x, weight = rows_and_weight((5, 2 * scheme.group))
    hessian = x.T @ x
    same = dequantize(gptq(weight, hessian, scheme)).isclose(slowly(weight, hessian, scheme))
    assert same.float().mean() > 0.97  # ties, and what follows from one that fell otherwise


def test_numbers_that_are_not_finite() -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = torch.inf
    with pytest.raises(SchemeError, match="not finite"):
        gptq(weight, torch.eye(32), SCHEMES["int4"])
