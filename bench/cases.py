"""The table of ops for bench/ops.py: what each is run on, what it must move and compute, and whom
it is held against.

What must be moved is each input read once and each output written once; what must be computed is
the products of visible keys (backward: twice forward's) and one exponential for each decay.
Letters: N rows, E channels, n states, D hidden, H and G heads, h and e widths, P pairs seen.

    op                 forward                          backward
    scan               4NE + 2Nn elements; NEn exps     7NE + 4Nn; NEn exps
    conv               2NE                              3NE
    attention          q, k, v, out; 2PH(h+e) FLOPs     q, k, v, dout, dq, dk, dv; 4PH(h+e)
    attention decode   the keys and values held, once   -
    SSM decode         states read and written, rest    -
    rms_norm           2ND                              3ND
    add_rms_norm       4ND                              4ND
    fuse_heads         3NE                              5NE
    swiglu             3NF                              5NF
    rotate             2ND and the tables               the same
    linear + CE        6NDV FLOPs for loss and gradients together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import mamba
from bench.peers import Peer, Shape, attention_peers, op, plain
from hymba.ops import Meta, Past, Segments
from hymba.ops.loss import linear_cross_entropy_reference

BF16, DEVICE = torch.bfloat16, "cuda"
E, STATES, TAPS = 3200, 16, 4  # the 1.5B's sizes
D, MLP, VOCAB, RANK = 1600, 5504, 32001, 100
HEADS, GROUPS, KEY, VALUE, META, WINDOW = 25, 5, 64, 128, 128, 1024
CONTEXT = 8192
PAGE = 256  # places of a page of a cache
SIZES = [(8, 2048), (1, 8192), (4, 8192), (1, 32768)]  # segments, rows of each
BATCHES = [1, 16, 128]
ROWS = 16384


class Work(NamedTuple):
    """What a pass must do at least."""

    bytes: float = 0
    flops: float = 0
    exps: float = 0
    reads: bool = False  # nearly all bytes are read: held against read bandwidth, not copy's


@dataclass
class Case:
    op: str
    size: str
    run: Callable[..., Any]  # of the inputs by name
    reference: Callable[..., Any]  # the same in plain PyTorch, given float64
    inputs: dict[str, Tensor]
    work: dict[str, Work]  # by pass: "inference", "forward", "backward", "both"
    peers: dict[str, Callable[[], Peer]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()  # inputs without a gradient
    host: bool = False  # short: also say how long the host needs to hand it over
    backward: bool = True
    tolerance: float = 2e-2
    saved: bool = False  # also say how much memory is kept for backward


Builder = Callable[[], Case]


@dataclass(frozen=True)
class Options:
    quick: bool = False
    build: mamba.Build | None = None


def rand(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def _sizes(options: Options) -> list[tuple[int, int]]:
    return SIZES[:2] if options.quick else SIZES


# Scan and convolution


def scans(options: Options) -> Iterator[Builder]:
    for count, length in _sizes(options):
        yield lambda count=count, length=length: scan(count, length, options)


def scan(count: int, length: int, options: Options) -> Case:
    rows, segments = count * length, Segments((length,) * count)
    states = torch.arange(1, STATES + 1, device=DEVICE).float().log()
    inputs = {
        "u": rand(rows, E),
        "dt": rand(rows, E, scale=0.5),
        "A": -torch.exp(states + rand(E, STATES, dtype=torch.float32, scale=0.1)),
        "B": rand(rows, STATES),
        "C": rand(rows, STATES),
        "D": rand(E),
        "z": rand(rows, 2 * E)[:, E:],  # as the model has it: columns of one projection
        "dt_bias": rand(E) - 2,
        "initial_state": rand(1, E, STATES, dtype=torch.float32),
    }
    wide, narrow, exps = nbytes(inputs["u"]), nbytes(inputs["B"]), rows * E * STATES

    def run(**x: Tensor) -> Any:
        return op("selective_scan")(**x, segments=segments)

    def reference(**x: Tensor) -> Any:
        return plain("selective_scan")(**x, segments=segments)

    def by_mamba() -> Peer:
        assert options.build is not None
        kernels = options.build.kernels()
        its = mamba.to_its_layout(inputs, count)
        return Peer(
            lambda *x: mamba.scan(kernels, *x)[0],
            its,
            lambda y: y.transpose(1, 2).flatten(0, 1),
            lambda: run(**inputs | {"initial_state": None}),
        )

    forward = Work(bytes=4 * wide + 2 * narrow, exps=exps)
    backward = Work(bytes=7 * wide + 4 * narrow, exps=exps)
    work = {"inference": forward, "forward": forward, "backward": backward}
    peers: dict[str, Callable[[], Peer]] = {}
    if options.build is not None:
        peers["mamba-ssm"] = by_mamba
    if rows <= ROWS:  # beyond, plain PyTorch takes seconds
        peers["torch"] = lambda: _plain_peer(reference, inputs)
    return Case("scan", f"{count} x {length}", run, reference, inputs, work, peers, saved=True)


def _plain_peer(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Peer:
    names = list(inputs)
    return Peer(lambda *x: function(**dict(zip(names, x, strict=True))), list(inputs.values()))


def convs(options: Options) -> Iterator[Builder]:
    for count, length in _sizes(options):
        yield lambda count=count, length=length: conv(count, length)


def conv(count: int, length: int) -> Case:
    rows, segments = count * length, Segments((length,) * count)
    inputs = {
        "x": rand(rows, 2 * E)[:, :E],
        "weight": rand(E, TAPS, scale=0.5),
        "bias": rand(E),
        "initial_state": rand(1, TAPS - 1, E),
    }
    wide = nbytes(inputs["x"])
    work = {"forward": Work(2 * wide), "backward": Work(3 * wide)}

    def run(**x: Tensor) -> Any:
        return op("causal_conv")(**x, segments=segments)

    def reference(**x: Tensor) -> Any:
        return plain("causal_conv")(**x, segments=segments)

    peers = {"torch": lambda: _plain_peer(reference, inputs)}
    return Case("conv", f"{count} x {length}", run, reference, inputs, work, peers)


# Attention


def attentions(options: Options) -> Iterator[Builder]:
    for count, length in ((1, 8192), (8, 2048)):
        for window, meta in ((WINDOW, META), (None, 0)):
            shape = Shape(count, length, meta, window)
            yield lambda shape=shape: attention(shape)
    for window in (WINDOW, None):
        shape = Shape(1, 2048, META, window, past=CONTEXT)
        yield lambda shape=shape: attention(shape)


def attention(shape: Shape) -> Case:
    """New rows of equal segments; with a past this is one chunk of a prefill."""
    rows, segments = shape.count * shape.rows, Segments((shape.rows,) * shape.count)
    inputs = {
        "q": rand(rows, HEADS, KEY),
        "k": rand(rows, GROUPS, KEY),
        "v": rand(rows, GROUPS, VALUE),
    }
    held = nbytes(*inputs.values())
    if shape.meta:
        inputs |= {"meta_k": rand(META, GROUPS, KEY), "meta_v": rand(META, GROUPS, VALUE)}
    past = held_past(shape.count, shape.past, shape.window) if shape.past else None
    places = past.k.shape[2] if past else 0
    out = rows * HEADS * VALUE * 2
    pairs = shape.count * shape.seen() * HEADS
    flops = 2 * pairs * (KEY + VALUE)
    moved = held + out + (nbytes(past.k, past.v) if past else 0)
    if shape.past:
        work = {"inference": Work(moved, flops, pairs)}
    else:
        work = {
            "forward": Work(moved, flops, pairs),
            "backward": Work(2 * held + out, 2 * flops, pairs),
        }

    def run(f: Callable[..., Tensor], **x: Tensor) -> Tensor:
        meta = Meta(x["meta_k"], x["meta_v"]) if "meta_k" in x else None
        return f(x["q"], x["k"], x["v"], segments, shape.window, meta, past)

    def reference(**x: Tensor) -> Tensor:
        return by_groups(lambda f, **y: run_with(f, shape, past, **y), **x)

    def by_torch() -> Peer:
        f = plain("attention")
        return _plain_peer(lambda **x: run(f, **x), inputs)

    peers: dict[str, Callable[[], Peer]] = {}
    if past is None or shape.window is None:  # a ring is not in order
        meta = Meta(inputs["meta_k"], inputs["meta_v"]) if shape.meta else None
        peers = attention_peers(shape, inputs["q"], inputs["k"], inputs["v"], meta, past)
        if past is not None:
            del peers["flex"]  # one more compilation
    peers["torch"] = by_torch
    return Case(
        "attention",
        _attention_size(shape, places),
        lambda **x: run(op("attention"), **x),
        reference,
        inputs,
        work,
        peers,
        backward=not shape.past,
    )


def _attention_size(shape: Shape, places: int) -> str:
    kind = "causal" if shape.window is None else f"window {shape.window}"
    kind += f" + {shape.meta} meta" if shape.meta else ""
    behind = f" behind {places}" if places else ""
    return f"{shape.count} x {shape.rows}{behind}, {kind}"


def held_past(count: int, length: int, window: int | None) -> Past:
    """A cache of `length` tokens a segment: all of them in order, or a ring of window + 1."""
    places = length if window is None else window + 1
    last = torch.full((count, 1), length - 1, device=DEVICE)
    place = torch.arange(places, device=DEVICE)
    positions = place.expand(count, -1) if window is None else last - (last - place) % places
    k, v = rand(count, GROUPS, places, KEY), rand(count, GROUPS, places, VALUE)
    return Past(k, v, positions.contiguous(), (length,) * count)


def run_with(
    f: Callable[..., Tensor], shape: Shape, past: Past | None, group: slice, **x: Tensor
) -> Tensor:
    """`f` on some of the key/value heads and their queries."""
    per = HEADS // GROUPS
    queries = slice(group.start * per, group.stop * per)
    segments = Segments((shape.rows,) * shape.count)
    meta = None
    if "meta_k" in x:
        meta = Meta(x["meta_k"][:, group], x["meta_v"][:, group])
    if past is not None:
        past = past._replace(k=past.k[:, group].double(), v=past.v[:, group].double())
    q, k, v = x["q"][:, queries], x["k"][:, group], x["v"][:, group]
    return f(q, k, v, segments, shape.window, meta, past)


def by_groups(run: Callable[..., Tensor], **x: Tensor) -> Tensor:
    """The reference one key/value head at a time: its score matrix is large."""
    from torch.utils.checkpoint import checkpoint

    from hymba.ops.attention import attention_reference

    def part(group: int) -> Tensor:
        return run(attention_reference, group=slice(group, group + 1), **x)

    parts = [checkpoint(part, group, use_reentrant=False) for group in range(GROUPS)]
    return torch.cat(parts, dim=1)


# Decoding


def decodes(options: Options) -> Iterator[Builder]:
    for window in (None, WINDOW):
        for batch in BATCHES[:: 2 if options.quick else 1]:
            yield lambda batch=batch, window=window: decode(batch, window)


def decode(batch: int, window: int | None) -> Case:
    """One token a row over 8192 places in pages of 256, in any order, or over a full ring of one
    page, and the meta keys that all rows share."""
    size, columns = (PAGE, CONTEXT // PAGE) if window is None else (window + 1, 1)
    pages, places = batch * columns, columns * size
    table = torch.randperm(pages, device=DEVICE).int().view(batch, columns)
    counts = torch.full((batch,), places, dtype=torch.int32, device=DEVICE)
    stores = rand(pages, GROUPS, size, KEY), rand(pages, GROUPS, size, VALUE)
    shared = Meta(rand(META, GROUPS, KEY), rand(META, GROUPS, VALUE))
    inputs = {"q": rand(batch, HEADS, KEY)}
    moved = nbytes(*stores, *shared, inputs["q"]) + batch * HEADS * VALUE * 2

    def run(f: Callable[..., Tensor], q: Tensor) -> Tensor:
        return f(q, *stores, table, counts, places, shared)

    def reference(q: Tensor) -> Tensor:
        """Row by row: the keys of all, gathered in float64, are many GB."""
        f, rows = plain("attention_step"), zip(q.split(1), table.split(1), strict=True)
        return torch.cat([f(x, *stores, held, counts[:1], places, shared) for x, held in rows])

    def by_sdpa() -> Peer:
        """The heads of a group as rows, so that its keys are read once; keys in one piece."""
        held = [store[table.long()].transpose(1, 2).flatten(2, 3) for store in stores]
        first = [meta.transpose(0, 1).expand(batch, -1, -1, -1) for meta in shared]
        k, v = (torch.cat(pair, dim=2) for pair in zip(first, held, strict=True))
        # k (S, G, M + places, h)
        fused = torch.nn.functional.scaled_dot_product_attention
        q = inputs["q"].unflatten(1, (GROUPS, -1))  # (S, G, H/G, h)
        return Peer(fused, [q, k, v], lambda out: out.flatten(1, 2))

    def by_torch() -> Peer:
        return _plain_peer(lambda **x: run(plain("attention_step"), **x), inputs)

    kind = "ring" if window else "full cache"
    return Case(
        "attention decode",
        f"batch {batch}, {kind} of {places} + {META} meta",
        lambda **x: run(op("attention_step"), **x),
        reference,
        inputs,
        {"inference": Work(moved, reads=True)},
        {"sdpa": by_sdpa, "torch": by_torch},
        host=True,
        backward=False,
    )


def ssm_steps(options: Options) -> Iterator[Builder]:
    for batch in BATCHES[:: 2 if options.quick else 1]:
        yield lambda batch=batch: ssm_step(batch)


def ssm_step(batch: int) -> Case:
    """One token a row through convolution and scan, states brought up to date in their slots."""
    slots = torch.randperm(batch, device=DEVICE)
    log = torch.arange(1, STATES + 1, device=DEVICE).float()
    inputs = {
        "x": rand(batch, E),
        "low": rand(batch, RANK + 2 * STATES),
        "z": rand(batch, E),
        "conv_weight": rand(E, TAPS, scale=0.5),
        "conv_bias": rand(E),
        "dt_weight": rand(E, RANK, scale=RANK**-0.5),
        "dt_bias": rand(E) - 2,
        "dt_norm": rand(RANK),
        "B_norm": rand(STATES),
        "C_norm": rand(STATES),
        "A": -log.expand(E, -1).contiguous(),
        "D": rand(E),
        "conv_state": rand(batch, TAPS - 1, E),
        "ssm_state": rand(batch, E, STATES, dtype=torch.float32),
    }
    moved = nbytes(*inputs.values())
    moved += nbytes(inputs["x"], inputs["conv_state"], inputs["ssm_state"])  # written

    def run(find: Callable[[str], Any], **x: Tensor) -> Any:
        conv = x["conv_weight"], x["conv_bias"], x["conv_state"]
        u = find("conv_step")(x["x"], *conv, slots)
        names = ["low", "A", "D", "z", "dt_weight", "dt_bias", "dt_norm", "B_norm", "C_norm"]
        rest = {name: x[name] for name in names}
        y = find("ssm_step")(u=u, **rest, state=x["ssm_state"], slots=slots, eps=1e-6)
        return y, x["conv_state"], x["ssm_state"]

    return Case(
        "SSM decode",
        f"batch {batch}",
        lambda **x: run(op, **x),
        lambda **x: run(plain, **x),
        inputs,
        {"inference": Work(moved)},
        {"torch": lambda: _plain_peer(lambda **x: run(plain, **x), inputs)},
        host=True,
        backward=False,
    )


# Elementwise, and the head


def elementwise(options: Options) -> Iterator[Builder]:
    eps = {"eps": 1e-6}
    yield lambda: rowwise("rms_norm", D, {"x": D, "weight": 0}, (2, 3), **eps)
    yield lambda: rowwise("add_rms_norm", D, {"x": D, "residual": D, "weight": 0}, (4, 4), **eps)
    branches = {"attention": E, "ssm": E, "attention_weight": 0, "ssm_weight": 0}
    yield lambda: rowwise("fuse_heads", E, branches, (3, 5), **eps)
    yield lambda: rowwise("swiglu", MLP, {"gate": MLP, "up": MLP}, (3, 5))
    yield rotation


def rowwise(
    name: str, width: int, wide: dict[str, int], times: tuple[int, int], **fixed: Any
) -> Case:
    """Rows of tensors: inputs of `width` columns, or (0) weights; rows x width is moved `times`
    over, forward and backward."""
    inputs = {k: rand(ROWS, w) if w else rand(width) for k, w in wide.items()}
    size = ROWS * width * 2

    def run(find: Callable[[str], Any], **x: Tensor) -> Any:
        return find(name)(**x, **fixed)

    return Case(
        name,
        f"{ROWS} x {width}",
        lambda **x: run(op, **x),
        lambda **x: run(plain, **x),
        inputs,
        {"forward": Work(times[0] * size), "backward": Work(times[1] * size)},
        {"torch": lambda: _plain_peer(lambda **x: run(plain, **x), inputs)},
    )


def rotation() -> Case:
    angles = torch.rand(ROWS, 1, KEY // 2, device=DEVICE) * 6.28
    inputs = {"x": rand(ROWS, HEADS, KEY), "cos": angles.cos(), "sin": angles.sin()}
    work = Work(2 * inputs["x"].nbytes + nbytes(inputs["cos"], inputs["sin"]))
    return Case(
        "rotate",
        f"{ROWS} x {HEADS} x {KEY}",
        lambda **x: op("rotate")(**x),
        lambda **x: plain("rotate")(**x),
        inputs,
        {"forward": work, "backward": work},
        {"torch": lambda: _plain_peer(plain("rotate"), inputs)},
        frozenset({"cos", "sin"}),
    )


def heads(options: Options) -> Iterator[Builder]:
    yield head


def head() -> Case:
    """Loss and both gradients together: they are made at once."""
    inputs = {"hidden": rand(ROWS, D), "weight": rand(VOCAB, D, scale=D**-0.5)}
    labels = torch.randint(0, VOCAB, (ROWS,), device=DEVICE)
    labels[::17] = -100

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, labels)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain("linear_cross_entropy")(hidden, weight, labels)

    return Case(
        "linear + CE",
        f"{ROWS} x {D} x {VOCAB}",
        lambda **x: op("linear_cross_entropy")(**x, labels=labels),
        lambda **x: chunked(**x),
        inputs,
        {"both": Work(flops=6 * ROWS * D * VOCAB)},
        {
            "torch, whole": lambda: Peer(whole, list(inputs.values())),
            "torch, chunks": lambda: Peer(chunked, list(inputs.values())),
        },
    )


# By what --only calls them. Until the scan's turn mamba-ssm is being built.
CASES: dict[str, Callable[[Options], Iterator[Builder]]] = {
    "attention": attentions,
    "decode": decodes,
    "scan": scans,
    "ssm": ssm_steps,
    "elementwise": elementwise,
    "conv": convs,
    "head": heads,
}
