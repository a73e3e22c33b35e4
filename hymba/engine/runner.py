"""What a step computes: chunks of prompts as one ragged forward, and the decode step.

The decode step knows everything on the device: which token each slot said last, how many tokens it
holds, where its pages are. The host only names the slots. On a GPU it is a CUDA graph, captured
once for each number of rows, rounded up (rows that are too many work on a spare slot); with packed
weights on a CPU it is a compiled program (hymba/engine/cpu); elsewhere the same function is called
as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hymba.cache import held
from hymba.engine.cpu import program
from hymba.engine.store import Store
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.ops import Packed, send

MANY_ROWS = 256  # of prompts: what they need on the way is given back to the machine


class Spoken(NamedTuple):
    """What a decode step gives for its B rows (S real ones and padding)."""

    logits: Tensor  # (B, V)
    likeliest: Tensor  # (B,) int64, already noted as each slot's last token


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    slots: Tensor  # (B,) what the graph reads
    spoken: Spoken


class Runner:
    def __init__(self, model: LanguageModel, store: Store, graphs: bool | None = None):
        """`graphs`: CUDA graphs for decode steps; where there is CUDA, unless said otherwise."""
        self.model, self.store, self.device = model, store, model.device
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self.last, self.lengths = (
            torch.zeros(store.slots, dtype=torch.long, device=self.device) for _ in range(2)
        )
        with torch.no_grad():  # constants of the weights, which an engine holds still
            self.rates = model.decoder.rates()
            self.gate_up: list[Tensor | Packed | None] = [None] * len(self.rates)
            self.dts: list[Tensor | None] = [None] * len(self.rates)
            if model.device.type == "cuda":
                self.gate_up, self.dts = model.decoder.pack(), model.decoder.wide_dts()
        self.program = program(model, store)  # for packed weights on a CPU
        self._captured: dict[int, Captured] = {}  # by rows
        self._pool: Any = None
        self._slots: tuple[tuple[int, ...], Tensor] = (), self.last[:0]

    def compute(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> None:
        """(slot, tokens): what each slot's sequence goes on with. Nothing is said."""
        slots = [slot for slot, _ in chunks]
        counts = [len(tokens) for _, tokens in chunks]
        past = [self.store.lengths[slot] for slot in slots]
        rows = torch.tensor([token for _, tokens in chunks for token in tokens])
        batch = Batch.of(counts, past, slots, device=self.device)
        with _torch_alone() if self.program is not None else nullcontext():
            self.model(send(rows, self.device), batch, self.store)
        if self.device.type == "cpu" and len(rows) >= MANY_ROWS:
            _give_back_memory()

    def enter(self, speakers: Sequence[tuple[int, int]]) -> None:
        """(slot, its last known token): sequences that from now on go through decode steps."""
        if not speakers:
            return
        values = [(slot, token, self.store.lengths[slot]) for slot, token in speakers]
        slots, tokens, lengths = send(torch.tensor(values), self.device).T
        self.last[slots], self.lengths[slots] = tokens, lengths

    def decode(self, slots: Sequence[int]) -> tuple[Spoken, Tensor]:
        """One new token of each slot -> what the model says, and the slots (S,) on the device."""
        self.store.broken.update(slots)
        index = self._index(tuple(slots))
        if self.graphs:
            spoken = self._replay(index)
        else:
            self.store.look_at(max(self.store.lengths[slot] for slot in slots) + 1)
            spoken = self._step(index)
        self.store.end_step(slots)
        return spoken, index

    def say(self, slots: Tensor, tokens: Tensor) -> None:
        """Other tokens than the likeliest were chosen."""
        self.last.index_copy_(0, slots, tokens)

    def _index(self, slots: tuple[int, ...]) -> Tensor:
        if self._slots[0] != slots:
            self._slots = slots, send(torch.tensor(slots), self.device)
        return self._slots[1]

    @torch.no_grad()
    def _step(self, slots: Tensor) -> Spoken:
        tokens, lengths = self.last[slots], self.lengths[slots]
        if self.program is not None:
            logits = self.program.step(tokens, lengths, slots)
        else:
            layers = held(self.store, slots, lengths)
            ready = zip(layers, self.rates, self.gate_up, self.dts, strict=True)
            layers = [now._replace(A=A, gate_up=both, dt=dt) for now, A, both, dt in ready]
            logits = self.model.step(tokens, lengths, layers)
        likeliest = logits.argmax(-1)
        self.last[slots] = likeliest
        self.lengths[slots] = lengths + (slots != self.store.spare)
        return Spoken(logits, likeliest)

    # ---- CUDA graphs

    def warm_up(self) -> None:
        """Compile a step, or capture a graph for every number of rows, now and not when requests
        wait for it."""
        if self.program is not None:
            self.program.compile()
        sizes = {rounded_rows(rows) for rows in range(1, self.store.spare + 1)}
        for rows in sorted(sizes if self.graphs else (), reverse=True):  # the largest memory first
            if rows not in self._captured:
                self._captured[rows] = self._capture(rows)

    def _replay(self, index: Tensor) -> Spoken:
        rows = rounded_rows(len(index))
        captured = self._captured.get(rows)
        if captured is None:
            captured = self._captured[rows] = self._capture(rows)
        captured.slots[: len(index)].copy_(index)
        captured.slots[len(index) :].fill_(self.store.spare)
        captured.graph.replay()
        return captured.spoken

    def _capture(self, rows: int) -> Captured:
        slots = torch.full((rows,), self.store.spare, device=self.device)
        self.store.look_at(sys.maxsize)  # the kernels see on the device how far they need to go
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):  # once without a graph: kernels compile and load
            self._step(slots)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            spoken = self._step(slots)
        return Captured(graph, slots, spoken)


@contextmanager
def _torch_alone() -> Iterator[None]:
    """Torch on one thread, where all that is long is done by kernels of ours: its other threads
    wait busily after each call, for the next one, on the cores that ours need now."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _give_back_memory() -> None:
    """glibc keeps freed memory for itself: hundreds of megabytes after a prompt."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def rounded_rows(rows: int) -> int:
    """1, 2, 4, 6, 8, 12, 16, 24, 32, ...: a graph for each, a third of padding at most."""
    size = 1
    while size < rows:
        size *= 2
    return size * 3 // 4 if size >= 8 and rows <= size * 3 // 4 else size
