"""The border: transformers' padded (batch, column) tensors in, our flat rows out, and back.

    attention_mask   0 0 1 1 1          rows   a a a b b b b b
                     1 1 1 1 1                 segment 0: 3 new tokens, segment 1: 5

    position_ids     0 1 2 0 1          rows   a a a b b
                                               two packed documents: segments of 3 and 2

Inside there is no padding (each row becomes a segment without it) and a packed document is a
segment like any other. On the way back a padding column shows what the last text token before it
left (zeros where there is none): the state has not moved on, so `logits[:, -1]` is right for
right-padded prompts too.

Everything here happens on the host: whoever steps a model needs the lengths there anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.ops import IGNORE


class InputError(UserError):
    """Input of a forward that cannot be honoured; the message says which and what to do."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a (B, T) batch hold text, and the segments that the text falls into."""

    batch: int
    width: int
    text: Tensor | None  # (B, T) bool on the model's device; None: every column is text
    lengths: tuple[int, ...]  # new tokens of each segment
    owners: tuple[int, ...]  # batch row of each segment; a row without new text has none

    @staticmethod
    def of(text: Tensor, device: torch.device, starts: Tensor | None = None) -> Columns:
        """From a (B, T) bool of text columns; `starts` marks further documents inside a row."""
        text = text.cpu()
        begins = text & (text.long().cumsum(1) == 1)  # the row's first text column
        if starts is not None:
            begins = begins | starts
        first = begins[text].nonzero().flatten()  # the segments' first rows
        ends = torch.cat((first[1:], text.sum().view(1)))
        owners = torch.arange(len(text))[:, None].expand_as(text)[text][first]
        return Columns(
            text.shape[0],
            text.shape[1],
            None if bool(text.all()) else text.to(device),
            tuple((ends - first).tolist()),
            tuple(owners.tolist()),
        )

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...): only the text, row after row."""
        return x.flatten(0, 1) if self.text is None else x[self.text]

    def spread(self, rows: Tensor, before: Tensor) -> Tensor:
        """(N, D) back to (B, T, D). `before` (B, D) fills columns with no text before them."""
        if self.text is None:
            return rows.view(self.batch, self.width, -1)
        seen = self.text.long().cumsum(1)  # (B, T) text so far in this row
        offset = seen[:, -1:].cumsum(0) - seen[:, -1:]  # (B, 1) text of the rows above
        empty = torch.arange(self.batch, device=seen.device)[:, None].expand_as(seen)
        index = torch.where(seen > 0, self.batch + offset + seen - 1, empty)  # (B, T)
        return torch.cat((before.to(rows.dtype), rows))[index]

    def targets(self, labels: Tensor) -> Tensor:
        """(B, T) labels to (B, T) targets: what each text token must predict, else -100.

        Shifted inside a segment, so nothing is predicted across packed documents or by padding.
        """
        if labels.shape != (self.batch, self.width):
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, the input ({self.batch}, {self.width})"
            )
        shifted = self.flat(labels).roll(-1)
        ends = torch.tensor(self.lengths, device=labels.device).cumsum(0) - 1
        shifted[ends] = IGNORE
        if self.text is None:
            return shifted.view(self.batch, self.width)
        return torch.full_like(labels, IGNORE).masked_scatter(self.text, shifted)


def read(
    batch: int,
    width: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Sequence[Tensor | None] = (),
    seq_idx: Tensor | None = None,
    past: Sequence[int] | None = None,
    cached_columns: int = 0,
) -> Columns:
    """Columns of one forward; `past` are the text tokens each row has in the cache (None: no
    cache) and `cached_columns` the columns that went into it. Raises InputError."""
    if batch == 0 or width == 0:
        raise InputError("the input is empty: a prompt needs at least one token")
    text = _text(attention_mask, batch, width, past, cached_columns)
    if past is None and not bool(text.any(1).all()):
        row = int(text.any(1).logical_not().nonzero()[0])
        raise InputError(f"row {row} is all padding: a prompt needs at least one token")
    starts = _document_starts(text, position_ids, cu_seq_lens, seq_idx, past)
    columns = Columns.of(text, device, starts)
    if past is not None and len(set(columns.owners)) < len(columns.owners):
        raise InputError("packed documents cannot go into a cache: pass use_cache=False")
    return columns


def _text(
    mask: Tensor | None, batch: int, width: int, past: Sequence[int] | None, cached: int
) -> Tensor:
    """(B, T) bool: the new columns that hold text."""
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != (batch, cached + width):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask must be ({batch}, {cached + width}): batch rows, and {cached} columns"
            f" in the cache plus {width} new ones; got {shape}"
        )
    mask = mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask must hold 0 and 1 (packed documents: use position_ids)")
    counts = mask[:, :cached].sum(1).tolist()
    if past is not None and [int(count) for count in counts] != list(past):
        raise InputError(
            f"attention_mask says {counts} text tokens are in the cache, which holds {list(past)}"
        )
    return mask[:, cached:].bool()


def _document_starts(
    text: Tensor,
    position_ids: Tensor | None,
    cu_seq_lens: Sequence[Tensor | None],
    seq_idx: Tensor | None,
    past: Sequence[int] | None,
) -> Tensor:
    """(B, T) bool: where documents begin, as far as any input says so; all must say the same."""
    said: list[tuple[str, Tensor]] = []
    if position_ids is not None:
        said.append(("position_ids", _starts_of_positions(position_ids, text, past)))
    for name, boundaries in zip(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seq_lens, strict=False):
        if boundaries is not None:
            said.append((name, _starts_of_boundaries(name, boundaries, text)))
    if seq_idx is not None:
        said.append(("seq_idx", _starts_of_indices(seq_idx, text)))
    for name, starts in said[1:]:
        if not torch.equal(starts, said[0][1]):
            raise InputError(f"{said[0][0]} and {name} disagree on where documents begin")
    return said[0][1] if said else torch.zeros_like(text)


def _starts_of_positions(position_ids: Tensor, text: Tensor, past: Sequence[int] | None) -> Tensor:
    """Positions must count the text of a row from its past on; a return to 0 is a new document."""
    if position_ids.dim() != 2 or position_ids.shape[1] != text.shape[1]:
        raise InputError(
            f"position_ids must be {tuple(text.shape)}, got {tuple(position_ids.shape)}"
        )
    positions = position_ids.cpu().expand_as(text)
    begin = torch.tensor(past if past is not None else [0] * len(text))[:, None]
    rows = torch.arange(len(text))[:, None].expand_as(text)[text]
    flat, base = positions[text], begin.expand_as(text)[text]
    is_first = rows.diff(prepend=torch.tensor([-1])) != 0
    follows = torch.where(is_first, flat == base, flat == flat.roll(1) + 1)
    restarts = ~is_first & (flat == 0)
    if not bool((follows | restarts).all()):
        row = int(rows[(~(follows | restarts)).nonzero()[0, 0]])
        raise InputError(
            f"position_ids of row {row} do not count its text tokens (0, 1, 2 ..., padding not"
            " counted, from 0 again for a packed document): leave them out or make them agree"
        )
    starts = torch.zeros_like(text)
    starts[text] = restarts | (is_first & (base == 0))
    return starts


def _starts_of_boundaries(name: str, boundaries: Tensor, text: Tensor) -> Tensor:
    edges = boundaries.cpu().long()
    whole = len(text) == 1 and bool(text.all()) and edges.dim() == 1 and len(edges) > 1
    rising = whole and edges[0] == 0 and edges[-1] == text.numel() and (edges.diff() > 0).all()
    if not rising:
        raise InputError(
            f"{name} must rise from 0 to {text.numel()}, the columns of one row without padding"
        )
    starts = torch.zeros_like(text)
    starts[0, edges[:-1]] = True
    return starts


def _starts_of_indices(seq_idx: Tensor, text: Tensor) -> Tensor:
    if seq_idx.shape != text.shape:
        raise InputError(f"seq_idx must be {tuple(text.shape)}, got {tuple(seq_idx.shape)}")
    index = seq_idx.cpu().long()
    starts = torch.ones_like(text)
    starts[:, 1:] = index.diff(dim=1) != 0
    return starts & text
