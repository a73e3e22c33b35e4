"""The comparison is controlled: one budget, everything else equal but the line that differs."""

import dataclasses

import pytest

from hymba.config import Config
from hymba.lab.sizes import SIZES, LabError, Size, size_named
from hymba.lab.variants import BASE, GROUPS, VARIANTS, Variant, chosen
from hymba.model.accounting import parameters

VOCABULARY = 16384
REAL = [size for size in SIZES.values() if size.decides]
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=lambda size: size.name)
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)


def config(variant: str, size: Size) -> Config:
    return VARIANTS[variant].config(size.shape, size.vocab_size)


@each_size
@each_variant
def test_every_variant_meets_the_budget(variant: Variant, size: Size) -> None:
    budget = parameters(config(BASE, size))["total"]
    slack = 0.015 if size.decides else 0.05
    assert abs(parameters(config(variant.name, size))["total"] / budget - 1) < slack
    recall = variant.config(size.recall_shape, 1096), VARIANTS[BASE].config(size.recall_shape, 1096)
    ours, theirs = (parameters(one)["total"] for one in recall)
    assert abs(ours / theirs - 1) < (0.02 if size.decides else 0.05)


@each_variant
def test_nothing_else_differs(variant: Variant) -> None:
    """Whatever a variant is not about is the base's: sizes, init, positions, norms."""
    base, ours = config(BASE, SIZES["20m"]), config(variant.name, SIZES["20m"])
    free = {"layers", "intermediate_size", "meta_tokens", "fusion", "num_kv_heads", "ssm_dt_rank"}
    free |= {"hidden_size"} if variant.by_hidden_size else set()
    free |= set() if any(x.attention for x in ours.layers) else {"num_heads"}  # it has none
    for field in dataclasses.fields(Config):
        if field.name not in free:
            assert getattr(ours, field.name) == getattr(base, field.name), field.name
    assert ours.num_layers == base.num_layers


def drawn(name: str) -> str:
    """One letter a layer: as docs/lab.md says."""
    letters = []
    for layer in config(name, SIZES["20m"]).layers:
        letter = "s" if not layer.attention else "h" if layer.ssm else "a"
        letters.append(letter.upper() if layer.attention and layer.window is None else letter)
    return "".join(letters)


def test_the_plans_are_the_papers() -> None:
    assert drawn("hymba") == "HhhhhHhhhhhH" == drawn("shared") == drawn("local-global")
    assert drawn("llama") == "A" * 12 and drawn("mamba") == drawn("mamba-mlp") == "s" * 12
    assert drawn("samba") == "sa" * 6 and drawn("sequential") == "sA" * 6
    assert drawn("parallel") == drawn("more-attention") == "H" * 12
    assert drawn("all-window") == "h" * 12 and drawn("llama-compressed") == "AaaaaAaaaaaA"
    assert drawn("half-attention") == "Hs" * 6 and drawn("quarter-attention") == "Hsss" * 3
    assert drawn("scattered")[0] == drawn("scattered")[-1] == "h"
    assert drawn("scattered").count("H") == 3 and drawn("two-global").count("H") == 2


def test_each_rung_adds_one_thing() -> None:
    """Table 1: B, C, D, E differ by windows, sharing, meta tokens, one after the other."""
    rungs = "parallel", "local-global", "shared", BASE
    b, c, d, e = (config(name, SIZES["20m"]) for name in rungs)
    assert {x.window for x in b.layers} == {None} and not any(x.kv_from for x in b.layers)
    assert [x.window for x in c.layers] == [x.window for x in d.layers]
    assert not any(x.kv_from for x in c.layers) and any(x.kv_from for x in d.layers)
    assert d.layers == e.layers and (d.meta_tokens, e.meta_tokens) == (0, 128)
    owners = [config(name, SIZES["20m"]) for name in ("shared", "llama-compressed")]
    assert owners[0].kv_owners == owners[1].kv_owners
    assert config("more-meta", SIZES["20m"]).meta_tokens == 256
    assert VARIANTS["normalized"].normalize and config("normalized", SIZES["20m"]) == e
    for name, fusion in {"concat": "concat", "subtract": "subtract", BASE: "mean"}.items():
        assert config(name, SIZES["20m"]).fusion == fusion


@each_size
def test_every_size_has_something_to_share(size: Size) -> None:
    """The first toy had one window layer, and its rungs C and D were the same model."""
    for shape in (size.shape, size.recall_shape):
        layers = VARIANTS[BASE].config(shape, size.vocab_size).layers
        assert any(layer.kv_from is not None for layer in layers)
        assert 3 == sum(layer.window is None for layer in layers) <= len(layers) / 2


def test_mamba_has_no_mlp_and_no_attention() -> None:
    for name in ("mamba", "mamba-meta"):
        layers = config(name, SIZES["35m"]).layers
        assert not any(layer.attention or layer.mlp for layer in layers)


@pytest.mark.parametrize("size", REAL, ids=lambda size: size.name)
def test_sizes_are_what_they_say(size: Size) -> None:
    said = float(size.about.split()[0])
    assert abs(parameters(config(BASE, size))["total"] / 1e6 - said) < 0.5
    assert size.shape.window < size.language.sequence_length
    assert 4 * size.recall.sequence_length <= size.recall_shape.max_positions
    assert 4 * size.recall_shape.window <= size.recall.sequence_length
    if "200 M" in size.about:
        assert abs(size.language.tokens / 2e8 - 1) < 0.001


def test_names_are_chosen_in_the_tables_order() -> None:
    assert [v.name for v in chosen(("mamba", "hymba"))] == ["hymba", "mamba"]
    assert len(chosen(())) == len(VARIANTS) == sum(len(chosen((group,))) for group in GROUPS)
    with pytest.raises(LabError, match="did you mean llama"):
        chosen(("lama",))
    with pytest.raises(LabError, match="there is no size"):
        size_named("70b")
