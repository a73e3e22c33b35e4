"""Plans and named configs: an architecture is a function that lays out layers. No torch here.

    hymba        attention and SSM heads in every layer, or in those named; first, middle and last
                 see everything, neighbouring window layers share one K/V; meta tokens in front
    llama        attention only; its parameters and cache are exactly Llama's. It can have Hymba's
                 windows and shared K/V
    mamba        SSM only, no MLP (mlp=True gives the paper's "Mamba + FFN")
    sequential   SSM and attention by turns, an MLP after each
    samba        the same with window attention

Which layers: `scattered`, `first_middle_last`; sharing: `pairs`. Meta tokens go with every plan
(`meta_tokens=`), and what joins the branches of a hybrid layer is `fusion=`.

`Config.preset("hymba-1.5b")` reads `PRESETS`. All plans share embedding, norms, init and rotary
positions, so a comparison between them is controlled by construction.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hymba.config import Config, ConfigError, Layer


def pairs(num_layers: int, global_layers: Sequence[int]) -> list[list[int]]:
    """Sharing groups of neighbouring window layers, two by two from each global layer on; the
    odd one out before the next global layer keeps its own K/V."""
    groups, index = [], 0
    while index + 1 < num_layers:
        if index in global_layers or index + 1 in global_layers:
            index += 1
        else:
            groups.append([index, index + 1])
            index += 2
    return groups


def first_middle_last(num_layers: int) -> tuple[int, ...]:
    """The global layers of the paper: 0, 15 and 31 of 32."""
    return tuple(sorted({0, (num_layers - 1) // 2, num_layers - 1}))


def scattered(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers as evenly as possible, never the first or the last: 3 of 12 are 2, 5 and 8."""
    if not 0 <= count <= max(0, num_layers - 2):
        raise ConfigError(f"{count} of {num_layers} layers cannot be scattered between the ends")
    return tuple(i * (num_layers - 1) // (count + 1) for i in range(1, count + 1))


Groups = bool | Sequence[Sequence[int]]


def attending(
    layers: Sequence[int], window: int | None, global_layers: Sequence[int] | None, share: Groups
) -> dict[int, Layer]:
    """Hybrid layers of these numbers, the only ones of a model that have attention.

    `global_layers` see everything, None for the first, middle and last of `layers`. `share` is
    True (pairs of neighbours among `layers`), False, or the groups themselves."""
    if global_layers is None:
        global_layers = [layers[i] for i in first_middle_last(len(layers)) if layers]
    if share is True:
        far = [place for place, layer in enumerate(layers) if layer in global_layers]
        share = [[layers[place] for place in pair] for pair in pairs(len(layers), far)]
    producer = {consumer: group[0] for group in share or [] for consumer in group[1:]}
    for key, named in (("global_layers", global_layers), ("share", producer)):
        if without := sorted(set(named) - set(layers)):
            raise ConfigError(f"{key} names layer {without[0]}, which has no attention")
    return {
        i: Layer(window=None if i in global_layers else window, kv_from=producer.get(i))
        for i in layers
    }


def hymba(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    window: int | None = 1024,
    attention_layers: Sequence[int] | None = None,
    global_layers: Sequence[int] | None = None,
    share: Groups = True,
    meta_tokens: int = 128,
    vocab_size: int = 32001,
    **sizes: Any,
) -> Config:
    """Hybrid heads in every layer, or in `attention_layers`: the others have the SSM alone.
    For `global_layers` and `share` see `attending`."""
    chosen = range(num_layers) if attention_layers is None else sorted(set(attention_layers))
    if absent := set(chosen) - set(range(num_layers)):
        raise ConfigError(f"attention_layers names layer {min(absent)}, which does not exist")
    hybrid = attending(chosen, window, global_layers, share)
    return Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(hybrid.get(i, Layer(attention=False)) for i in range(num_layers)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        meta_tokens=meta_tokens,
        **sizes,
    )


def llama(
    *,
    num_layers: int,
    window: int | None = None,
    global_layers: Sequence[int] | None = None,
    share: Groups = False,
    **sizes: Any,
) -> Config:
    """Attention and MLP; values as wide as queries, one output projection, no fusion norms.

    With a `window` and `share=True` it is the paper's "Llama with the same KV compression" (table
    10, row 10): what Hymba does to its cache, done to Llama's. See `attending`."""
    hybrid = attending(range(num_layers), window, global_layers, share)
    return Config(layers=tuple(replace(x, ssm=False) for x in hybrid.values()), **sizes)


def mamba(*, num_layers: int, mlp: bool = False, **sizes: Any) -> Config:
    """SSM heads alone. Head counts are not used but must divide the width."""
    defaults = {"num_heads": 1, "num_kv_heads": 1, "intermediate_size": 1}
    return Config(layers=(Layer(attention=False, mlp=mlp),) * num_layers, **(defaults | sizes))


def sequential(*, num_layers: int, window: int | None = None, **sizes: Any) -> Config:
    """SSM, MLP, attention, MLP, and again (paper table 1, row A): `num_layers` counts mixers. An
    SSM comes first. Without a window all attention sees everything."""
    turns = (Layer(attention=False), Layer(ssm=False, window=window))
    return Config(layers=tuple(turns[i % 2] for i in range(num_layers)), **sizes)


def samba(*, num_layers: int, window: int = 1024, **sizes: Any) -> Config:
    """`sequential` with windows alone."""
    return sequential(num_layers=num_layers, window=window, **sizes)


def _released() -> Config:
    """NVIDIA's Hymba-1.5B (paper table 11 and the released config.json): pairs and one triple."""
    triple = [[i, i + 1] for i in range(1, 15, 2)] + [[16, 17, 18]]
    return hymba(
        share=triple + [[i, i + 1] for i in range(19, 31, 2)],
        hidden_size=1600,
        num_layers=32,
        num_heads=25,
        num_kv_heads=5,
        intermediate_size=5504,
        rope_type="ntk",
    )


# A preset is built when asked for. 125m and 350m: the paper's table 11, neighbours in pairs.
PRESETS: dict[str, Callable[[], Config]] = {
    "hymba-1.5b": _released,
    "hymba-350m": lambda: hymba(
        hidden_size=768, num_layers=32, num_heads=12, num_kv_heads=4, intermediate_size=2432
    ),
    "hymba-125m": lambda: hymba(
        hidden_size=512, num_layers=24, num_heads=8, num_kv_heads=4, intermediate_size=1664
    ),
    "hymba-tiny": lambda: hymba(
        hidden_size=128,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=320,
        window=64,
        meta_tokens=16,
        vocab_size=4096,
        max_positions=2048,
    ),
    "llama-tiny": lambda: llama(
        hidden_size=160,
        num_layers=7,
        num_heads=5,
        num_kv_heads=5,
        intermediate_size=464,
        vocab_size=4096,
        max_positions=2048,
    ),
    "mamba-tiny": lambda: mamba(
        hidden_size=160, num_layers=10, vocab_size=4096, max_positions=2048
    ),
    "samba-tiny": lambda: samba(
        hidden_size=144,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=384,
        window=64,
        vocab_size=4096,
        max_positions=2048,
    ),
    # Shapes of other people's models in our decoder, for comparisons of cost (the paper's table 2):
    # to measure, not to load. Llama 3's scaling of the rotary frequencies is not in them, nor
    # biases, nor other norms, so parameters are theirs but for a thousandth.
    "llama-3.2-1b": lambda: llama(
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        rope_theta=500000.0,
        max_positions=131072,
        norm_eps=1e-5,
    ),
    "llama-3.2-3b": lambda: llama(
        hidden_size=3072,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        rope_theta=500000.0,
        max_positions=131072,
        norm_eps=1e-5,
    ),
    "smollm2-1.7b": lambda: llama(
        hidden_size=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        intermediate_size=8192,
        vocab_size=49152,
        rope_theta=130000.0,
        max_positions=8192,
        norm_eps=1e-5,
    ),
    "qwen2.5-1.5b": lambda: llama(
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        rope_theta=1000000.0,
        max_positions=131072,
    ),
    "danube2-1.8b": lambda: llama(
        hidden_size=2560,
        num_layers=24,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=6912,
        vocab_size=32000,
        tie_embeddings=False,
        max_positions=8192,
        norm_eps=1e-5,
    ),
    "amd-olmo-1b": lambda: llama(
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        max_positions=2048,
        norm_eps=1e-5,
    ),
    # Its MLP has no gate.
    "phi-1.5": lambda: llama(
        hidden_size=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        intermediate_size=8192,
        mlp_activation="relu2",
        vocab_size=51200,
        tie_embeddings=False,
        max_positions=2048,
        norm_eps=1e-5,
    ),
}
PEERS = tuple(list(PRESETS)[list(PRESETS).index("llama-3.2-1b") :])


def preset(name: str) -> Config:
    """The config named so. Raises ConfigError naming the nearest presets."""
    if name in PRESETS:
        return PRESETS[name]()
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(PRESETS)}"
    raise ConfigError(f"no preset is called {name!r}; {hint}")
