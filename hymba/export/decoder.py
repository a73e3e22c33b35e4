"""A model as one graph: a chunk of N >= 1 tokens of one sequence, and the cache before and after.

    ids (N,), past (1,), past.*  -->  logits (1, V) of the last token, present.*

A decode step is N = 1. The arithmetic is that of the model's reference ops, flat and without a
batch; what N changes is only masks and the scan, which is a loop over rows, or no loop for one. So
there is one graph, one session and one copy of the weights for both uses. `past` counts the text
tokens before the chunk; places of rings, masks and rotary angles all follow from it. What the meta
tokens leave are constants.

Letters as in the model: N rows, D, H and G query and K/V heads, h and e their widths, M meta
tokens, E inner channels, n states, K taps; P places of a ring or a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

from hymba.cache import State
from hymba.config import Layer
from hymba.export.graph import Graph, value
from hymba.export.layout import ring
from hymba.export.linear import array, linear, look_up
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Block, HybridMixer
from hymba.model.layers import MLP, RMSNorm
from hymba.model.ssm import SSM

END = int(np.iinfo(np.int64).max)  # of a slice


@dataclass(frozen=True)
class Seen:
    """Where layers of one window write a chunk's keys, and which they see."""

    places: str  # (G, N, 2): head and place of each new key
    bias: str  # (N, M + P): 0 where seen, else -inf
    widths: str  # (2,): M and P


