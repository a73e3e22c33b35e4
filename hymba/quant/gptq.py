"""One matrix, rounded with the rows in mind that it will multiply (GPTQ, arXiv:2210.17323).

Rounding to nearest keeps the weights; what should stay are the products. With rows X, errors are to
be weighed by H = X^T X: rounding one column leaves an error that columns still free can make good
in part. The best way to do so is the row of the upper Cholesky factor U of H's inverse:

    error = (w_j - rounded w_j) / U_jj            (rows,)
    w_k  -= error * U_jk                          every k after j

Scales are those of rounding to nearest, found first, so that columns can go in any order: those
with the largest inputs first, while most others are still free. What a block of columns owes to all
behind it is one product at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hymba.ops import Packed
from hymba.ops.packed import CODES, best_scales, grouped, pack, round_to
from hymba.schemes import Scheme, SchemeError

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that were never seen
BLOCK = 64  # columns


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Packed:
    """weight (rows, columns), hessian (columns, columns): the sum or mean of x^T x over rows x.

    Inputs that know nothing of each other (a diagonal hessian) give what `quantize` gives.
    SchemeError as there, and for inputs that are not finite."""
    if not bool(torch.isfinite(hessian).all()):
        raise SchemeError("what it reads are numbers that are not finite, or whose squares are not")
    x = grouped(weight, scheme)  # (rows, groups, G), padded with zeros
    scales = best_scales(x, scheme)  # (rows, groups)
    x = x.flatten(1)
    order = pad(hessian.diagonal(), (0, x.shape[1] - len(hessian))).argsort(descending=True)
    left, wide = x[:, order], scales[:, order // scheme.group]  # in the order of going
    factor = _factor(hessian, order)
    codes = torch.empty_like(x, dtype=CODES[scheme.kind])
    for first in range(0, x.shape[1], BLOCK):
        part, steps = left[:, first : first + BLOCK], wide[:, first : first + BLOCK]
        own = factor[first : first + BLOCK, first : first + BLOCK]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            code = round_to(part[:, j, None], steps[:, j], scheme)[:, 0]
            errors[:, j] = (part[:, j] - code.float() * steps[:, j].float()) / own[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * own[j, j + 1 :]  # a view: paid in `left`
            codes[:, order[first + j]] = code
        left[:, first + BLOCK :] -= errors @ factor[first : first + BLOCK, first + BLOCK :]
    return pack(codes, scales, weight.shape[1], scheme)


def _factor(hessian: Tensor, order: Tensor) -> Tensor:
    """U, upper, with U^T U the inverse of the damped hessian, in the order of going. Padded columns
    know nothing of the others."""
    wide = hessian.double()
    damping = DAMPING * wide.diagonal().mean() or 1.0
    wide = pad(wide, (0, len(order) - len(wide)) * 2)
    wide.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide[order][:, order]))
    return torch.linalg.cholesky(inverse, upper=True).float()
