"""Each number of a probe against an obvious twin: whole matrices, plain loops, weights set to 0."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.eval.probe import attention, field, meta, share, sharing
from hymba.eval.probe.attention import attention_rows
from hymba.eval.probe.hidden import channels, hidden_rows
from hymba.eval.probe.importance import Part, branches, importance, single_heads
from hymba.eval.probe.magnitude import Magnitudes
from hymba.eval.probe.walk import start, walk
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel

LENGTH = 19


@pytest.fixture
def ids(text: Callable[..., Tensor]) -> list[int]:
    return text(LENGTH).tolist()


@pytest.mark.parametrize("strip", [1 << 23, 200])
@pytest.mark.parametrize("plan", ["hymba", "llama", "samba"])
def test_a_reading_is_what_the_whole_matrix_says(
    plan: str, strip: int, lively: Any, tiny: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ELEMENTS", strip)
    model = lively(tiny(plan), dtype=torch.float64)
    m = model.config.meta_tokens
    for seen in walk(model, [ids]):
        makers = []
        if seen.layer.attention:
            makers.append(lambda seen=seen: attention_rows(seen, m))
        if seen.layer.ssm:
            makers.append(lambda seen=seen: hidden_rows(seen, channels(64, 5)))
        for make in makers:
            whole = torch.cat([rows.weights for rows in make()], dim=1)[:, m:]  # (H, N, M + N)
            got = share.read(make(), m, shown=7, each_head=True)
            check_reading(got, whole, m)


def check_reading(got: share.Reading, whole: Tensor, m: int) -> None:
    for head in range(len(whole)):
        sums = dict.fromkeys(share.KINDS, 0.0)
        bits = back = 0.0
        for i in range(1, LENGTH):
            for j in range(m + LENGTH):
                w = float(whole[head, i, j])
                kind = "meta" if j < m else "self" if j == m + i else "first" if j == m else "cross"
                sums[kind] += w
                bits -= w * math.log2(w) if w > 0 else 0
                back += w * (m + i - j) if j >= m else 0
        want = [x / (LENGTH - 1) for x in sums.values()]
        assert got.share[head].tolist() == pytest.approx(want, abs=1e-9)
        assert float(got.entropy[head]) == pytest.approx(bits / (LENGTH - 1))
        assert float(got.distance[head]) == pytest.approx(back / (LENGTH - 1))
        last = sum(float(whole[head, -1, m + s]) * (LENGTH - 1 - s) for s in range(LENGTH))
        assert float(got.reach[head]) == pytest.approx(last)
    half = (LENGTH + 1) // 2
    torch.testing.assert_close(got.firing[0], whole[:, :half, :m].mean(1))
    torch.testing.assert_close(got.firing[1], whole[:, half:, :m].mean(1))
    torch.testing.assert_close(got.pattern, whole[:, :7, : m + 7].float())


def test_even_attention_shares_what_is_seen() -> None:
    """Row 4 of 2 meta tokens and a window of 2 sees 2 + 3 keys, the first not among them."""
    (rows,) = attention.even_rows(2 + 6, 2, 2)
    assert rows.weights[0, 2 + 4].tolist() == pytest.approx([0.2, 0.2, 0, 0, 0.2, 0.2, 0.2, 0])
    (rows,) = attention.even_rows(4, None, 0)
    assert rows.weights[0, 2].tolist() == pytest.approx([1 / 3] * 3 + [0])


def test_field_is_equation_5() -> None:
    """Its three sums, with two heads of attention in every layer and nothing else."""
    torch.manual_seed(0)
    layers, heads, last = 4, 2, 9
    matrix = torch.rand(layers, heads, last + 1).softmax(-1)
    total = 0.0
    for n in range(1, layers + 1):
        for h in range(heads):
            for s in range(last + 1):
                total += 2 * float(matrix[n - 1, h, s]) * (last - s) * (layers - n + 1)
    want = total / (heads * layers * (layers + 1))
    back = last - torch.arange(last + 1)
    reach = [{"attention": float((x * back).sum(-1).mean())} for x in matrix]
    assert field.field(reach)["attention"] == pytest.approx(want)
    assert sum(field.weights(7)) == pytest.approx(1)


def test_field_of_branches_that_some_layers_lack() -> None:
    found = field.field([{"ssm": 2.0}, {"attention": 8.0}])
    assert found == pytest.approx({"both": 4.0, "attention": 8 / 3, "ssm": 4 / 3})
    assert field.field([{"attention": 6.0, "ssm": 2.0}])["both"] == 4


def test_domains_that_use_other_meta_tokens() -> None:
    """Two texts that share no meta token are 1 bit apart, halves alike 0."""
    one = torch.tensor([[[0.2, 0.0]]]).expand(2, 3, 2).double()
    found = meta.domains({"a": one, "b": one.flip(-1)})
    assert found["share"] == [[1, 0], [0, 1]]
    assert found["distance_between_texts"] == [{"texts": ["a", "b"], "bits": pytest.approx(1)}]
    assert found["distance_within_text"] == {"a": 0, "b": 0}
    assert found["log2_ratio_to_mean"][0][0] == pytest.approx(1)
    assert found["top"] == {"a": [0, 1], "b": [1, 0]}


def whole_loss(model: LanguageModel, texts: dict[str, list[int]]) -> float:
    """Through the model's own forward, a text at a time."""
    total = count = 0.0
    with torch.no_grad():
        for ids in texts.values():
            hidden = model(torch.tensor(ids), Batch.of([len(ids)]))
            logs = model.logits(hidden[:-1]).log_softmax(-1)
            total -= float(logs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
    return total / count


def without(model: LanguageModel, part: Part) -> LanguageModel:
    """The model with weights set to 0 that only this part's way out goes through."""
    bare = copy.deepcopy(model)
    mixer = bare.decoder.layers[part.layer].mixer
    norm = mixer.attention_norm if part.branch == "attention" else mixer.ssm_norm
    with torch.no_grad():
        weight = mixer.out_proj.weight.T if norm is None else norm.weight
        groups = 1 if not any(x.attention for x in model.config.layers) else model.config.num_heads
        each = weight.unflatten(0, (groups, -1))
        each[slice(None) if part.head is None else part.head] = 0
    return bare


@pytest.mark.parametrize(
    "plan", ["hymba", "llama", "mamba", "samba", "concat", "subtract", "scalars"]
)
def test_importance_is_the_loss_of_a_model_with_these_weights_at_zero(
    plan: str, lively: Any, tiny: Any, text: Callable[..., Tensor]
) -> None:
    model = lively(tiny(plan), dtype=torch.float64)
    texts = {"a": text(11).tolist(), "b": text(8).tolist()}
    parts = [*branches(model.config), *list(single_heads(model.config))[::3]]
    ticks: list[int] = []
    found = importance(model, texts, parts, lambda: ticks.append(1))
    whole = whole_loss(model, texts)
    assert found["loss"] == pytest.approx(whole)
    assert len(ticks) == len(parts) == len(found["parts"])
    for part, row in zip(parts, found["parts"], strict=True):
        want = whole_loss(without(model, part), texts) - whole
        assert row["change"] == pytest.approx(want, abs=1e-9), part
    counts = {"a": 10, "b": 7}
    mean = sum(found["loss_by_text"][name] * n for name, n in counts.items()) / 17
    assert mean == pytest.approx(whole)


def test_magnitudes_of_text_rows_alone(lively: Any, tiny: Any, ids: list[int]) -> None:
    model = lively(tiny("hymba"), dtype=torch.float64)
    found, outs = Magnitudes(), []
    for one in (ids, ids[:8]):
        seen = next(iter(walk(model, [one])))
        found.add(seen, 3)
        outs.append(seen.outs["ssm"][3:])
    got = found.result()["ssm"]
    assert got["before"] == pytest.approx(float(torch.cat(outs).square().mean().sqrt()))
    norm = model.decoder.layers[0].mixer.ssm_norm(torch.cat(outs)).detach() / 2
    assert got["behind"] == pytest.approx(float(norm.square().mean().sqrt()))
    assert found.result()["attention"]["norm_weight"] > 0


def test_cka_sees_through_another_basis_and_not_through_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6).double()
    turn, _ = torch.linalg.qr(torch.randn(6, 6).double())
    assert sharing.cka(x, x @ turn + 3) == pytest.approx(1)
    assert sharing.cka(x, torch.randn(400, 6)) < 0.05
    assert sharing.cosine(x.view(400, 2, 3), -x.view(400, 2, 3)) == pytest.approx(-1)
    assert sharing.cosine(x.view(400, 2, 3), torch.ones(400, 3, 2)) is None


def test_keys_are_compared_without_their_positions(lively: Any, tiny: Any, ids: list[int]) -> None:
    """Turned back, a layer's key is what its projection gave; consumers have none of their own."""
    model = lively(tiny("hymba"))
    kv = sharing.KeysValues()
    _, road = start(model, [ids])
    x, _ = start(model, [ids])
    for seen in walk(model, [ids]):
        kv.add(seen, road.rope, 3)
        if seen.layer.owns_kv:
            block = model.decoder.layers[seen.number]
            rows = seen.mixer.in_proj(block.input_norm(x))
            first = seen.mixer.sizes["q"]
            key = rows[3:, first : first + seen.mixer.sizes["k"]].detach()
            got = kv.found[seen.number]["k"][0].flatten(1)
            torch.testing.assert_close(got, key, rtol=1e-4, atol=1e-4)
        x = seen.x
    found = kv.result()
    assert found["owners"] == model.config.kv_owners
    assert all(row[i] == pytest.approx(1) for i, row in enumerate(found["k"]["cka"]))
    assert len(found["v"]["chance"]) == len(found["owners"]) - 1
