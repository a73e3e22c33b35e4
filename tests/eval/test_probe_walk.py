"""What the probe reads is what the model computes: every plan and fusion, meta tokens and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.config import Config
from hymba.eval.probe import attention, hidden
from hymba.eval.probe.attention import attention_rows
from hymba.eval.probe.hidden import Recurrence, alpha, channels, hidden_rows, recurrence
from hymba.eval.probe.walk import Seen, behind_norms, start, through, together, walk
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Left
from hymba.ops import Segments
from hymba.ops.backend import forget
from hymba.ops.scan import selective_scan_reference
from tests.plans import plans

PLANS = list(plans())
LENGTH = 23  # several windows of 5
TIGHT = 1e-11  # float64: sums in another order


@pytest.fixture(params=PLANS)
def model(request: pytest.FixtureRequest, lively: Callable[..., Any], tiny: Any) -> LanguageModel:
    return lively(tiny(request.param), dtype=torch.float64)


@pytest.fixture
def ids(text: Callable[..., Tensor]) -> list[int]:
    return text(LENGTH).tolist()


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("plan", PLANS)
def test_a_walk_is_the_forward(
    plan: str,
    backend: str | None,
    lively: Callable[..., Any],
    tiny: Any,
    text: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, several texts and packed meta tokens included. A CPU's kernels, which take over
    where no gradient flows, as in a walk, differ from PyTorch by roundings."""
    if backend is not None:
        monkeypatch.setenv("HYMBA_BACKEND", backend)
        forget()
    model = lively(tiny(plan))
    texts = [x.tolist() for x in text([LENGTH, 7])]
    rows = torch.tensor([token for one in texts for token in one])
    want = model(rows, Batch.of([len(one) for one in texts]))  # gradients flow: meta rows in front
    for seen in walk(model, texts):
        last = seen
    meta = model.config.meta_tokens
    got = model.decoder.final_norm(last.x[meta:])
    forget()
    if backend == "torch":
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not last.x.requires_grad


