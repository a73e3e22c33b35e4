"""What a model costs, from its config alone: parameters, FLOPs, cache bytes. No torch here.

Letters: D hidden, H and G query and K/V heads, h and e key and value widths, E inner channels,
n states, R rank of dt, K taps, F MLP width, M meta tokens, W window.
"""

from __future__ import annotations

from collections.abc import Callable

from hymba.config import Config, ConfigError, Layer

# Elementwise work of the scan for one token, channel and state: dt*A, exp, times h, dt*u*B (as
# one product), add, C*h and its sum.
SCAN_FLOPS = 7


def parameters(config: Config) -> dict[str, int]:
    """Parameters by part, a tied head counted once, and their "total". Scalars of a fusion are
    among the norms."""
    found = {
        "embedding": config.vocab_size * config.hidden_size,
        "meta_tokens": config.meta_tokens * config.hidden_size,
        "mixer": sum(_mixer(config, layer) for layer in config.layers),
        "ssm": sum(_ssm(config) for layer in config.layers if layer.ssm),
        "mlp": sum(_mlp(config) for layer in config.layers if layer.mlp),
        "norms": config.hidden_size + sum(_norms(config, layer) for layer in config.layers),
        "head": 0 if config.tie_embeddings else config.vocab_size * config.hidden_size,
    }
    return found | {"total": sum(found.values())}


def _mixer(config: Config, layer: Layer) -> int:
    """The input and output projections."""
    rows = config.hidden_size if layer.attention else 0
    rows += _kv_width(config, layer) if layer.owns_kv else 0
    rows += 2 * config.inner_size if layer.ssm else 0
    return config.hidden_size * (rows + config.mixer_size(layer))


def _kv_width(config: Config, layer: Layer) -> int:
    """Elements of one token's keys and values in one layer."""
    return config.num_kv_heads * (config.head_dim + config.value_dim(layer))


def _ssm(config: Config) -> int:
    inner, states, rank = config.inner_size, config.ssm_state, config.ssm_dt_rank
    conv = inner * (config.ssm_conv + config.ssm_conv_bias)
    projections = inner * (rank + 2 * states) + rank * inner
    return conv + projections + inner * (states + 2) + rank + 2 * states  # A, D, dt bias, norms


def _mlp(config: Config) -> int:
    matrices = 3 if config.mlp_activation == "silu" else 2
    return matrices * config.hidden_size * config.intermediate_size


def _norms(config: Config, layer: Layer) -> int:
    scalars = 2 * (config.fusion == "scalars")
    fusion = 2 * config.inner_size + scalars if layer.hybrid else 0
    return config.hidden_size * (1 + layer.mlp) + fusion


def forward_flops(config: Config, tokens: int, past: int = 0, logits: int | None = None) -> int:
    """FLOPs of computing `tokens` new text tokens of one sequence after `past` others.

    A multiply-add is 2. Attention counts the keys that each row really sees; `logits` rows go
    through the head (None: all of them). Meta tokens are a constant and not computed again."""
    rows = tokens if logits is None else logits
    flops = 2 * rows * config.vocab_size * config.hidden_size
    for layer in config.layers:
        flops += tokens * _dense_flops(config, layer)
        if layer.attention:
            widths = config.num_heads * (config.head_dim + config.value_dim(layer))
            flops += 2 * widths * _keys_seen(config, layer, tokens, past)
    return flops


def flops_per_token(config: Config, context: int) -> int:
    """Forward FLOPs of one decoded token that is the `context`-th of its sequence."""
    return forward_flops(config, 1, past=max(0, context - 1))


def _dense_flops(config: Config, layer: Layer) -> int:
    """One token through everything in a layer but attention's scores."""
    flops = 2 * _mixer(config, layer)
    if layer.ssm:
        inner, states, rank = config.inner_size, config.ssm_state, config.ssm_dt_rank
        flops += 2 * inner * (config.ssm_conv + rank + 2 * states + rank)
        flops += SCAN_FLOPS * inner * states
    return flops + (2 * _mlp(config) if layer.mlp else 0)


def _keys_seen(config: Config, layer: Layer, tokens: int, past: int) -> int:
    """Keys that `tokens` rows from position `past` on see, themselves and meta included."""

    def seen_before(position: int) -> int:
        """Sum over positions 0 .. position-1 of the text keys each sees."""
        reach = position if layer.window is None else min(position, layer.window + 1)
        return reach * (reach + 1) // 2 + (position - reach) * reach

    return seen_before(past + tokens) - seen_before(past) + tokens * config.meta_tokens


