"""The decode step's ops: in place and by slot, what the ops over segments give for one row each.

The plain forms against those ops, then the kernels against the plain forms. Small sizes run on a
CPU (kernels in Triton's interpreter), large ones on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.ops import Segments, step
from hymba.ops.conv import causal_conv_reference
from hymba.ops.norm import rms_norm
from hymba.ops.scan import selective_scan_reference

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
EPS = 1e-6
Op = Callable[..., Any]

# rows, slots, channels, taps, states, rank: of each, what a step of the SSM branch needs
SMALL = [(1, 1, 5, 4, 8, 3), (3, 7, 37, 2, 16, 20)]
LARGE = [(1, 4, 3200, 4, 16, 100), (128, 130, 3200, 4, 16, 100), (63, 64, 1602, 3, 8, 17)]


@pytest.fixture
def device(device: str) -> str:
    """For the kernels' tests, which alone ask for it."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here; the interpreter is for machines without")
    return device


@pytest.fixture
def sizes(request: pytest.FixtureRequest, device: str) -> tuple[int, ...]:
    if device == "cpu" and request.param in LARGE:
        pytest.skip("too large for the interpreter")
    return request.param


def branch(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """All that a step of the branch reads; u, z and low are slices of wider rows."""
    rows, slots, channels, taps, states, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    made = {
        "both": random(rows, 2 * channels + 3),
        "wider": random(rows, rank + 2 * states + 1),
        "weight": random(channels, taps),
        "bias": random(channels),
        "conv": random(slots, taps - 1, channels),
        "dt": random(rows, channels),
        "dt_weight": random(channels, rank) / rank**0.5,
        "dt_bias": 3 * random(channels) - 2,  # some far below zero, where softplus is a small exp
        "dt_norm": 1 + random(rank) / 4,
        "B_norm": 1 + random(states) / 4,
        "C_norm": 1 + random(states) / 4,
        "D": random(channels),
    }
    found = {name: x.to(device, dtype) for name, x in made.items()}
    both, wider = found.pop("both"), found.pop("wider")
    found |= {"u": both[:, :channels], "z": both[:, channels : 2 * channels]}
    found["low"] = wider[:, : rank + 2 * states]
    found["A"] = -torch.exp(random(channels, states)).to(device, wide)
    found["state"] = random(slots, channels, states).to(device, wide)
    order = torch.randperm(slots, generator=generator)[:rows]
    return found | {"slots": order.to(device)}


CONV = ("weight", "bias")
STATE = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
SSM = ("u", "low", "dt_weight", "dt_bias", "dt_norm", "B_norm", "C_norm", "A", "D", "z")


def conv_of(op: Op, x: dict[str, Tensor], bias: bool = True) -> tuple[Tensor, Tensor]:
    """(out, the state behind it) of a copy of the state."""
    state = x["conv"].clone()
    out = op(x["u"], x["weight"], x["bias"] if bias else None, state, x["slots"])
    return out, state


def state_of(op: Op, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    states, state = x["A"].shape[1], x["state"].clone()
    given = x | {"B": x["low"][:, :states], "C": x["low"][:, states : 2 * states]}
    return op(*(given[name] for name in STATE), state, x["slots"]), state


def ssm_of(op: Op, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    state = x["state"].clone()
    return op(*(x[name] for name in SSM), state, x["slots"], EPS), state


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_conv_step_is_the_convolution_of_one_row(sizes: tuple[int, ...]) -> None:
    x = branch(sizes)
    out, state = conv_of(step.conv_step, x)
    every = Segments((1,) * sizes[0])
    before = x["conv"][x["slots"]]
    want, left = causal_conv_reference(x["u"], x["weight"], x["bias"], every, before)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, x["conv"].index_copy(0, x["slots"], left))


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_ssm_step_is_norms_projection_and_scan_of_one_row(sizes: tuple[int, ...]) -> None:
    x = branch(sizes)
    y, state = ssm_of(step.ssm_step, x)
    dt, B, C = x["low"].split([x["dt_weight"].shape[1], *[x["A"].shape[1]] * 2], dim=1)
    dt = rms_norm(dt, x["dt_norm"], EPS) @ x["dt_weight"].T
    B, C = rms_norm(B, x["B_norm"], EPS), rms_norm(C, x["C_norm"], EPS)
    given = x | {"dt": dt, "B": B, "C": C}
    every, before = Segments((1,) * sizes[0]), x["state"][x["slots"]]
    want, left = selective_scan_reference(*(given[name] for name in STATE), every, before)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, x["state"].index_copy(0, x["slots"], left))


def heads(dtype: torch.dtype, device: str, rows: int = 3, large: bool = False) -> dict[str, Tensor]:
    """q, k and v as slices of one projection, angles, stores, and where the rows go in them."""
    query, groups, h, e = (25, 5, 64, 128) if large else (6, 2, 8, 12)
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    widths = [query * h, groups * h, groups * e, 3]
    q, k, v, _ = random(rows, sum(widths)).split(widths, dim=1)
    angles = 9 * torch.randn(rows, 1, h // 2, generator=generator).to(device)
    return {
        "q": q.unflatten(1, (query, h)),
        "k": k.unflatten(1, (groups, h)),
        "v": v.unflatten(1, (groups, e)),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "store_k": random(rows + 2, groups, 9, h),
        "store_v": random(rows + 2, groups, 9, e),
        "slots": torch.randperm(rows + 2, generator=generator)[:rows].to(device),
        "places": torch.randint(0, 9, (rows,), generator=generator).to(device),
    }


def store(op: Op, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(q, k, both stores) of copies of the stores."""
    copies = {name: x[name].clone() for name in ("store_k", "store_v")}
    return *op(**x | copies), *copies.values()


def test_rope_and_store_turns_pairs_and_writes_one_place_a_row() -> None:
    x = heads(torch.float32, "cpu")
    q, k, store_k, store_v = store(step.rope_and_store, x)
    for row, (slot, place) in enumerate(zip(x["slots"], x["places"], strict=True)):
        for pair in range(4):
            turn = torch.complex(x["cos"][row, 0, pair], x["sin"][row, 0, pair])
            for got, given in ((q, x["q"]), (k, x["k"])):
                want = torch.complex(given[row, :, pair], given[row, :, pair + 4]) * turn
                torch.testing.assert_close(got[row, :, pair], want.real)
                torch.testing.assert_close(got[row, :, pair + 4], want.imag)
        torch.testing.assert_close(store_k[slot, :, place], k[row])
        torch.testing.assert_close(store_v[slot, :, place], x["v"][row])
    assert (store_k != x["store_k"]).sum() == k.numel()
    assert (store_v != x["store_v"]).sum() == x["v"].numel()


def test_a_layer_that_shares_keys_turns_only_queries() -> None:
    x = heads(torch.float32, "cpu")
    none = dict.fromkeys(("k", "v", "store_k", "store_v"))
    q, k = step.rope_and_store(**x | none)
    assert k is None and torch.equal(q, step.rope_and_store(**x)[0])


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def in_double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in x.items()}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*SMALL, *LARGE], ids=str, indirect=True)
def test_kernels(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Against the plain forms: in float64, and, where roundings lie between, in the same dtype."""
    from hymba.ops import step_triton as kernels

    x = branch(sizes, dtype, device)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for bias in (True, False):
        want = conv_of(step.conv_step, in_double(x), bias)
        close(conv_of(kernels.conv_step, x, bias), want, tolerance)
    close(state_of(kernels.state_step, x), state_of(step.state_step, in_double(x)), tolerance)
    # The interpreter rounds to bfloat16 by cutting off, so that is coarser than on a GPU.
    rough = 3 * tolerance if device == "cpu" else tolerance
    close(ssm_of(kernels.ssm_step, x), ssm_of(step.ssm_step, x), rough)


@needs_triton
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_other_slots_are_left_alone(kind: torch.dtype, device: str) -> None:
    from hymba.ops import step_triton as kernels

    x = branch(SMALL[1], kind, device)
    others = [i for i in range(SMALL[1][1]) if i not in x["slots"].tolist()]
    runs = [conv_of(kernels.conv_step, x), state_of(kernels.state_step, x)]
    runs.append(ssm_of(kernels.ssm_step, x))
    for (_, after), before in zip(runs, (x["conv"], x["state"], x["state"]), strict=True):
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[x["slots"]], before[x["slots"]])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_rope_kernel(rows: int, dtype: torch.dtype, device: str) -> None:
    from hymba.ops.step_triton import rope_and_store

    if device == "cpu" and rows > 3:
        pytest.skip("too large for the interpreter")
    x = heads(dtype, device, rows, large=device != "cpu")
    want = store(step.rope_and_store, x)
    close(store(rope_and_store, x), want, 1e-6 if dtype == torch.float32 else 1e-2)
    none = dict.fromkeys(("k", "v", "store_k", "store_v"))
    q, k = rope_and_store(**x | none)
    assert k is None and torch.equal(q, store(rope_and_store, x)[0])


@needs_triton
def test_no_rows(device: str) -> None:
    from hymba.ops import step_triton as kernels

    x = branch((0, 2, 5, 4, 8, 3), torch.float32, device)
    assert conv_of(kernels.conv_step, x)[0].shape == (0, 5)
    assert state_of(kernels.state_step, x)[0].shape == (0, 5)
    assert ssm_of(kernels.ssm_step, x)[0].shape == (0, 5)
    x = heads(torch.float32, device, rows=0)
    assert store(kernels.rope_and_store, x)[0].shape == (0, 6, 8)


@needs_triton
def test_operators_are_registered_as_they_are(device: str) -> None:
    """What they write and return is what their schemas and fakes say."""
    from hymba.ops import step_triton as kernels

    x = branch(SMALL[0], torch.float32, device)
    where = (x["conv"].clone(), x["slots"])
    torch.library.opcheck(kernels.conv_step.op, (x["u"], x["weight"], x["bias"], *where))
    given = [x[name] for name in SSM]
    torch.library.opcheck(kernels.ssm_step.op, (*given, x["state"].clone(), x["slots"], EPS))
    given = [(x | {"B": x["low"][:, :8], "C": x["low"][:, :8]})[name] for name in STATE]
    torch.library.opcheck(kernels.state_step.op, (*given, x["state"].clone(), x["slots"]))
    turned = heads(torch.float32, device)
    torch.library.opcheck(kernels.rope_operator.op, tuple(turned.values()))


@needs_triton
def test_compiled_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hymba.ops import step_triton as kernels

    if device == "cpu":
        pytest.skip("on a GPU")
    monkeypatch.undo()  # the compiler does not follow memory that is made NaN
    x = branch(LARGE[1], torch.bfloat16, device)

    @torch.compile(fullgraph=True)
    def run(state: Tensor) -> Tensor:
        return kernels.ssm_step(*(x[name] for name in SSM), state, x["slots"], EPS)

    state = x["state"].clone()
    want, after = ssm_of(kernels.ssm_step, x)
    assert torch.equal(run(state), want) and torch.equal(state, after)