def test_without_meta_tokens_is_the_model_that_has_none(model: Any, ids: list[int]) -> None:
    """The same weights in a config of no meta tokens; rotation knows only distances."""
    bare = LanguageModel(Config(**vars(model.config) | {"meta_tokens": 0})).double()
    bare.load_state_dict(model.state_dict(), strict=False)
    want = bare(torch.tensor(ids), Batch.of([LENGTH]))
    *_, last = walk(model, [ids], meta=False)
    got = model.decoder.final_norm(last.x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # rotation's angles are float32


def dense_attention(seen: Seen, meta: int) -> Tensor:
    return torch.cat([rows.weights for rows in attention_rows(seen, meta)], dim=1)  # (H, R, R)


@pytest.mark.parametrize("with_meta", [True, False])
def test_weights_times_values_are_the_branch(
    model: Any, ids: list[int], with_meta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = model.config.meta_tokens if with_meta else 0
    for size in (1 << 23, 300):  # one strip, many
        monkeypatch.setattr(attention, "ELEMENTS", size)
        for seen in walk(model, [ids], with_meta):
            if seen.v is None or seen.q is None:
                continue
            weights = dense_attention(seen, meta)
            values = seen.v.repeat_interleave(seen.q.shape[1] // seen.v.shape[1], dim=1)
            made = torch.einsum("htp,phe->the", weights, values).flatten(1)
            torch.testing.assert_close(made, seen.outs["attention"], rtol=TIGHT, atol=TIGHT)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("with_meta", [True, False])
def test_hidden_attention_times_inputs_is_the_scan(
    model: Any, ids: list[int], with_meta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1 << 23, 5000):
        monkeypatch.setattr(attention, "ELEMENTS", size)
        for seen in walk(model, [ids], with_meta):
            if seen.gate is None:
                continue
            r = recurrence(seen)
            every = channels(r.u.shape[1], most=10**9)
            matrix = torch.cat([strip for _, strip in alpha(r, every)], dim=1)  # (E, R, R)
            assert not matrix.triu(1).any()
            y = torch.einsum("eij,je->ie", matrix, r.u) + r.D * r.u
            want = seen.outs["ssm"]
            torch.testing.assert_close(y * F.silu(seen.gate), want, rtol=1e-9, atol=1e-10)


def test_hidden_attention_is_the_formula() -> None:
    """Equation 2 as it stands, product and all, one number at a time."""
    torch.manual_seed(0)
    rows, width, states = 6, 3, 2
    r = Recurrence(
        u=torch.randn(rows, width).double(),
        dt=torch.rand(rows, width).double(),
        A=-torch.rand(width, states).double(),
        B=torch.randn(rows, states).double(),
        C=torch.randn(rows, states).double(),
        D=torch.randn(width).double(),
    )
    ((_, got),) = alpha(r, torch.tensor([0, 2]))
    for place, e in enumerate((0, 2)):
        for i in range(rows):
            for j in range(i + 1):
                fading = torch.ones(states).double()
                for k in range(j + 1, i + 1):
                    fading = fading * torch.exp(r.A[e] * r.dt[k, e])
                want = (r.C[i] * fading * r.B[j]).sum() * r.dt[j, e]
                torch.testing.assert_close(got[place, i, j], want)


def test_hidden_attention_of_long_steep_memory_is_finite() -> None:
    """Sums of dt in the thousands: differences keep their digits, nothing overflows."""
    torch.manual_seed(0)
    rows, width, states = 300, 2, 3
    r = Recurrence(
        u=torch.randn(rows, width),
        dt=20 * torch.rand(rows, width),
        A=-torch.tensor([[1e-3, 1.0, 16.0]]).expand(width, states),
        B=torch.randn(rows, states),
        C=torch.randn(rows, states),
        D=torch.zeros(width),
    )
    matrix = torch.cat([strip for _, strip in alpha(r, torch.arange(width))], dim=1)
    undo = torch.log(torch.expm1(r.dt.double())).to(torch.float32)  # softplus comes in the scan
    open_gate = torch.full((rows, width), 50.0)
    y, _ = selective_scan_reference(
        r.u, undo, r.A, r.B, r.C, r.D, open_gate, torch.zeros(width), Segments((rows,))
    )
    got = torch.einsum("eij,je->ie", matrix, r.u) * F.silu(open_gate)
    assert (got - y).norm() < 1e-4 * y.norm()


def test_rows_of_hidden_attention_add_up_to_one(lively: Any, tiny: Any, ids: list[int]) -> None:
    seen = next(iter(walk(lively(tiny("hymba")), [ids])))
    chosen = channels(64, 10)
    assert chosen.tolist() == [0, 6, 12, 19, 25, 32, 38, 44, 51, 57]
    for rows in hidden_rows(seen, chosen):
        assert rows.weights.shape == (10, LENGTH + 3, LENGTH + 3)
        torch.testing.assert_close(rows.weights.sum(-1), torch.ones(10, LENGTH + 3))


def test_parts_are_what_the_fusion_reads(model: Any, ids: list[int]) -> None:
    for seen in walk(model, [ids]):
        made = together(seen.mixer, behind_norms(seen.mixer, seen.outs))
        torch.testing.assert_close(made, seen.mixer.fuse(list(seen.outs.values())))


@pytest.mark.parametrize("length", [5, 40, 90])
def test_no_strip_is_larger_than_was_said(
    length: int, lively: Any, tiny: Any, text: Callable[..., Tensor], monkeypatch: Any
) -> None:
    monkeypatch.setattr(attention, "ELEMENTS", 4000)
    seen = next(iter(walk(lively(tiny("hymba")), [text(length).tolist()])))
    for make in (attention_rows(seen, 3), hidden_rows(seen, channels(64, 8))):
        strips = list(make)
        assert [x.first for x in strips[1:]] == [x.first + x.weights.shape[1] for x in strips[:-1]]
        assert sum(x.weights.shape[1] for x in strips) == length + 3
        for strip in strips:
            assert strip.weights.numel() <= 4000 or strip.weights.shape[1] == 1


def test_a_switch_that_changes_nothing_and_one_that_takes_all(model: Any, ids: list[int]) -> None:
    x, road = start(model, [ids])
    plain, _ = through(model, 0, x, road, [])
    ones = {name: torch.ones(1).double() for name in plain.outs}
    same, left = through(model, 0, x, road, [], ones)
    torch.testing.assert_close(same.x, plain.x)
    assert isinstance(left, Left)
    none, _ = through(model, 0, x, road, [], {name: one * 0 for name, one in ones.items()})
    block = model.decoder.layers[0]
    torch.testing.assert_close(none.x, block.add(x, torch.zeros_like(x)))
    assert hidden.channels(3, 8).tolist() == [0, 1, 2]
