"""Kernels of a decode step that start while those before them end give what they give in turn."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import ops
from hymba.ops import backend

E, H, G, h, e, N, R = 3200, 25, 5, 64, 128, 16, 100  # the 1.5B
D, EPS, PLACES = H * h, 1e-6, 512


class Branches:
    """A layer's ops between its big products, in an order like a block's, on two streams."""

    def __init__(self, rows: int, device: str):
        self.rows, self.device = rows, device
        self.generator = torch.Generator(device).manual_seed(rows)
        self.weights = {
            "in": self.random(D + G * (h + e) + 2 * E, D, scale=D**-0.5),
            "x": self.random(R + 2 * N, E, scale=E**-0.5),
            "dt": self.random(E, R, scale=R**-0.5),
            "out": self.random(D, E, scale=E**-0.5),
            "taps": self.random(E, 4, scale=0.5),
        }
        self.A = -self.random(E, N).float().exp()
        self.ones = {size: 1 + self.random(size, scale=0.1) for size in (D, E, R, N)}
        self.slots = torch.randperm(rows, generator=self.generator, device=device)
        self.zero = torch.zeros_like(self.slots)
        self.table = self.slots[:, None].int()
        self.states: list[Tensor] = []
        self.aside = torch.cuda.Stream()

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (
            torch.randn(*shape, generator=self.generator, device=self.device) * scale
        ).bfloat16()

    def start(self) -> Tensor:
        """The rows of the first layer; what is held is as it was at first."""
        self.generator.manual_seed(7)
        sizes = (3, E), (E, N), (G, PLACES, h), (G, PLACES, e)
        fresh = [self.random(self.rows, *size) for size in sizes]
        fresh[1] = fresh[1].float()
        for held, new in zip(self.states, fresh, strict=False):
            held.copy_(new)
        self.states = self.states or fresh
        return self.random(self.rows, D)

    def layer(self, x: Tensor, place: int) -> Tensor:
        one, w, (conv, ssm, keys, values) = self.ones, self.weights, self.states
        normed = ops.rms_norm(x, one[D], EPS)
        q, k, v, u, gate = F.linear(normed, w["in"]).split([D, G * h, G * e, E, E], dim=1)
        here = torch.cuda.current_stream()
        self.aside.wait_stream(here)
        with torch.cuda.stream(self.aside):
            moved = ops.conv_step(u, w["taps"], one[E], conv, self.slots)
            thin = self.rows <= ops.THIN_ROWS
            low = (ops.linear if thin else ops.narrow_linear)(moved, w["x"])
            y = ops.ssm_step(
                moved, low, w["dt"], one[E], one[R], one[N], one[N], self.A, one[E], gate, ssm,
                self.slots, EPS,
            )  # fmt: skip
        angles = torch.full((self.rows, 1, h // 2), float(place), device=self.device)
        q, _ = ops.rope_and_store(
            q.unflatten(1, (H, h)), k.unflatten(1, (G, h)), v.unflatten(1, (G, e)),
            angles.cos(), angles.sin(), keys, values, self.slots, self.zero + place,
        )  # fmt: skip
        q = ops.rotate(q, angles.cos(), angles.sin())
        counts = (self.zero + place + 1).int()
        seen = ops.attention_step(q, keys, values, self.table, counts, PLACES).flatten(1)
        here.wait_stream(self.aside)
        fused = ops.fuse_heads(seen, y, one[E], one[E], EPS)
        normed, x = ops.add_rms_norm(x, F.linear(fused, w["out"]), one[D], EPS)
        return x + ops.swiglu(normed, x)

    def run(self, x: Tensor) -> Tensor:
        for place in range(PLACES - 6, PLACES):
            x = self.layer(x, place)
        return x

    def all(self) -> list[Tensor]:
        """What comes out, and what is left, without a graph and with one."""
        self.start()
        given = self.start()
        found = [self.run(given), *(state.clone() for state in self.states)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.run(given)
        for _ in range(5):
            self.start()
            graph.replay()
            found += [out.clone(), *(state.clone() for state in self.states)]
        return found


@pytest.mark.parametrize("rows", [1, 2, 5, 128])
def test_as_in_turn(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        pytest.skip("on a GPU")
    branches = Branches(rows, device)
    monkeypatch.setattr(backend, "CHAINED_ROWS", -1)
    want = branches.all()
    monkeypatch.undo()
    if not backend.chains(want[0]):
        pytest.skip("from Hopper on")
    for i, (x, y) in enumerate(zip(branches.all(), want, strict=True)):
        assert torch.isfinite(y).all() and torch.equal(x, y), i


def test_only_on_a_gpu_and_for_few_rows() -> None:
    assert not backend.chains(torch.ones(1))
    assert not backend.chains(torch.ones(1), backend.CHAINED_ROWS + 1)
