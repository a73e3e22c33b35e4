"""The compiled step against the torch path over the same weights made wide: logits, what is written
to rings and pages, states; the same bits for any number of threads and beside any other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.config import Config, Layer
from hymba.engine.store import Store
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.ops.packed import Packed
from tests.engine.cpu.packing import Pair, copy_store, off, pair, prefill, store_for, torch_step
from tests.plans import plans

pytest.importorskip("numba")

from hymba.engine.cpu.program import Program, why_not  # noqa: E402
from hymba.ops.cpu.team import Team  # noqa: E402
from hymba.ops.cpu.tiles import packed_linear_int8_reference  # noqa: E402

EXACT = 3e-5  # of lively weights, whose errors grow from layer to layer
Lively = Callable[..., LanguageModel]
# Widths that are no multiple of anything: heads of 6 and 12, 5 states, 3 taps, a rank of 7.
ODD = {"hidden_size": 36, "vocab_size": 67, "num_heads": 6, "num_kv_heads": 3, "ssm_state": 5,
       "ssm_conv": 3, "ssm_dt_rank": 7, "intermediate_size": 70, "max_positions": 1024}  # fmt: skip


def odd_configs() -> dict[str, Config]:
    hybrid = Layer(window=9), Layer(window=9, kv_from=0), Layer(), Layer(mlp=False)
    plain = Layer(ssm=False), Layer(attention=False), Layer(ssm=False, window=300)
    wide = ODD | {"ssm_state": 20, "ssm_conv": 1, "ssm_conv_bias": False, "ssm_expand": 3}
    return {
        "odd": Config(layers=hybrid, meta_tokens=5, **ODD),
        "odd concat": Config(layers=hybrid, fusion="concat", tie_embeddings=False, **ODD),
        "odd relu2": Config(layers=plain, mlp_activation="relu2", meta_tokens=300, **ODD),
        "odd wide": Config(layers=hybrid[::2], fusion="subtract", meta_tokens=1, **wide),
        "heads of 16 and 32": Config(
            layers=hybrid, **ODD | {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2}
        ),
    }


CONFIGS = plans() | odd_configs()


@pytest.fixture(scope="module")
def made(lively: Lively) -> Callable[..., Pair]:
    pairs: dict[Any, Pair] = {}

    def make(name: str, scheme: str, but: Sequence[str] = ()) -> Pair:
        key = name, scheme, tuple(but)
        if key not in pairs:
            pairs[key] = pair(lively, CONFIGS[name], scheme, but)
        return pairs[key]

    return make


@pytest.fixture(scope="module")
def trio() -> Iterator[Team]:
    team = Team(3)
    yield team
    team.close()


def run(program: Program, ids: Tensor, slots: Sequence[int]) -> Tensor:
    """A step -> logits of one's own; lengths advance."""
    store = program.store
    lengths = torch.tensor([store.lengths[slot] for slot in slots])
    logits = program.step(ids, lengths, torch.tensor(slots)).clone()
    store.end_step(slots)
    return logits


def compare(
    ours: Program, wide: LanguageModel, twin: Store, batches: Sequence[Sequence[int]], most: float
) -> None:
    for slots in batches:
        ids = torch.randint(0, wide.config.vocab_size, (len(slots),))
        got, want = run(ours, ids, slots), torch_step(wide, twin, ids, slots)
        assert off(got, want) < most
    store = ours.store
    for mine, its in ((store.rings, twin.rings), (store.paged, twin.paged)):
        for x, y in zip(mine, its, strict=True):
            assert off(x, y) < max(most, 5e-3 if x.dtype == torch.bfloat16 else 0)
    for x, y in zip(store.states, twin.states, strict=True):
        assert off(x, y) < most


# Rows of 1, 3, 8 and 9, in any order, often enough for the windows to come round.
BATCHES = [[4], [2, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 8, 1, 7, 2, 6, 3, 5, 4], [4], [8, 4]] * 2


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_torch(name: str, scheme: str, made: Any, trio: Team) -> None:
    packed, wide = made(name, scheme)
    store, twin = store_for(wide, 9), store_for(wide, 9)
    assert why_not(packed, store) == ""
    # Two at borders of pages, one well behind, others just begun or not even that.
    prefill(wide, store, [250, 1, 8, 0, 254, 3, 520, 0, 12])
    copy_store(store, twin)
    compare(Program(packed, store, exact=True, by=trio), wide, twin, BATCHES, EXACT)


@pytest.mark.parametrize("name", ["hymba", "odd", "llama-meta"])
def test_keys_and_values_in_half_the_bytes(name: str, made: Any, trio: Team) -> None:
    packed, wide = made(name, "int8")
    store, twin = (store_for(wide, 9, torch.bfloat16) for _ in range(2))
    prefill(wide, store, [250, 1, 8, 0, 254, 3, 520, 0, 12])
    copy_store(store, twin)
    # A key may be rounded to its other neighbour.
    compare(Program(packed, store, exact=True, by=trio), wide, twin, BATCHES, 5e-3)


