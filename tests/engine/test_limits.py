"""How much an engine takes: what may be said, and what fits into the bytes that were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hymba.config import Config
from hymba.engine import Limits
from hymba.engine.limits import Room
from hymba.engine.store import Sizes, Store
from hymba.errors import UserError
from hymba.model.accounting import cache_bytes
from hymba.model.decoder import LanguageModel
from hymba.presets import preset

CPU = torch.device("cpu")
Tiny = Callable[[str], Config]


def room(config: Config, dtype: torch.dtype = torch.float32, **limits: Any) -> Room:
    return Room.of(config, Limits(**limits), CPU, dtype)


@pytest.mark.parametrize("name", [x for x in Limits.__dataclass_fields__ if x != "kv_dtype"])
@pytest.mark.parametrize("value", [-1, 1.5, "8", True, None])
def test_limits_are_whole_numbers(name: str, value: Any) -> None:
    if name == "prefix_bytes" and value is None:
        return
    with pytest.raises(UserError, match=f"{name} must be a whole number"):
        Limits(**{name: value})


def test_a_sequence_has_room_for_an_answer() -> None:
    with pytest.raises(UserError, match="max_tokens must be 2 or more"):
        Limits(max_tokens=1)


def test_a_queue_holds_somebody() -> None:
    """An engine that nobody may wait for would refuse everything."""
    with pytest.raises(UserError, match="queue must be 1 or more"):
        Limits(queue=0)


def test_what_is_chosen_without_being_asked(tiny: Tiny) -> None:
    found = room(tiny("hymba"))
    assert (found.sequences, found.max_tokens, found.step_tokens) == (16, 512, 512)
    assert found.pages == 16 * (2 + 2)  # none is ever short
    assert found.prefix_bytes > 0
    assert room(tiny("hymba"), prefix_bytes=0).prefix_bytes == 0


def test_a_step_serves_every_sequence(tiny: Tiny) -> None:
    assert room(tiny("mamba"), max_sequences=40, step_tokens=8).step_tokens == 40


def test_no_more_positions_than_the_model_has(tiny: Tiny) -> None:
    assert room(tiny("llama"), max_tokens=10_000).max_tokens == 512
    assert room(tiny("llama"), max_tokens=300).max_tokens == 300


@pytest.mark.parametrize("plan", ["hymba", "hymba-no-meta", "llama", "mamba", "samba"])
@pytest.mark.parametrize("positions", [256, 512, 3000, 8192])
def test_the_bytes_are_kept_and_enough(tiny: Tiny, plan: str, positions: int) -> None:
    """Never more than was given; and what the message says is needed is enough."""
    config = replace(tiny(plan), max_positions=positions)
    with pytest.raises(UserError, match="one sequence needs at least") as caught:
        room(config, cache_bytes=1)
    least = int(str(caught.value).split("at least ")[1].split(":")[0])
    with pytest.raises(UserError, match="one sequence needs at least"):
        room(config, cache_bytes=least - 1)
    for more in (0, 1, 1000, 10**5, 10**6, 10**7):
        found = room(config, cache_bytes=least + more)
        assert found.cache_bytes <= least + more
        assert 1 <= found.sequences <= 16
        assert found.max_tokens <= positions and (found.pages >= 1) == bool(found.sizes.page)
        if found.sizes.page:
            assert found.max_tokens <= found.pages * found.block


def test_one_page_short_is_one_page_less(tiny: Tiny) -> None:
    config = tiny("llama")
    whole = room(config, max_sequences=1).cache_bytes
    given = room(config, max_sequences=1, cache_bytes=whole)
    assert given.cache_bytes == whole
    less = room(config, max_sequences=1, cache_bytes=whole - 1)
    assert less.pages == given.pages - 1


def test_a_sequence_of_the_released_model() -> None:
    """At 8192 tokens, bfloat16 with float32 states: what `hymba info` says, in slot and pages."""
    config = preset("hymba-1.5b")
    sizes = Sizes.of(config, 8192, kv_bytes=2, state_bytes=4)
    total = sizes.slot + 8192 // 256 * sizes.page
    assert total == cache_bytes(config, 8192)["total"] < 86e6
    found = room(config, torch.bfloat16, max_sequences=4, cache_bytes=2**30)
    assert found.sizes == sizes


def test_rings_of_short_sequences_are_short(tiny: Tiny) -> None:
    """With pages for 256 tokens a window of 300 has no use for 301 places, and is not given them;
    the bytes that were announced had them."""
    config = tiny("hymba")
    layers = [replace(layer, window=layer.window and 300) for layer in config.layers]
    config = replace(config, layers=tuple(layers))
    whole = room(config, max_sequences=1)
    found = room(config, cache_bytes=2 * whole.sizes.slot + 3 * whole.sizes.page)
    assert (found.pages, found.max_tokens) == (1, 256)
    assert found.sizes == Sizes.of(config, 256, kv_bytes=4, state_bytes=4)
    assert found.sizes.slot < whole.sizes.slot and found.sizes.page == whole.sizes.page
    model = LanguageModel(config)
    store = Store(config, 1, 1, 256, model.decoder.meta_states(), torch.zeros(1))
    assert store.nbytes()["total"] == found.cache_bytes


def test_narrow_keys_and_values(tiny: Tiny) -> None:
    """K/V alone: a layer without them is as large as before; and more sequences fit."""
    config = tiny("hymba")
    wide, narrow = room(config), room(config, kv_dtype="bfloat16")
    assert (wide.kv_dtype, narrow.kv_dtype) == (None, torch.bfloat16)
    assert narrow.sizes.page * 2 == wide.sizes.page
    found = cache_bytes(config, 512, kv_bytes=4)
    assert narrow.sizes.slot == found["window_kv"] // 2 + found["conv"] + found["ssm"]
    assert room(config, kv_dtype="float32").kv_dtype is None
    assert room(tiny("mamba"), kv_dtype="bfloat16").sizes == room(tiny("mamba")).sizes


def test_what_keys_and_values_may_be(tiny: Tiny) -> None:
    for bad in ("int8", "float16", 16):
        with pytest.raises(UserError, match="kv_dtype must be bfloat16 or float32"):
            Limits(kv_dtype=bad)  # type: ignore[arg-type]
    limits, cuda = Limits(kv_dtype="bfloat16", cache_bytes=1 << 30), torch.device("cuda")
    with pytest.raises(UserError, match="on a GPU"):
        Room.of(tiny("hymba"), limits, cuda, torch.float32)
    assert Room.of(tiny("hymba"), limits, cuda, torch.bfloat16).kv_dtype is None
