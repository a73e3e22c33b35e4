"""What the meta tokens leave in each layer, in float32, one layer's weights at a time.

`Decoder.meta_states` computes the same in the model's dtype and with its kernels; here a model of
bfloat16, or one in few bits, is never held in float32, and packed weights are what their codes and
scales say, multiplied with float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hymba.cache import State
from hymba.model.batch import Batch
from hymba.model.decoder import Decoder
from hymba.model.hybrid import Before, Block, Left
from hymba.model.layers import rope_tables
from hymba.model.packed import PackedLinear
from hymba.ops.packed import dequantize


@torch.no_grad()
def meta_states(decoder: Decoder) -> list[State]:
    """K/V (M, G, h) and (M, G, e), conv (1, K-1, E) and SSM state (1, E, n); consumers of K/V get
    their producer's. Empty states for a model without meta tokens."""
    config = decoder.config
    if decoder.meta_tokens is None:
        return [State()] * config.num_layers
    x = decoder.meta_tokens().float()
    batch = Batch.of(()).with_meta(config.meta_tokens)
    rope = rope_tables(torch.arange(config.meta_tokens), config.head_dim, config.rope_base)
    lefts: list[Left] = []
    for block, layer in zip(decoder.layers, config.layers, strict=True):
        producer = None if layer.kv_from is None else lefts[layer.kv_from]
        with torch.device("meta"):
            plain = Block(config, layer)
        x, left = functional_call(plain, _weights(block), (x, rope, batch, Before(), producer))
        lefts.append(left)
    return [left.meta or State() for left in lefts]


def _weights(block: nn.Module) -> dict[str, Tensor]:
    """As float32, by the names that they have in a block that is not packed."""
    found = {name: p.float() for name, p in block.named_parameters() if p.is_floating_point()}
    for name, module in block.named_modules():
        if isinstance(module, PackedLinear):
            found[f"{name}.weight"] = dequantize(module.packed)
    return found
