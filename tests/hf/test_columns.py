"""The border between padded or packed columns and flat rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.hf.columns import Columns, InputError, read
from hymba.ops import IGNORE

CPU = torch.device("cpu")
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])  # left padding; a hole and right padding
POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])
EDGES = torch.tensor([0, 3, 5], dtype=torch.int32)
INDEX = torch.tensor([[0, 0, 0, 1, 1]])


def of(*shape: int, **border: Any) -> Columns:
    edges = border.pop("edges", None)
    return read(*shape, CPU, cu_seq_lens=(edges, edges), **border)


def test_padding_is_stripped_and_put_back() -> None:
    columns = of(2, 5, attention_mask=MASK)
    x = torch.arange(1.0, 11.0).view(2, 5, 1)
    assert (columns.lengths, columns.owners) == ((3, 3), (0, 1))
    assert columns.flat(x).flatten().tolist() == [3, 4, 5, 6, 7, 9]
    spread = columns.spread(columns.flat(x), torch.tensor([[-1.0], [-2.0]]))
    # Padding shows the last text before it, or what was given where there is none.
    assert spread[..., 0].tolist() == [[-1, -1, 3, 4, 5], [6, 7, 7, 9, 9]]


def test_no_padding_costs_nothing() -> None:
    columns = of(2, 5, attention_mask=torch.ones(2, 5))
    x = torch.randn(2, 5, 3)
    assert columns.text is None
    assert columns.flat(x).data_ptr() == x.data_ptr()
    torch.testing.assert_close(columns.spread(columns.flat(x), x[:, 0]), x)


def test_targets_stay_inside_a_sequence() -> None:
    labels = torch.arange(10).view(2, 5)
    padded = of(2, 5, attention_mask=MASK).targets(labels)
    no = IGNORE
    assert padded.tolist() == [[no, no, 3, 4, no], [6, 8, no, no, no]]
    packed = of(1, 5, position_ids=POSITIONS).targets(labels[:1])
    assert packed.tolist() == [[1, 2, no, 4, no]]


@pytest.mark.parametrize(
    "border",
    [
        {"position_ids": POSITIONS},
        {"edges": EDGES},
        {"seq_idx": INDEX},
        {"position_ids": POSITIONS, "edges": EDGES, "seq_idx": INDEX},
    ],
    ids=lambda border: "+".join(border),
)
def test_packed_documents_become_segments(border: dict[str, Tensor]) -> None:
    columns = of(1, 5, **border)
    assert (columns.lengths, columns.owners) == ((3, 2), (0, 0))


def test_documents_of_one_token_and_padding_to_a_multiple() -> None:
    """Collators fill up with position 0: each such column is a document of its own."""
    columns = of(1, 6, position_ids=torch.tensor([[0, 0, 1, 2, 0, 0]]))
    assert columns.lengths == (1, 3, 1, 1)


def test_packed_rows_of_a_padded_batch() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    columns = of(2, 5, attention_mask=mask, position_ids=positions)
    assert (columns.lengths, columns.owners) == ((2, 3, 3), (0, 0, 1))


def test_continuation_counts_from_the_past() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    positions = torch.tensor([[1, 2, 3], [0, 0, 0]])
    columns = of(2, 3, attention_mask=mask, position_ids=positions, past=[1, 0], cached_columns=2)
    assert (columns.lengths, columns.owners) == ((3, 1), (0, 1))


def test_a_chunk_may_hold_only_padding_of_a_row() -> None:
    columns = of(2, 2, attention_mask=torch.tensor([[0, 0], [1, 1]]), past=[0, 0])
    assert (columns.lengths, columns.owners) == ((2,), (1,))


REFUSED: dict[str, dict[str, Any]] = {
    "is empty": {"shape": (1, 0)},
    "row 1 is all padding": {"shape": (2, 2), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
    "got \\(1, 4\\)": {"attention_mask": torch.ones(1, 4)},
    "got \\(1, 1, 5, 5\\)": {"attention_mask": torch.ones(1, 1, 5, 5)},
    "hold 0 and 1": {"attention_mask": torch.tensor([[1, 1, 2, 2, 2]])},
    "text tokens are in the cache": {
        "shape": (1, 1),
        "attention_mask": torch.ones(1, 3),
        "past": [1],
        "cached_columns": 2,
    },
    "position_ids of row 0": {"position_ids": torch.tensor([[1, 2, 3, 4, 5]])},
    "do not count": {"position_ids": torch.tensor([[0, 1, 2, 1, 2]])},
    "count its text": {  # counted over the padding
        "attention_mask": MASK[:1],
        "position_ids": torch.arange(5)[None],
    },
    "must be \\(1, 5\\)": {"position_ids": torch.arange(6)[None]},
    "must rise": {"edges": torch.tensor([0, 3, 4])},
    "row without padding": {"edges": EDGES, "attention_mask": MASK[:1]},
    "cu_seq_lens_q and seq_idx disagree": {
        "edges": EDGES,
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1]]),
    },
    "seq_idx must be": {"seq_idx": INDEX[0]},
    "cannot go into a cache": {"position_ids": POSITIONS, "past": [0]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused_in_one_line(message: str) -> None:
    border = dict(REFUSED[message])
    with pytest.raises(InputError, match=message) as caught:
        of(*border.pop("shape", (1, 5)), **border)
    assert "\n" not in str(caught.value)
