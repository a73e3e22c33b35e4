"""A model whose matrices are kept in few bits: modules that stand where Linear and Embedding stood.

What is packed is decided by name, in `plan`: the projections, and the embedding with its head.
Everything else (norms, convolution, A, D, dt's bias, meta tokens) is under one per cent of the
weights and stays as it is. A packed weight is bytes, not numbers, so it has no gradient: rows that
need one get it through the reference, which makes the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hymba import ops
from hymba.ops import Packed
from hymba.ops.packed import TILE, quantize
from hymba.schemes import SCHEMES, Scheme, SchemeError

# In 8 bits where the others are in 4: 3 % of the 1.5B's weights, where 4 bits cost more than in any
# other kind of matrix. x_proj and dt_proj, on which every state depends, lose nothing (measured:
# docs/quantisation.md).
CAREFUL = ("embed_tokens", "lm_head")


class _Tiles(nn.Module):
    """Bytes of a matrix (rows, columns), frozen."""

    def __init__(self, rows: int, columns: int, scheme: Scheme):
        super().__init__()
        self.rows, self.columns, self.scheme = rows, columns, scheme
        shape = -(-rows // TILE), scheme.groups(columns) * scheme.group_bytes
        self.tiles = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)

    @property
    def packed(self) -> Packed:
        return Packed(self.tiles, self.rows, self.columns, self.scheme)

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, {self.scheme.name}"


class PackedLinear(_Tiles):
    """x (..., columns) -> (..., rows), as nn.Linear(columns, rows, bias=False)."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme):
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x.reshape(-1, self.columns), self.packed).view(*x.shape[:-1], -1)


class PackedEmbedding(_Tiles):
    """ids (N,) -> (N, columns) in `like`'s dtype, as nn.Embedding(rows, columns)."""

    def __init__(self, rows: int, columns: int, scheme: Scheme, like: Tensor):
        super().__init__(rows, columns, scheme)
        self._like = [like]  # in a list: not a parameter of this module

    def forward(self, ids: Tensor) -> Tensor:
        return ops.packed_rows(ids, self.packed, self._like[0].dtype)


def plan(model: nn.Module, scheme: Scheme) -> dict[str, Scheme]:
    """Which modules are packed, and how: names of Linear and Embedding modules."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            careful = name.rpartition(".")[2] in CAREFUL and scheme.bits < 8
            found[name] = SCHEMES["int8"] if careful else scheme
    return found


def make_room(model: nn.Module, schemes: Mapping[str, Scheme], tied: bool) -> None:
    """Put packed modules, still empty, where `schemes` names Linear and Embedding modules."""
    for name, scheme in schemes.items():
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        with torch.device(old.weight.device):  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), child, _packed_as(old, scheme, model))
    if tied and "lm_head" in schemes:
        model.lm_head.tiles = model.decoder.embed_tokens.tiles  # type: ignore[union-attr]


def _packed_as(old: nn.Module, scheme: Scheme, model: nn.Module) -> nn.Module:
    if isinstance(old, nn.Linear):
        return PackedLinear(old.in_features, old.out_features, scheme)
    assert isinstance(old, nn.Embedding)
    like = model.get_parameter("decoder.final_norm.weight")
    return PackedEmbedding(old.num_embeddings, old.embedding_dim, scheme, like)


def packed_tiles(name: str, weight: Tensor, scheme: Scheme) -> Tensor:
    """Rounded to nearest; SchemeError that names the tensor if it cannot be held."""
    try:
        return quantize(weight, scheme).tiles
    except SchemeError as error:
        raise SchemeError(f"{name} cannot be kept in {scheme.name}: {error}") from None


def schemes_of(model: nn.Module) -> dict[str, Scheme]:
    """The packed modules of a model; empty for a model as it was trained."""
    modules = model.named_modules()
    return {name: module.scheme for name, module in modules if isinstance(module, _Tiles)}
