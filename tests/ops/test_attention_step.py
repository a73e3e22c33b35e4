"""Attention over pages: the fast forms against the slow one, which places are seen, which read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba import ops
from hymba.ops import Meta
from hymba.ops.attention_step import attention_step, attention_step_reference

module = import_module("hymba.ops.attention_step")  # not the function of the same name
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def pages_of(
    counts: tuple[int, ...],
    size: int,
    meta: int,
    heads: tuple[int, int] = (6, 2),
    widths: tuple[int, int] = (8, 12),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    columns: int | None = None,
) -> dict[str, Any]:
    """Rows whose pages lie in any order in a store that is a view of a larger one. What no row may
    read is NaN; what the table has behind a row's pages is no page at all."""
    (query, groups), rows = heads, len(counts)
    generator = torch.Generator().manual_seed(size + sum(counts))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    needed = [-(-count // size) for count in counts]
    columns = max([*needed, 1]) if columns is None else columns
    pages = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    table = torch.full((rows, columns), 2**30, dtype=torch.int32)
    stores = [torch.full((len(pages), groups, size + 3, width), float("nan")) for width in widths]
    for row, count in enumerate(counts):
        for i in range(needed[row]):
            table[row, i] = page = pages.pop()
            held = min(size, count - i * size)
            for store, width in zip(stores, widths, strict=True):
                store[page, :, :held] = random(groups, held, width)
    q = random(rows, query * widths[0] + 5)[:, :-5].to(device, dtype)  # a slice, as in a model
    keys, values = (random(meta, groups, width).to(device, dtype) for width in widths)
    return {
        "q": q.unflatten(1, (query, widths[0])),
        "store_k": stores[0].to(device, dtype)[:, :, :size],
        "store_v": stores[1].to(device, dtype)[:, :, :size],
        "table": table.to(device),
        "counts": torch.tensor(counts, dtype=torch.int32, device=device),
        "most": max(counts),
        "meta": Meta(keys, values) if meta else None,
    }


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, roundings of the inputs included."""
    double = {name: given[name].double() for name in ("q", "store_k", "store_v")}
    return given | double | {"meta": given["meta"] and Meta(*(x.double() for x in given["meta"]))}


def check(got: Tensor, given: dict[str, Any]) -> None:
    want = attention_step_reference(**in_float64(given))
    assert got.dtype == given["q"].dtype and got.shape == want.shape
    assert torch.isfinite(got).all() and torch.isfinite(want).all()
    allowed = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}[got.dtype]
    assert (got.double() - want).norm() <= allowed * want.norm()


# counts, places of a page
ROWS = [
    ((0, 1, 16, 17, 40, 33), 16),
    ((5, 0, 7, 64), 64),
    ((3, 9, 1), 3),
    ((0, 0), 4),
]


@pytest.mark.parametrize("form", ["by row", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize(("counts", "size"), ROWS, ids=str)
def test_same(
    counts: tuple[int, ...],
    size: int,
    meta: int,
    dtype: torch.dtype,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU rows are taken one at a time, on a device all at once."""
    if form == "gathered":
        monkeypatch.setattr(module, "_by_row", module._gathered)
    given = pages_of(counts, size, meta, dtype=dtype)
    check(attention_step(**given), given)
    given["most"] += 9 if given["table"].shape[1] * size >= given["most"] + 9 else 0
    check(attention_step(**given), given)


@pytest.mark.parametrize("heads", [(25, 5), (8, 8), (1, 1)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    given = pages_of((4, 9), 8, 3, heads=heads, widths=(16, 32))
    check(attention_step(**given), given)


@pytest.mark.parametrize("form", [attention_step, attention_step_reference])
def test_nothing_to_see_is_zero(form: Any) -> None:
    assert form(**pages_of((0, 0), 4, 0)).eq(0).all()


def test_no_rows() -> None:
    given = pages_of((3,), 4, 2)
    given |= {name: given[name][:0] for name in ("q", "table", "counts")}
    assert attention_step(**given).shape == (0, 6, 12)


def test_the_door() -> None:
    given = pages_of((3, 4), 4, 2)
    check(ops.attention_step(**given), given)
    for name, wrong in (
        ("table", given["table"][:1]),
        ("counts", given["counts"][:1]),
        ("store_v", given["store_v"][:1]),
        ("most", 5),
        ("meta", Meta(given["meta"].k[:, :1], given["meta"].v)),
    ):
        with pytest.raises(ValueError, match=f"attention_step: {name}"):
            ops.attention_step(**given | {name: wrong})