def cache_bytes(
    config: Config,
    tokens: int,
    kv_bytes: int = 2,
    state_bytes: int = 4,
    conv_bytes: int | None = None,
) -> dict[str, int]:
    """Bytes that one sequence of `tokens` text tokens holds, by kind, as `Cache.nbytes` counts.

    `kv_bytes` an element of K/V, `state_bytes` of an SSM state, `conv_bytes` of the convolution's
    inputs (as K/V). "total" is per sequence; "meta" is held once for all sequences."""
    found = dict.fromkeys(("global_kv", "window_kv", "conv", "ssm"), 0)
    meta = 0
    for layer in config.layers:
        if layer.owns_kv:
            kind = "global_kv" if layer.window is None else "window_kv"
            width = _kv_width(config, layer) * kv_bytes
            found[kind] += layer.kv_places(tokens) * width
            meta += config.meta_tokens * width
        if layer.ssm:
            conv = (config.ssm_conv - 1) * config.inner_size * (conv_bytes or kv_bytes)
            ssm = config.inner_size * config.ssm_state * state_bytes
            found["conv"] += conv
            found["ssm"] += ssm
            meta += conv + ssm if config.meta_tokens else 0
    found["total"] = sum(found.values())
    return found | {"meta": meta}


def step_bytes(
    config: Config,
    tokens: int,
    batch: int = 1,
    weight_bytes: int = 2,
    kv_bytes: int = 2,
    state_bytes: int = 4,
) -> dict[str, int]:
    """Bytes that a decode step cannot do without moving, of `batch` sequences that have `tokens`
    text tokens each after it: what it costs where memory's bandwidth is the limit.

    "weights" once for all sequences, "meta" K/V too; each sequence's "kv" that is seen, once for
    each layer that owns any; "states" read and written. "total" is these four. "again" is not in
    it: the K/V that layers without their own read once more, unless a cache held it so long."""
    found = dict.fromkeys(("weights", "meta", "kv", "states"), 0)
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    unread = table + config.meta_tokens * config.hidden_size
    found["weights"] = (parameters(config)["total"] - unread) * weight_bytes
    again = 0
    for layer in config.layers:
        if layer.attention:
            owner = layer if layer.kv_from is None else config.layers[layer.kv_from]
            width = _kv_width(config, owner) * kv_bytes
            seen = tokens if layer.window is None else min(tokens, layer.window + 1)
            if layer.owns_kv:
                found["kv"] += batch * seen * width
                found["meta"] += config.meta_tokens * width
            else:
                again += (batch * seen + config.meta_tokens) * width
        if layer.ssm:
            conv = (config.ssm_conv - 1) * config.inner_size * kv_bytes
            ssm = config.inner_size * config.ssm_state * state_bytes
            found["states"] += 2 * batch * (conv + ssm)
    found["total"] = sum(found.values())
    return found | {"again": again}


def paper_cache_bytes(config: Config, tokens: int = 8000) -> int:
    """The paper's own count (tables 1, 2, 10), in FP16, which reproduces its 78.6 MB: the window
    clipped to the text, meta tokens in global layers only, sharing as half the window layers, SSM
    states without convolution inputs."""
    shared = any(layer.kv_from is not None for layer in config.layers)
    total = 0.0
    for layer in config.layers:
        if layer.attention:
            places: float = tokens + config.meta_tokens
            if layer.window is not None:
                places = min(tokens, layer.window) * (0.5 if shared else 1.0)
            total += places * _kv_width(config, layer) * 2
        if layer.ssm:
            total += config.inner_size * config.ssm_state * 2
    return int(total)


def fit(
    plan: Callable[[int], Config], budget: int, multiple: int = 8, tolerance: float = 0.02
) -> Config:
    """The config `plan(size)` whose parameter count is nearest to `budget`; `size` runs over the
    multiples of `multiple` (a width: hidden_size or intermediate_size).

    Example: fit(lambda width: llama(hidden_size=256, intermediate_size=width, ...), 10_000_000).
    Raises ConfigError when the nearest is further off than `tolerance`."""

    def total(step: int) -> int:
        return parameters(plan(step * multiple))["total"]

    high = 1
    while total(high) < budget:
        high *= 2
    low = high // 2
    while high - low > 1:  # total(low) < budget <= total(high)
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) < budget else (low, middle)
    best = min((s for s in (low, high) if s), key=lambda step: abs(total(step) - budget))
    config, found = plan(best * multiple), total(best)
    if abs(found - budget) > tolerance * budget:
        raise ConfigError(f"the nearest to {budget} parameters is {found}: change the other sizes")
    return config
