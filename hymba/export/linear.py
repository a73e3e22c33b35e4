"""Matrices of a model in a graph: float32 as `Gemm`, packed ones as onnxruntime's `MatMulNBits`.

A packed matrix is the same codes and scales in another order of bytes: rows of groups, low nibble
first, codes with 2^(bits - 1) added (which is the zero point that the op takes by itself), scales
in float32 because activations are. So codes that are floats stay out (`check_scheme`). Look-ups of
a packed embedding read the very bytes of its tied head, by `GatherBlockQuantized`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hymba.errors import UserError
from hymba.export.graph import MICROSOFT, Graph
from hymba.model.packed import PackedEmbedding, PackedLinear
from hymba.model.ssm import is_matrix
from hymba.ops import Packed
from hymba.ops.packed import encode, unpack
from hymba.schemes import Scheme


class ExportError(UserError):
    """A model that cannot be a graph; the message says which part and why."""


def check_scheme(scheme: Scheme) -> None:
    """ExportError where no op multiplies such codes."""
    if scheme.kind != "int":
        raise ExportError(
            f"onnxruntime's MatMulNBits takes whole codes, and those of {scheme.name} are floats:"
            " export the model as it was trained, with --quantize int8"
        )


def array(x: Tensor) -> np.ndarray:
    """A tensor as float32."""
    return x.detach().to("cpu", torch.float32).numpy()


def linear(
    graph: Graph, x: str, module: nn.Module, name: str, accuracy: int, bias: str = ""
) -> str:
    """x (N, columns) -> (N, rows), and `bias` (rows) added. `accuracy` is MatMulNBits'
    accuracy_level."""
    if isinstance(module, PackedLinear):
        return _packed_linear(graph, x, module.packed, name, accuracy, bias)
    if not is_matrix(module):
        raise ExportError(
            f"{name} is a {type(module).__name__}, not a plain matrix: merge it first"
        )
    rest = [bias] if bias else []
    return graph.op("Gemm", x, _weight(graph, name, module.weight), *rest, transB=1)  # type: ignore[arg-type]


def look_up(graph: Graph, ids: str, module: nn.Module, name: str) -> str:
    """ids (N,) -> rows (N, columns) of an embedding. An id outside of it ends the run."""
    if not isinstance(module, PackedEmbedding):
        if type(module) is not nn.Embedding:
            raise ExportError(f"{name} is a {type(module).__name__}, not a table: merge it first")
        return graph.op("Gather", _weight(graph, name, module.weight), ids)
    packed = module.packed
    blocks, (rows, columns) = _write(graph, name, packed), (packed.rows, packed.columns)
    bits, group = packed.scheme.bits, packed.scheme.group
    groups = packed.scheme.groups(columns)
    data = graph.weight(blocks, shape=(rows, groups * group * bits // 8))
    scales = graph.weight(f"{name}.scales", shape=(rows, groups))
    # The op gives zeros for an unknown id, in silence; Gather does not.
    known = graph.weight("every id", np.arange(rows))
    ids = graph.op("Gather", known, ids)
    x = graph.op(
        "GatherBlockQuantized", data, ids, scales,
        domain=MICROSOFT, bits=bits, block_size=group, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if groups * group == columns:
        return x
    return graph.op("Slice", x, graph.ints(0), graph.ints(columns), graph.ints(1))


def _packed_linear(
    graph: Graph, x: str, packed: Packed, name: str, accuracy: int, bias: str
) -> str:
    blocks, scheme = _write(graph, name, packed), packed.scheme
    return graph.op(
        "MatMulNBits", x, graph.weight(blocks), graph.weight(f"{name}.scales"),
        *(["", "", bias] if bias else []),
        domain=MICROSOFT, K=packed.columns, N=packed.rows, bits=scheme.bits,
        block_size=scheme.group, accuracy_level=accuracy,
    )  # fmt: skip


def _weight(graph: Graph, name: str, weight: Tensor) -> str:
    if name in graph.data.places:
        return graph.weight(name)
    return graph.weight(name, array(weight))


def _write(graph: Graph, name: str, packed: Packed) -> str:
    """Blocks (rows, groups, bytes) and scales (rows * groups) of a matrix; the blocks' name."""
    blocks = f"{name}.codes"
    if blocks in graph.data.places:
        return blocks
    codes, scales = unpack(packed)
    rows, groups = scales.shape
    raw = encode(codes, packed.scheme)
    if packed.scheme.bits == 4:
        raw = raw[:, ::2] | raw[:, 1::2] << 4
    graph.data.put(blocks, raw.view(rows, groups, -1).numpy())
    graph.data.put(f"{name}.scales", scales.float().flatten().numpy())
    return blocks