@pytest.mark.parametrize("name", ["hymba", "odd", "concat"])
def test_some_weights_stay_wide(name: str, made: Any, trio: Team) -> None:
    but = ("x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    packed, wide = made(name, "int4", but)
    store, twin = store_for(wide, 9), store_for(wide, 9)
    prefill(wide, store, [4, 0, 260])
    copy_store(store, twin)
    compare(Program(packed, store, exact=True, by=trio), wide, twin, BATCHES[:6], EXACT)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["hymba", "odd", "mamba", "llama"])
def test_activations_in_int8(
    name: str, scheme: str, made: Any, trio: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the slow twin of such products, in the torch path of the packed model. A number near
    the middle between two codes may become the other one."""
    packed, wide = made(name, scheme)
    store, twin = store_for(wide, 9), store_for(wide, 9)
    prefill(wide, store, [250, 1, 8])
    copy_store(store, twin)
    monkeypatch.setattr("hymba.ops.packed_linear", _int8)
    compare(Program(packed, store, exact=False, by=trio), packed, twin, BATCHES[:4], 2e-2)


def _int8(x: Tensor, packed: Packed) -> Tensor:
    return packed_linear_int8_reference(x, packed)


# ---- the same bits -------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["hymba", "odd concat", "samba"])
def test_threads_change_no_bit(name: str, exact: bool, made: Any) -> None:
    packed, wide = made(name, "int4")
    begin = store_for(wide, 9)
    prefill(wide, begin, [250, 1, 8, 0, 254, 3, 520, 0, 12])
    said = []
    for threads in (1, 2, 3, 8):
        store, team = store_for(wide, 9), Team(threads)
        copy_store(begin, store)
        program = Program(packed, store, exact, team)
        torch.manual_seed(0)
        for slots in BATCHES:
            ids = torch.randint(0, wide.config.vocab_size, (len(slots),))
            said.append(run(program, ids, slots))
        team.close()
    rounds = len(BATCHES)
    for step in range(rounds):
        for other in range(rounds, len(said), rounds):
            assert torch.equal(said[step], said[other + step])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["hymba", "odd"])
def test_a_row_is_alone(name: str, scheme: str, exact: bool, made: Any, trio: Team) -> None:
    """What stands beside a row changes no bit of it."""
    packed, wide = made(name, scheme)
    begin = store_for(wide, 9)
    prefill(wide, begin, [250, 1, 8, 0, 254, 3, 520, 0, 12])
    together, alone = store_for(wide, 9), store_for(wide, 9)
    copy_store(begin, together)
    copy_store(begin, alone)
    many, one = (Program(packed, x, exact, trio) for x in (together, alone))
    for slots in ([6, 4, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8], [4, 6]):
        ids = torch.randint(0, wide.config.vocab_size, (len(slots),))
        logits = run(many, ids, slots)
        for row, slot in enumerate(slots):
            assert torch.equal(run(one, ids[row : row + 1], [slot])[0], logits[row])
    for x, y in zip(
        (*together.states, *together.rings), (*alone.states, *alone.rings), strict=True
    ):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_nothing_else_is_written(made: Any, trio: Team) -> None:
    packed, wide = made("odd", "int4")
    store, before = store_for(wide, 9), store_for(wide, 9)
    prefill(wide, store, [250, 1, 8, 0, 254, 3, 520, 0, 12])
    copy_store(store, before)
    run(Program(packed, store, by=trio), torch.tensor([3]), [4])
    for x, y in zip((*store.rings, *store.states), (*before.rings, *before.states), strict=True):
        others = [slot for slot in range(store.slots) if slot != 4]
        assert torch.equal(x[:, others].nan_to_num(7), y[:, others].nan_to_num(7))
    for x, y in zip(store.paged, before.paged, strict=True):
        changed = (x.nan_to_num(7) != y.nan_to_num(7)).flatten(2).any(-1)  # (layers, pages)
        assert changed.sum(1).tolist() == [1] * len(x)


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 61, 2**40])
def test_a_token_that_is_none(token: int, made: Any, trio: Team) -> None:
    packed, wide = made("llama", "int8")
    program = Program(packed, store_for(wide, 2), by=trio)
    one = torch.tensor([0])
    with pytest.raises(UserError, match=rf"token id {token} is outside the vocabulary \(0 to 60\)"):
        program.step(torch.tensor([token]), one, one)


def test_what_is_left_to_torch(lively: Lively, made: Any) -> None:
    packed, wide = made("llama", "int8")
    store = store_for(wide, 2)
    assert "not packed" in why_not(wide, store)
    assert "bfloat16" in why_not(pair(lively, CONFIGS["llama"], "int8").packed.bfloat16(), store)
    hooked = pair(lively, CONFIGS["llama"], "int8").packed
    hooked.decoder.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "decoder.layers.1.mlp has hooks" in why_not(hooked, store)
    mixed = pair(lively, CONFIGS["llama"], "int8", but=["up_proj"]).packed
    assert "gate and up" in why_not(mixed, store)
    assert "packed as fp8" in why_not(pair(lively, CONFIGS["llama"], "fp8").packed, store)
    half = store_for(made("mamba", "int8").wide, 2)
    half.states = [x.half() for x in half.states]
    assert "states" in why_not(made("mamba", "int8").packed, half)