class Writer:
    """Writes one model into one graph, from the ids to the logits."""

    def __init__(
        self, graph: Graph, model: LanguageModel, metas: list[State], chunk: int, accuracy: int
    ):
        self.graph, self.model, self.config = graph, model, model.config
        self.metas, self.chunk, self.accuracy = metas, chunk, accuracy
        self.pairs: dict[int, tuple[str, str]] = {}  # K/V of each owner, new keys included
        self.seen: dict[int | None, Seen] = {}  # by window

    def write(self, tick: Callable[[int], None]) -> None:
        graph, decoder = self.graph, self.model.decoder
        self.count = self.rows_of_chunk()  # (1,)
        self.steps = self.steps_of_chunk()  # (N,)
        self.positions = graph.op("Add", "past", self.steps)  # (N,)
        self.windows = self.windows_of_rows()  # (N, K)
        self.cos, self.sin = self.rotary_tables()  # (N, 1, h)
        x = look_up(graph, "ids", decoder.embed_tokens, "embed_tokens")
        for index, (block, layer) in enumerate(
            zip(decoder.layers, self.config.layers, strict=True)
        ):
            assert isinstance(block, Block)
            with graph.at(f"layers.{index}"):
                x = self.block(x, block, index, layer)
            tick(index + 1)
        with graph.at("head"):
            last = graph.op("Gather", x, graph.ints(-1))
            last = self.norm(last, decoder.final_norm, "final_norm")
            name = "embed_tokens" if self.config.tie_embeddings else "lm_head"
            graph.op("Identity", self.linear(last, self.model.lm_head, name), output="logits")

    # What follows from the chunk's size and place

    def rows_of_chunk(self) -> str:
        """N. Looked up in a table, so that a chunk too long for the rings ends the run."""
        size = self.graph.op("Shape", "ids")
        return self.graph.op("Gather", self.graph.weight("sizes", np.arange(self.chunk + 1)), size)

    def steps_of_chunk(self) -> str:
        """0 .. N - 1."""
        graph = self.graph
        count = graph.op("Squeeze", self.count)
        return graph.op("Range", graph.scalar(0), count, graph.scalar(1))

    def windows_of_rows(self) -> str:
        """Which of K - 1 + N rows a convolution's taps look at."""
        graph = self.graph
        taps = graph.weight("taps", np.arange(self.config.ssm_conv))
        return graph.op("Add", graph.op("Unsqueeze", self.steps, graph.ints(1)), taps)

    def rotary_tables(self) -> tuple[str, str]:
        """cos of both halves, and sin with the first half's sign: x cos + swapped x sin."""
        graph, width = self.graph, self.config.head_dim
        pair = torch.arange(0, width, 2, dtype=torch.float32)
        rates = graph.weight("rotary", (self.config.rope_base ** -(pair / width)).numpy())
        rows = graph.op("Add", self.positions, graph.ints(self.config.meta_tokens))
        rows = graph.op("Cast", graph.op("Unsqueeze", rows, graph.ints(1)), to=TensorProto.FLOAT)
        angles = graph.op("Mul", rows, rates)
        cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
        tables = (cos, cos), (graph.op("Neg", sin), sin)
        cos, sin = (graph.op("Concat", *both, axis=-1) for both in tables)
        return graph.op("Unsqueeze", cos, graph.ints(1)), graph.op("Unsqueeze", sin, graph.ints(1))

    def seen_by(self, owner: int, window: int | None) -> Seen:
        """Computed once for all layers of a window."""
        if window in self.seen:
            return self.seen[window]
        graph, size = self.graph, ring(self.config.layers[owner], self.chunk)
        with graph.at("global" if window is None else f"window.{window}"):
            rows = graph.op("Unsqueeze", self.positions, graph.ints(1))  # (N, 1)
            counts = graph.op("Shape", f"past.{owner}.key")
            if size is None:
                places = graph.op("Gather", counts, graph.scalar(1))
                held = graph.op("Range", graph.scalar(0), places, graph.scalar(1))
                visible, at = graph.op("LessOrEqual", held, rows), self.positions
            else:
                visible = self.in_window(rows, size, window)
                at = graph.op("Mod", self.positions, graph.ints(size))
            bias = graph.op("Where", visible, graph.scalar(0.0), graph.scalar(-np.inf))
            if self.config.meta_tokens:
                shape = graph.op("Concat", self.count, graph.ints(self.config.meta_tokens), axis=0)
                zeros = graph.op("Expand", graph.scalar(0.0), shape)
                bias = graph.op("Concat", zeros, bias, axis=-1)
            room = graph.op("Gather", counts, graph.ints(1))
            widths = graph.op("Concat", graph.ints(self.config.meta_tokens), room, axis=0)
            self.seen[window] = Seen(self.pairs_of_indices(at), bias, widths)
        return self.seen[window]

    def in_window(self, rows: str, size: int, window: int | None) -> str:
        """(N, P), true where a ring's place holds a key that the row sees. A place holds the last
        position that falls on it, which is below zero while nothing was written there."""
        graph, places = self.graph, self.graph.weight(f"places.{size}", np.arange(size))
        last = graph.op("Gather", self.positions, graph.ints(-1))
        back = graph.op("Mod", graph.op("Sub", last, places), graph.ints(size))
        held = graph.op("Sub", last, back)  # (P,)
        written = graph.op("GreaterOrEqual", held, graph.scalar(0))
        past = graph.op("LessOrEqual", held, rows)
        near = graph.op("LessOrEqual", graph.op("Sub", rows, held), graph.scalar(int(window or 0)))
        return graph.op("And", graph.op("And", past, near), written)

    def pairs_of_indices(self, places: str) -> str:
        """places (N,) -> (G, N, 2)."""
        graph, heads = self.graph, self.config.num_kv_heads
        shape = graph.op("Concat", graph.ints(heads), self.count, graph.ints(1), axis=0)
        first = graph.weight("kv_heads", np.arange(heads).reshape(-1, 1, 1))
        second = graph.op("Unsqueeze", places, graph.ints(0, 2))
        both = (graph.op("Expand", part, shape) for part in (first, second))
        return graph.op("Concat", *both, axis=-1)

    # Layers

    def block(self, x: str, block: Block, index: int, layer: Layer) -> str:
        graph = self.graph
        normed = self.norm(x, block.input_norm, f"{index}.input_norm")
        x = graph.op("Add", x, self.mixer(normed, block.mixer, index, layer))
        if block.mlp is None or block.mlp_norm is None:
            return x
        normed = self.norm(x, block.mlp_norm, f"{index}.mlp_norm")
        return graph.op("Add", x, self.mlp(normed, block.mlp, index))

    def mlp(self, x: str, mlp: MLP, index: int) -> str:
        graph = self.graph
        up = self.linear(x, mlp.up_proj, f"{index}.up_proj")
        if mlp.gate_proj is None:
            inner = graph.op("Relu", up)
            inner = graph.op("Mul", inner, inner)
        else:
            inner = graph.op(
                "Mul", self.silu(self.linear(x, mlp.gate_proj, f"{index}.gate_proj")), up
            )
        return self.linear(inner, mlp.down_proj, f"{index}.down_proj")

    def mixer(self, x: str, mixer: HybridMixer, index: int, layer: Layer) -> str:
        graph, sizes = self.graph, dict(mixer.sizes)
        if layer.owns_kv:
            sizes = {"qk": sizes.pop("q") + sizes.pop("k"), **sizes}
        rows = self.linear(x, mixer.in_proj, f"{index}.in_proj")
        parts = [rows]
        if len(sizes) > 1:
            split = graph.ints(*sizes.values())
            parts = graph.ops("Split", rows, split, outputs=len(sizes), axis=-1)
        named, outs = dict(zip(sizes, parts, strict=True)), []
        if layer.attention:
            outs.append(self.attention(named, mixer, index, layer))
        if mixer.ssm is not None:
            outs.append(self.summarise(named["u"], named["gate"], mixer.ssm, index))
        return self.linear(self.fuse(outs, mixer, index), mixer.out_proj, f"{index}.out_proj")

    def attention(self, rows: dict[str, str], mixer: HybridMixer, index: int, layer: Layer) -> str:
        """-> (N, H e). New keys and values are written first, then seen like all others."""
        graph, heads = self.graph, (self.config.num_heads, self.config.num_kv_heads)
        owner = index if layer.kv_from is None else layer.kv_from
        seen = self.seen_by(owner, layer.window)
        if layer.owns_kv:
            turned = self.rotate(rows["qk"], mixer.head_dim)  # (H + G, N, h)
            q, k = graph.ops("Split", turned, graph.ints(*heads), outputs=2, axis=0)
            self.pairs[index] = self.store(k, rows["v"], seen, mixer, index)
        else:
            q = self.rotate(rows["q"], mixer.head_dim)
        q = graph.op("Mul", q, graph.scalar(mixer.head_dim**-0.5))
        q = graph.op("Reshape", q, graph.ints(heads[1], -1, mixer.head_dim))  # (G, H/G N, h)
        weights = self.softmax(self.scores(q, owner), seen)  # (G, H/G N, M + P)
        out = self.read(weights, owner, seen)  # (G, H/G N, e)
        out = graph.op("Reshape", out, graph.ints(heads[0], -1, mixer.value_dim))
        out = graph.op("Transpose", out, perm=[1, 0, 2])
        return graph.op("Reshape", out, graph.ints(-1, heads[0] * mixer.value_dim))

    def rotate(self, x: str, width: int) -> str:
        """(N, heads h) -> (heads, N, h), its pairs (i, i + h/2) turned."""
        graph = self.graph
        x = graph.op("Reshape", x, graph.ints(0, -1, width))
        first, second = graph.ops("Split", x, outputs=2, axis=-1)
        swapped = graph.op("Concat", second, first, axis=-1)
        parts = graph.op("Mul", x, self.cos), graph.op("Mul", swapped, self.sin)
        return graph.op("Transpose", graph.op("Add", *parts), perm=[1, 0, 2])

    def store(self, k: str, v: str, seen: Seen, mixer: HybridMixer, index: int) -> tuple[str, str]:
        """k (G, N, h), v (N, G e) into the layer's places. Given the input's memory for its output,
        the op writes the new rows and copies nothing."""
        graph = self.graph
        v = graph.op("Reshape", v, graph.ints(0, -1, mixer.value_dim))
        v = graph.op("Transpose", v, perm=[1, 0, 2])
        pair = [
            graph.op(
                "ScatterND",
                f"past.{index}.{what}",
                seen.places,
                new,
                output=f"present.{index}.{what}",
            )
            for what, new in (("key", k), ("value", v))
        ]
        return pair[0], pair[1]

    def scores(self, q: str, owner: int) -> str:
        graph, meta = self.graph, self.metas[owner]
        columns = graph.op("Transpose", self.pairs[owner][0], perm=[0, 2, 1])
        scores = graph.op("MatMul", q, columns)
        if meta.k is None:
            return scores
        known = self.weight(f"{owner}.meta_key", meta.k.permute(1, 2, 0))  # (G, h, M)
        return graph.op("Concat", graph.op("MatMul", q, known), scores, axis=-1)

    def softmax(self, scores: str, seen: Seen) -> str:
        graph, shape = self.graph, self.graph.op("Shape", scores)
        many = graph.op(
            "Concat", graph.ints(self.config.num_heads), self.count, graph.ints(-1), axis=0
        )
        scores = graph.op("Add", graph.op("Reshape", scores, many), seen.bias)
        return graph.op("Reshape", graph.op("Softmax", scores, axis=-1), shape)

    def read(self, weights: str, owner: int, seen: Seen) -> str:
        graph, meta, values = self.graph, self.metas[owner], self.pairs[owner][1]
        if meta.v is None:
            return graph.op("MatMul", weights, values)
        first, rest = graph.ops("Split", weights, seen.widths, outputs=2, axis=-1)
        known = self.weight(f"{owner}.meta_value", meta.v.permute(1, 0, 2))  # (G, M, e)
        return graph.op("Add", graph.op("MatMul", first, known), graph.op("MatMul", rest, values))

    def summarise(self, u: str, gate: str, ssm: SSM, index: int) -> str:
        """u, gate (N, E) -> (N, E): convolution, scan, gate."""
        graph, config = self.graph, self.config
        u = self.convolve(u, ssm, index)
        sizes = graph.ints(config.ssm_dt_rank, config.ssm_state, config.ssm_state)
        low = self.linear(u, ssm.x_proj, f"{index}.x_proj")
        dt, B, C = graph.ops("Split", low, sizes, outputs=3, axis=-1)
        dt = self.norm(dt, ssm.dt_norm, f"{index}.dt_norm")
        B, C = (
            self.norm(B, ssm.B_norm, f"{index}.B_norm"),
            self.norm(C, ssm.C_norm, f"{index}.C_norm"),
        )
        bias = self.weight(f"{index}.dt_bias", ssm.dt_bias)
        dt = graph.op("Softplus", self.linear(dt, ssm.dt_proj, f"{index}.dt_proj", bias))
        rates = self.weight(f"{index}.A", -ssm.A_log.float().exp().T)  # (n, E)
        y = self.scan(dt, graph.op("Mul", dt, u), B, C, rates, index)
        y = graph.op("Add", y, graph.op("Mul", u, self.weight(f"{index}.D", ssm.D)))
        return graph.op("Mul", y, self.silu(gate))

    def convolve(self, u: str, ssm: SSM, index: int) -> str:
        """silu(bias + sum over taps of weight times the row so far back)."""
        graph, taps, conv = self.graph, self.config.ssm_conv, ssm.conv
        weight = self.weight(f"{index}.conv", conv.weight.squeeze(1).T)  # (K, E)
        if taps > 1:
            rows = graph.op("Concat", f"past.{index}.conv", u, axis=0)  # (K-1 + N, E)
            left = graph.ints(1 - taps), graph.ints(END), graph.ints(0)
            graph.op("Slice", rows, *left, output=f"present.{index}.conv")
            windows = graph.op("Gather", rows, self.windows)  # (N, K, E)
            u = graph.op("ReduceSum", graph.op("Mul", windows, weight), graph.ints(1), keepdims=0)
        else:
            u = graph.op("Mul", u, weight)
        if conv.bias is not None:
            u = graph.op("Add", u, self.weight(f"{index}.conv_bias", conv.bias))
        return self.silu(u)

    def scan(self, dt: str, x: str, B: str, C: str, rates: str, index: int) -> str:
        """h_t = exp(dt_t A) h_{t-1} + B_t x_t, y_t = <C_t, h_t>; y (N, E). One row has no loop.

        dt, x (N, E), B, C (N, n), A (n, E)."""
        graph, state = self.graph, f"past.{index}.state"
        n, E = self.config.ssm_state, self.config.inner_size
        one = graph.op("Equal", self.count, graph.ints(1))
        given = [dt, x, B, C]
        branches = {}
        for branch, walk in (("then_branch", _row), ("else_branch", _rows)):
            inner = graph.inside()
            with inner.at(branch):
                state_after, y = walk(inner, given, rates, state, n, E)
            results = [value(state_after, (n, E)), value(y, ("rows", E))]
            branches[branch] = inner.body(branch, [], results)
        outputs = [f"present.{index}.state", f"layers.{index}/scan"]
        return graph.ops("If", one, outputs=outputs, **branches)[1]

    def fuse(self, outs: list[str], mixer: HybridMixer, index: int) -> str:
        """What the branches made of the rows -> what out_proj reads. The half of the mean, a sign
        and the scalars are in the norms' weights."""
        if mixer.attention_norm is None or mixer.ssm_norm is None:
            return outs[0]
        names = f"{index}.attention_norm", f"{index}.ssm_norm"
        weights, eps = mixer.weights_of_mean(), mixer.ssm_norm.eps
        if weights is None:
            norms = mixer.attention_norm, mixer.ssm_norm
            both = [self.norm(*of) for of in zip(outs, norms, names, strict=True)]
            return self.graph.op("Concat", *both, axis=-1)
        halves = [weight.float() / 2 for weight in weights]
        both = [self.scaled(*of, eps) for of in zip(outs, halves, names, strict=True)]
        return self.graph.op("Add", *both)

    # Small parts

    def norm(self, x: str, norm: RMSNorm, name: str) -> str:
        return self.scaled(x, norm.weight, name, norm.eps)

    def scaled(self, x: str, weight: torch.Tensor, name: str, eps: float) -> str:
        """RMSNorm, spelt so that onnxruntime makes one op of it."""
        graph = self.graph
        mean = graph.op("ReduceMean", graph.op("Pow", x, graph.scalar(2.0)), axes=[-1], keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.scalar(eps)))
        return graph.op("Mul", graph.op("Div", x, root), self.weight(name, weight))

    def silu(self, x: str) -> str:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def linear(self, x: str, module: nn.Module, name: str, bias: str = "") -> str:
        return linear(self.graph, x, module, name, self.accuracy, bias)

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        if name in self.graph.data.places:
            return self.graph.weight(name)
        return self.graph.weight(name, array(tensor))


