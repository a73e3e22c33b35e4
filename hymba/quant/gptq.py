"""One matrix, rounded with the rows in mind that it will multiply (GPTQ, arXiv:2210.17323).

Rounding to nearest keeps the weights; what should stay are the products. With rows X, their errors
are those of the weights weighed by H = X^T X: rounding one column leaves an error that later
columns, still free, can make good in part. The best way to do so is the row of the upper Cholesky
factor U of H's inverse:

    error = (w_j - rounded w_j) / U_jj            (rows,)
    w_k  -= error * U_jk                          every k > j

Columns go one after the other within a group; what a group owes to all later groups is one product
at its end. A group's scales are found when its turn comes, from what its columns have become.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hymba.ops import Packed
from hymba.ops.packed import best_scales, grouped, pack, round_to
from hymba.schemes import Scheme

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that were never seen


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Packed:
    """weight (rows, columns), hessian (columns, columns): the sum or mean of x^T x over rows x.

    A hessian of zeros, or any multiple of the identity, gives what `quantize` gives. SchemeError
    as there."""
    x = grouped(weight, scheme)  # (rows, groups, G), padded with zeros
    groups, size = x.shape[1:]
    x = x.flatten(1)
    factor = _factor(hessian, x.shape[1])
    codes, scales = [], []
    for first in range(0, groups * size, size):
        last = first + size
        part = x[:, first:last]  # a view: what is owed within the group is paid in place
        scale = best_scales(part, scheme)
        errors = torch.empty_like(part)
        rounded = torch.empty_like(part, dtype=torch.int8)
        for j in range(size):
            row = factor[first + j, first:last]
            rounded[:, j] = round_to(part[:, j : j + 1], scale, scheme)[:, 0]
            errors[:, j] = (part[:, j] - rounded[:, j] * scale.float()) / row[j]
            part[:, j + 1 :] -= errors[:, j, None] * row[None, j + 1 :]
        x[:, last:] -= errors @ factor[first:last, last:]
        codes.append(rounded)
        scales.append(scale)
    return pack(torch.cat(codes, 1), torch.stack(scales, 1), weight.shape[1], scheme)


def _factor(hessian: Tensor, columns: int) -> Tensor:
    """U (columns, columns), upper, with U^T U the inverse of the damped hessian. Padded columns
    know nothing of the others."""
    wide = hessian.double()
    damping = DAMPING * wide.diagonal().mean() or 1.0
    wide = pad(wide, (0, columns - len(wide)) * 2)
    wide.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()
