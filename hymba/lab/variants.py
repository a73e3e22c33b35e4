"""The architectures that are compared: each is the base plus one line, fitted to one budget.

The budget is the base's parameters in all, embedding included, as in the paper ("same number of
layers, same total parameters"); it is met by the width of the MLP, or by the hidden size where
there is no MLP. So depth, heads, vocabulary and (but for Mamba) hidden size are equal.

    a   paper tables 3 and 9: the architectures      b   tables 1 and 10: the ladder, the ablations
    c   what later work suggests

Where our decoder cannot say what the paper did, `about` says what is done instead: heads always
fill the hidden size here, so attention's share is changed by K/V heads and by layers. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hymba import presets
from hymba.config import Config
from hymba.lab.sizes import Shape, named
from hymba.model.accounting import fit, parameters

BASE = "hymba"
MAMBAS_DT = (0.001, 0.1)
TOLERANCE = 0.05  # reached by the smallest models only; real sizes meet the budget within 1.5 %
Change = dict[str, Any]  # keys of presets.hymba that differ; a function is called with the shape
Plan = Callable[..., Config]


@dataclass(frozen=True)
class Variant:
    name: str
    group: str
    about: str
    paper: str  # where the paper has it
    plan: Callable[[Shape, Change], Config]
    by_hidden_size: bool = False
    normalize: bool = False  # weights to unit norm after each step
    dt: tuple[float, float] | None = None  # between which the SSM's steps start; None: as released

    def config(self, shape: Shape, vocab_size: int) -> Config:
        """Fitted to the base's parameters."""
        own = {"vocab_size": vocab_size, "max_positions": shape.max_positions}
        if self.name == BASE:
            return self.plan(shape, own)
        budget = parameters(VARIANTS[BASE].config(shape, vocab_size))["total"]
        key = "hidden_size" if self.by_hidden_size else "intermediate_size"
        # Hidden sizes need finer steps: parameters grow with their square.
        step = max(2, shape.multiple // 4) if self.by_hidden_size else shape.multiple
        plan = self.plan
        return fit(lambda width: plan(shape, own | {key: width}), budget, step, TOLERANCE)


def hybrid(**change: Any) -> Callable[[Shape, Change], Config]:
    """The base with some keys changed."""

    def plan(shape: Shape, own: Change) -> Config:
        changed = {k: v(shape) if callable(v) else v for k, v in change.items()}
        keys = sizes(shape) | {"window": shape.window, "meta_tokens": shape.meta_tokens}
        return presets.hymba(**(keys | own | changed))

    return plan


def attention_only(compressed: bool = False) -> Callable[[Shape, Change], Config]:
    def plan(shape: Shape, own: Change) -> Config:
        how: Change = {"window": shape.window, "share": True} if compressed else {}
        return presets.llama(**(sizes(shape) | own | how))

    return plan


def ssm_only(mlp: bool = False, meta: bool = False) -> Callable[[Shape, Change], Config]:
    def plan(shape: Shape, own: Change) -> Config:
        keys: Change = {"hidden_size": shape.hidden_size, "ssm_state": shape.ssm_state}
        keys |= {"meta_tokens": shape.meta_tokens} if meta else {}
        return presets.mamba(num_layers=shape.num_layers, mlp=mlp, **(keys | own))

    return plan


def by_turns(windowed: bool) -> Callable[[Shape, Change], Config]:
    def plan(shape: Shape, own: Change) -> Config:
        return presets.sequential(window=shape.window if windowed else None, **(sizes(shape) | own))

    return plan


def sizes(shape: Shape) -> Change:
    keys = "hidden_size num_layers num_heads num_kv_heads intermediate_size ssm_state"
    return {key: getattr(shape, key) for key in keys.split()}


def every(step: int) -> Callable[[Shape], list[int]]:
    return lambda shape: list(range(0, shape.num_layers, step))


def away_from_ends(shape: Shape) -> tuple[int, ...]:
    return presets.scattered(shape.num_layers, min(3, shape.num_layers - 2))


FULL: Change = {"window": None, "share": False, "meta_tokens": 0}  # tables 1 and 10, row B / 5

_ALL = (
    # a: who is compared
    Variant("hymba", "a", "the base: parallel heads, three layers see everything, the others share"
            " K/V through a window, meta tokens", "tab. 1 E, 9, 10 row 13", hybrid()),
    Variant("llama", "a", "attention only", "tab. 9, 10 row 6", attention_only()),
    Variant("mamba", "a", "SSM only, no MLP; fitted by hidden size", "tab. 9, 10 row 1", ssm_only(),
            by_hidden_size=True),
    Variant("mamba-mlp", "a", "SSM and MLP", "tab. 9", ssm_only(mlp=True)),
    Variant("samba", "a", "SSM, MLP, window attention, MLP by turns", "tab. 9", by_turns(True)),
    # b: the ladder up to the base
    Variant("sequential", "b", "SSM and full attention by turns (A)", "tab. 1 A", by_turns(False)),
    Variant("parallel", "b", "side by side, all layers see everything (B)", "tab. 10 row 5",
            hybrid(**FULL)),
    Variant("local-global", "b", "B + windows but in three layers (C)", "tab. 10 row 8",
            hybrid(**FULL | {"window": lambda s: s.window})),
    Variant("shared", "b", "C + K/V shared by neighbours (D); the base is D + meta tokens",
            "tab. 10 row 9", hybrid(meta_tokens=0)),
    # b: what was tried beside it
    Variant("all-window", "b", "B with windows everywhere", "tab. 10 row 7",
            hybrid(**FULL | {"window": lambda s: s.window, "global_layers": ()})),
    Variant("concat", "b", "D, heads joined side by side instead of averaged", "tab. 10 row 11",
            hybrid(meta_tokens=0, fusion="concat")),
    Variant("more-attention", "b", "B, as many K/V heads as heads", "tab. 10 row 4",
            hybrid(**FULL | {"num_kv_heads": lambda s: s.num_heads})),
    Variant("half-attention", "b", "B, attention heads in every 2nd layer (the paper: fewer heads)",
            "tab. 10 row 3", hybrid(**FULL | {"attention_layers": every(2)})),
    Variant("quarter-attention", "b", "B, attention heads in every 4th layer (paper: fewer heads)",
            "tab. 10 row 2", hybrid(**FULL | {"attention_layers": every(4)})),
    Variant("llama-compressed", "b", "attention only, the base's windows and shared K/V",
            "tab. 10 row 10", attention_only(compressed=True)),
    Variant("mamba-meta", "b", "Mamba + meta tokens", "tab. 10 row 12", ssm_only(meta=True),
            by_hidden_size=True),
    # c: later work
    Variant("subtract", "c", "the base, fused by difference", "FAIR, 2510.04800",
            hybrid(fusion="subtract")),
    Variant("scalars", "c", "the base, fused with a learned scalar a branch", "FAIR, 2510.04800",
            hybrid(fusion="scalars")),
    Variant("normalized", "c", "the base, weights to unit norm after each step",
            "Nemotron-Flash, 2511.18890", hybrid(), normalize=True),
    Variant("scattered", "c", "the base, its three far-seeing layers away from the ends",
            "FAIR, 2510.04800",
            hybrid(global_layers=away_from_ends)),
    Variant("more-meta", "c", "the base with twice the meta tokens (256 where it has 128)",
            "Nemotron-Flash, 2511.18890", hybrid(meta_tokens=lambda s: 2 * s.meta_tokens)),
    Variant("own-dt", "c", "the base, the SSM's dt starts as Mamba's own (0.001 to 0.1, not 0.69)",
            "Mamba, 2312.00752", hybrid(), dt=MAMBAS_DT),
    Variant("mamba-own-dt", "c", "Mamba, its steps start as its own", "Mamba, 2312.00752",
            ssm_only(), by_hidden_size=True, dt=MAMBAS_DT),
    Variant("two-global", "c", "the base, only the first and the last layer see everything",
            "Nemotron-Flash, 2511.18890", hybrid(global_layers=lambda s: (0, s.num_layers - 1))),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}
GROUPS = {"a": "architectures", "b": "the ladder and its ablations", "c": "later work"}


def chosen(names: tuple[str, ...]) -> list[Variant]:
    """Those named, or those of the groups named, in the table's order; all if none is."""
    wanted: set[str] = set()
    for name in names:
        if name in GROUPS:
            wanted.update(v.name for v in _ALL if v.group == name)
        else:
            wanted.add(named("variant", name, VARIANTS).name)
    return [variant for variant in _ALL if not names or variant.name in wanted]
