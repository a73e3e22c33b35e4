"""What a sequence leaves behind, as inputs and outputs of a graph.

    past.3.key     (G, places, h)    K after rotary, of layer 3; places of a ring or of a buffer
    past.3.value   (G, places, e)
    past.3.conv    (K-1, E)          the last inputs of the convolution
    past.3.state   (n, E)            the SSM's state, channels last

and `present.3.key`, ... of the same shapes. A window layer keeps a ring of window + chunk places, a
global layer a buffer of `room` places, which the caller chooses. New keys are written first, then
seen like all others: a ring has a place for each of the chunk's rows beside the window's, so that
nothing is overwritten which a row still sees.
"""

from __future__ import annotations

from typing import NamedTuple

from hymba.config import Config, Layer

ROOM = "room"


class Entry(NamedTuple):
    name: str  # "3.key"
    shape: tuple[int | str, ...]


def ring(layer: Layer, chunk: int) -> int | None:
    """Places of a window layer's K/V; None for a layer that keeps all."""
    return None if layer.window is None else layer.window + chunk


def entries(config: Config, chunk: int) -> list[Entry]:
    """All that is kept between two runs, in the order of the graph's inputs and outputs."""
    found = []
    heads, inner = config.num_kv_heads, config.inner_size
    for index, layer in enumerate(config.layers):
        if layer.owns_kv:
            places: int | str = ring(layer, chunk) or ROOM
            found.append(Entry(f"{index}.key", (heads, places, config.head_dim)))
            found.append(Entry(f"{index}.value", (heads, places, config.value_dim(layer))))
        if layer.ssm:
            if config.ssm_conv > 1:  # one tap alone looks at nothing before its row
                found.append(Entry(f"{index}.conv", (config.ssm_conv - 1, inner)))
            found.append(Entry(f"{index}.state", (config.ssm_state, inner)))
    return found
