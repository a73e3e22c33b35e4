"""The attention heads: queries of this layer against keys and values of its own or of another's.

No parameters live here: the hybrid layer has one input projection for both branches. Letters:
N rows, S segments, H and G query and K/V heads, h and e their widths, M meta tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba import ops
from hymba.cache import State
from hymba.config import Layer
from hymba.model.batch import Batch
from hymba.ops import Meta, Past, Segments


def attend(
    q: Tensor,
    text: State,
    meta: State | None,
    layer: Layer,
    batch: Batch,
    past: Past | None,
) -> Tensor:
    """q (batch.meta + N, H, h); K/V of the N text rows, of the meta tokens, of the past.

    Returns (batch.meta + N, H * e). Meta rows, where the batch has them, see each other causally;
    text rows see all meta tokens and, through the window, the text before them."""
    outs = []
    if batch.meta:
        assert meta is not None and meta.k is not None and meta.v is not None
        first, q = batch.split(q)
        outs.append(ops.attention(first, meta.k, meta.v, Segments((batch.meta,))))
    if batch.segments.count:
        assert text.k is not None and text.v is not None
        prefix = None
        if meta is not None and meta.k is not None and meta.v is not None:
            prefix = Meta(meta.k, meta.v)
        outs.append(ops.attention(q, text.k, text.v, batch.segments, layer.window, prefix, past))
    return torch.cat(outs).flatten(1) if len(outs) > 1 else outs[0].flatten(1)
