"""transformers' idea of a cache over ours: `HymbaCache`.

    out = model(**prompt, use_cache=True)                   makes one
    model.generate(..., past_key_values=HymbaCache(model))  or bring your own and keep it

transformers counts columns (padding included, meta tokens never); our cache counts the text tokens
of each row. This class keeps both counts, and the last hidden state of each row for the columns
that only hold padding. Roll-back (assisted decoding) needs states that are gone once they are
overwritten, so while transformers asks for it (`activate_past_recording`) a snapshot and the inputs
since are kept: `crop` goes back to the snapshot and runs the kept inputs again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hymba.cache import Cache, Snapshot
from hymba.hf.columns import Columns, InputError
from hymba.model.batch import Batch

REPLAY = 16  # columns a crop may have to run again before a new snapshot is taken


@dataclass
class _Record:
    """Where the cache stood, and what went into it since."""

    snapshots: list[Snapshot]
    columns: int
    last: Tensor
    inputs: Tensor  # (B, T, D) embeddings
    text: Tensor  # (B, T) bool


class HymbaCache(transformers.Cache):
    """The states of a batch of rows; made empty, it takes the size of the first batch it sees."""

    is_compileable = False  # its shapes follow the lengths
    is_croppable = False  # only what was recorded can be rolled back

    def __init__(self, model: Any):
        """`model`: a Hymba model of transformers, also one wrapped by peft."""
        super().__init__(layers=[])
        self.decoder = model.get_decoder().decoder
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Empty it; the next batch may have another size."""
        self.rows: Cache | None = None
        self.last: Tensor | None = None  # (B, D), zeros before a row's first text
        self.columns = 0
        self._records: list[_Record] = []

    # What transformers asks

    @property
    def lengths(self) -> list[int]:
        """Text tokens of each row."""
        return [] if self.rows is None else list(self.rows.lengths)

    @property
    def batch_size(self) -> int:
        return -1 if self.rows is None else self.rows.slots

    @property
    def is_initialized(self) -> bool:
        return self.rows is not None

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def __repr__(self) -> str:
        return f"HymbaCache(columns={self.columns}, text_tokens={self.lengths})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return self.columns > 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a HymbaCache is filled by the model, not layer by layer")

    # One step

    @torch.inference_mode(False)  # or the cache could never be used outside that mode again
    @torch.no_grad()
    def open(self, batch: int) -> list[int]:
        """Text tokens of each of `batch` rows, making room for them on first use."""
        if self.rows is None:
            self.rows = self.decoder.new_cache(batch)
            weight = self.decoder.final_norm.weight
            self.last = weight.new_zeros(batch, weight.shape[0])
        if self.rows.slots != batch:
            raise InputError(f"past_key_values holds {self.rows.slots} rows, the input has {batch}")
        return self.lengths

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(self, inputs: Tensor, columns: Columns) -> Tensor:
        """Run new columns, embeddings (B, T, D), on top; gives their hidden states (B, T, D)."""
        self.open(columns.batch)
        assert self.rows is not None and self.last is not None
        if self.record_past:
            self._record(inputs, columns)
        hidden = inputs.new_zeros(0, inputs.shape[-1])
        if columns.owners:  # else a chunk of padding only: nothing happens
            past = [self.rows.lengths[row] for row in columns.owners]
            step = Batch.of(columns.lengths, past, columns.owners, device=inputs.device)
            hidden = self.decoder(columns.flat(inputs), step, cache=self.rows)
        spread = columns.spread(hidden, self.last)
        self.last = spread[:, -1].clone()
        self.columns += columns.width
        return spread

    # Beams, several answers to one prompt

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row named twice branches."""
        self._records = []
        if self.rows is not None and self.last is not None:
            self.rows.select(rows)
            self.last = self.last[torch.tensor(rows, device=self.last.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    # Roll-back

    def activate_past_recording(self) -> None:
        self.record_past = True

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns; their number is negative, as transformers gives it."""
        if tokens_to_remove > 0:
            raise InputError("crop takes the number of columns to remove as a negative number")
        keep = self.columns + tokens_to_remove
        if keep < self.columns:
            record = next((r for r in reversed(self._records) if r.columns <= keep), None)
            if record is None:
                raise InputError(
                    f"cannot take back {-tokens_to_remove} columns: overwritten states are gone"
                    " unless activate_past_recording() was called before them"
                )
            self._replay(record, keep - record.columns)
        self._records = []

    def _record(self, inputs: Tensor, columns: Columns) -> None:
        assert self.rows is not None and self.last is not None
        text = columns.text
        if text is None:
            text = torch.ones(columns.batch, columns.width, dtype=torch.bool, device=inputs.device)
        latest = self._records[-1] if self._records else None
        if latest is not None and latest.inputs.shape[1] < REPLAY:
            latest.inputs = torch.cat((latest.inputs, inputs), dim=1)
            latest.text = torch.cat((latest.text, text), dim=1)
            return
        snapshots = [self.rows.snapshot(row) for row in range(self.rows.slots)]
        self._records.append(_Record(snapshots, self.columns, self.last, inputs, text))

    def _replay(self, record: _Record, width: int) -> None:
        assert self.rows is not None
        for row, snapshot in enumerate(record.snapshots):
            self.rows.restore(row, snapshot)
        self.columns, self.last = record.columns, record.last
        if width:
            recording, self.record_past = self.record_past, False
            text = record.text[:, :width]
            self.advance(record.inputs[:, :width], Columns.of(text, text.device))
            self.record_past = recording

    def __deepcopy__(self, memo: dict[int, Any]) -> HymbaCache:
        """A copy of the states, not of the model: a prompt's cache may be kept and used again."""
        twin = copy.copy(self)
        twin.rows = copy.deepcopy(self.rows, memo)
        twin._records = [copy.copy(record) for record in self._records]
        return twin