def _row(graph: Graph, given: list[str], rates: str, state: str, n: int, E: int) -> tuple[str, str]:
    dt, x, B, C = given
    return _advance(graph, dt, x, graph.op("Reshape", B, graph.ints(n, 1)), C, rates, state)


def _rows(
    graph: Graph, given: list[str], rates: str, state: str, n: int, E: int
) -> tuple[str, str]:
    """The same for each row, in a loop that the runtime runs."""
    dt, x, B, C = given
    row = graph.ints(1)
    sequences = [graph.op("Unsqueeze", part, row) for part in (dt, x)]  # (N, 1, E)
    sequences += [graph.op("Unsqueeze", B, graph.ints(2)), graph.op("Unsqueeze", C, row)]
    body, names = graph.inside(), ["h", "dt", "x", "B", "C"]
    with body.at("body"):
        after, y = _advance(body, "dt", "x", "B", "C", rates, "h")
    shapes = [(n, E), (1, E), (1, E), (n, 1), (1, n)]
    inputs = [value(*of) for of in zip(names, shapes, strict=True)]
    loop = body.body("row", inputs, [value(after, (n, E)), value(y, (1, E))])
    final, ys = graph.ops("Scan", state, *sequences, outputs=2, body=loop, num_scan_inputs=4)
    return final, graph.op("Squeeze", ys, row)


def _advance(
    graph: Graph, dt: str, x: str, B: str, C: str, rates: str, state: str
) -> tuple[str, str]:
    """dt, x (1, E), B (n, 1), C (1, n), A and h (n, E) -> h (n, E), y (1, E)."""
    decay = graph.op("Exp", graph.op("Mul", dt, rates))
    kept, new = graph.op("Mul", decay, state), graph.op("Mul", B, x)
    after = graph.op("Add", kept, new)
    return after, graph.op("MatMul", C, after)
