"""What a sequence leaves behind, so that its next token costs one token.

    window layer with own K/V    a ring of window + 1 keys and values: it stops growing
    global layer with own K/V    every key and value, in blocks
    layer that shares K/V        nothing
    SSM branch                   its state (E x n) and the last K-1 inputs of its convolution
    meta tokens                  one copy for the whole cache, never evicted, never per sequence

Keys are stored after rotary embedding, so the order of places does not matter: the token at
position p lies in place p % (window + 1). A forward reads the cache as it was and commits what it
computed at its end, so a chunk sees the old ring and itself, and consumers of shared K/V see what
their producer saw. Only a decode step, one token a sequence, updates everything as it goes, in
place: a copy would cost as much as the step. Because a sequence's state is small, branching,
preemption and roll-back are a `snapshot` and a `restore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hymba.config import Config, Layer
from hymba.ops import Packed, Past, Segments, send


class State(NamedTuple):
    """What rows leave behind in one layer. N rows in S segments; absent branches are None."""

    k: Tensor | None = None  # (N, G, h), after rotary embedding
    v: Tensor | None = None  # (N, G, e)
    conv: Tensor | None = None  # (S, K-1, E) last inputs of the convolution
    ssm: Tensor | None = None  # (S, E, n)


class Places(NamedTuple):
    """Where the rows of a decode step put their K/V and find their sequences', in the stores of one
    kind of layer. All on the device: a captured CUDA graph serves other sequences next time."""

    table: Tensor  # (S, T) int32, pages of each row's sequence in order
    counts: Tensor  # (S,) int32, places that a row sees, its own with them
    page: Tensor  # (S,) int64, where the new token goes
    place: Tensor  # (S,) int64, and the place in that page
    most: int  # no row sees more


class Held(NamedTuple):
    """What one layer is given at a decode step, each where its cache keeps it."""

    meta: State | None = None  # with the K/V of the producer in a layer that shares
    k: Tensor | None = None  # (pages, G, P, h)
    v: Tensor | None = None  # (pages, G, P, e)
    places: Places | None = None
    conv: Tensor | None = None  # (slots, K-1, E)
    ssm: Tensor | None = None  # (slots, E, n)
    slots: Tensor | None = None  # (S,) int64
    # Constants of the weights, where somebody has them ready:
    A: Tensor | None = None  # (E, n) rates of the SSM
    gate_up: Tensor | Packed | None = None  # (2 F, D) of the MLP, as `MLP.pack` gives them
    dt: Tensor | None = None  # (E, R) weight of dt_proj, where it is kept in few bits


class Snapshot(NamedTuple):
    """One sequence's whole state; `kv` and `ssm` go by layer, None where a layer keeps none."""

    length: int
    kv: tuple[tuple[Tensor, Tensor] | None, ...]
    ssm: tuple[tuple[Tensor, Tensor] | None, ...]

    @property
    def nbytes(self) -> int:
        pairs = [pair for pair in (*self.kv, *self.ssm) if pair is not None]
        return sum(x.nbytes for pair in pairs for x in pair)


class KVStore:
    """Keys (S, G, P, h) and values (S, G, P, e) of one layer for S slots."""

    def __init__(self, layer: Layer, k: Tensor, v: Tensor):
        self.layer, self.k, self.v = layer, k, v

    @property
    def ring(self) -> int | None:
        return None if self.layer.window is None else self.layer.window + 1

    def reserve(self, tokens: int) -> None:
        """Make room for a sequence of so many tokens."""
        missing = self.layer.kv_places(tokens) - self.k.shape[2]
        if missing > 0:  # zeros, not empty: a masked place still meets a weight of 0
            self.k, self.v = (
                torch.cat([x, x.new_zeros(*x.shape[:2], missing, x.shape[3])], dim=2)
                for x in (self.k, self.v)
            )

    def past(self, slots: Sequence[int], lengths: tuple[int, ...]) -> Past:
        used = min(max(lengths), self.k.shape[2])
        k, v = (_rows(x, slots)[:, :, :used] for x in (self.k, self.v))
        return Past(k, v, self.positions(lengths, used), lengths)

    def places(self, slots: Tensor, lengths: Tensor) -> Places:
        """A slot is one page."""
        counts, place = lengths + 1, lengths
        if self.ring is not None:
            counts, place = counts.clamp(max=self.ring), place % self.ring
        return Places(slots[:, None].int(), counts.int(), slots, place, self.k.shape[2])

    def positions(self, lengths: tuple[int, ...], used: int) -> Tensor:
        """(S, used): the text position in each place, negative where there is none."""
        place = torch.arange(used, device=self.k.device)
        last = send(torch.tensor(lengths), self.k.device)[:, None] - 1
        if self.ring is None:
            return place.where(place <= last, -1)
        return last - (last - place) % self.ring

    def write(self, rows: Tensor, owners: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Put rows of k (N, G, h) and v (N, G, e) into slots `owners` as text positions `at`."""
        if self.ring is not None:
            at = at % self.ring
        self.k[owners, :, at] = k[rows].to(self.k.dtype)
        self.v[owners, :, at] = v[rows].to(self.v.dtype)

    def select(self, slots: Tensor) -> None:
        self.k, self.v = self.k[slots], self.v[slots]

    def take(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        used = min(length, self.k.shape[2])
        return self.k[slot, :, :used].clone(), self.v[slot, :, :used].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor]) -> None:
        self.clear(slot)
        for store, part in zip((self.k, self.v), kept, strict=True):
            store[slot, :, : part.shape[1]] = part

    def clear(self, slot: int) -> None:
        """Zeros, so that what a sequence left (it may have overflowed) reaches no other."""
        self.k[slot].zero_()
        self.v[slot].zero_()


class SSMStore:
    """Convolution inputs (S, K-1, E) and SSM states (S, E, n) of one layer for S slots; `start` is
    where every sequence begins: after the meta tokens."""

    def __init__(self, start: tuple[Tensor, Tensor], conv: Tensor, ssm: Tensor):
        self.start, self.conv, self.ssm = start, conv, ssm

    def write(self, slots: Sequence[int], conv: Tensor, ssm: Tensor) -> None:
        where = _where(slots, self.conv.device)
        self.conv[where] = conv.to(self.conv.dtype)
        self.ssm[where] = ssm.to(self.ssm.dtype)

    def select(self, slots: Tensor) -> None:
        self.conv, self.ssm = self.conv[slots], self.ssm[slots]

    def take(self, slot: int) -> tuple[Tensor, Tensor]:
        return self.conv[slot].clone(), self.ssm[slot].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor]) -> None:
        self.conv[slot], self.ssm[slot] = kept


def _where(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index of rows: neighbours, or a slot alone, as a slice, which copies nothing and has
    nothing to send."""
    first, count = slots[0], len(slots)
    if list(slots) == list(range(first, first + count)):
        return slice(first, first + count)
    return send(torch.tensor(list(slots)), device)


def _rows(x: Tensor, slots: Sequence[int]) -> Tensor:
    """Rows of the slots asked for; a view where they are neighbours in order."""
    return x[_where(slots, x.device)]


def _places(
    slots: Sequence[int],
    before: Sequence[int],
    segments: Segments,
    ring: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, slot, text position) of every new token that is still kept afterwards."""
    columns = []
    for (start, count), slot, length in zip(segments, slots, before, strict=True):
        row = torch.arange(0 if ring is None else max(0, count - ring), count)
        columns.append(torch.stack([start + row, torch.full_like(row, slot), length + row]))
    rows, owners, at = send(torch.cat(columns, dim=1), device)
    return rows, owners, at


class Cache:
    """The states of `slots` sequences. `lengths` counts text tokens, never meta tokens."""

    kv_dtype: torch.dtype | None = None  # of K/V, if it is not that of the rows

    def __init__(
        self,
        config: Config,
        slots: int,
        meta: Sequence[State],
        like: Tensor,
        state_dtype: torch.dtype = torch.float32,
    ):
        """`like` gives device and dtype of K/V and convolution inputs; SSM states are kept in
        `state_dtype` or wider, because rounding them at every step adds up."""
        self.config, self.meta, self.lengths = config, list(meta), [0] * slots
        self.broken: set[int] = set()  # slots that a step left half-way
        wide = torch.promote_types(like.dtype, state_dtype)
        self.kv: list[KVStore | None] = []
        self.ssm: list[SSMStore | None] = []
        for layer, begin in zip(config.layers, meta, strict=True):
            widths = config.head_dim, config.value_dim(layer)
            k, v = (like.new_zeros(slots, config.num_kv_heads, 0, width) for width in widths)
            self.kv.append(KVStore(layer, k, v) if layer.owns_kv else None)
            conv, ssm = start_of(config, begin, like, wide)
            each = conv.repeat(slots, 1, 1), ssm.repeat(slots, 1, 1)
            self.ssm.append(SSMStore((conv, ssm), *each) if layer.ssm else None)

    @property
    def slots(self) -> int:
        return len(self.lengths)

    def length(self, slot: int) -> int:
        """Text tokens of the sequence in a slot."""
        self._check(slot)
        if slot in self.broken:
            raise ValueError(f"a step of slot {slot} was cut off half-way: reset or restore it")
        return self.lengths[slot]

    def past(self, index: int, slots: Sequence[int]) -> Past | None:
        """The K/V that layer `index` reads, its own or its producer's; None if all are new."""
        layer = self.config.layers[index]
        lengths = tuple(self.lengths[slot] for slot in slots)
        if not layer.attention or max(lengths) == 0:
            return None
        store = self.kv[index if layer.kv_from is None else layer.kv_from]
        assert store is not None
        return store.past(slots, lengths)

    def ssm_state(self, index: int, slots: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        store = self.ssm[index]
        return (
            (None, None) if store is None else (_rows(store.conv, slots), _rows(store.ssm, slots))
        )

    def begin_step(self, slots: Sequence[int]) -> tuple[Tensor, list[Held]]:
        """Make room for one more token in each slot -> lengths (S,) on the device, and what each
        layer is given. Until `end_step` the slots count as broken, in case the step fails."""
        most = max(self.lengths[slot] for slot in slots) + 1
        for kv in filter(None, self.kv):
            kv.reserve(most)
        self.broken.update(slots)
        before = [self.lengths[slot] for slot in slots]
        at, lengths = send(torch.tensor([list(slots), before]), self._device())
        return lengths, held(self, at, lengths)

    def end_step(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.lengths[slot] += 1
        self.broken.difference_update(slots)

    def _device(self) -> torch.device:
        stores = (*(s.conv for s in self.ssm if s), *(s.k for s in self.kv if s))
        return stores[0].device

    def commit(self, slots: Sequence[int], segments: Segments, states: Sequence[State]) -> None:
        """Append what one forward computed, layer by layer, to the slots' sequences."""
        before = [self.lengths[slot] for slot in slots]
        after = [a + b for a, b in zip(before, segments.lengths, strict=True)]
        places: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}  # by size of ring
        for kv, ssm, state in zip(self.kv, self.ssm, states, strict=True):
            if kv is not None and state.k is not None and state.v is not None:
                kv.reserve(max(after))
                if kv.ring not in places:
                    places[kv.ring] = _places(slots, before, segments, kv.ring, kv.k.device)
                kv.write(*places[kv.ring], state.k, state.v)
            if ssm is not None and state.conv is not None and state.ssm is not None:
                ssm.write(slots, state.conv, state.ssm)
        for slot, length in zip(slots, after, strict=True):
            self.lengths[slot] = length

    def select(self, slots: Sequence[int]) -> None:
        """Keep these slots in this order; a slot named twice branches, one not named is gone."""
        for slot in slots:
            self._check(slot)
        index = send(torch.tensor(list(slots)), self._device())
        for store in (*self.kv, *self.ssm):
            if store is not None:
                store.select(index)
        self.lengths = [self.lengths[slot] for slot in slots]
        self.broken = {new for new, old in enumerate(slots) if old in self.broken}

    def reset(self, slot: int) -> None:
        """Empty a slot: its next sequence begins after the meta tokens."""
        self._check(slot)
        self.broken.discard(slot)
        for kv in filter(None, self.kv):
            kv.clear(slot)
        for ssm in filter(None, self.ssm):
            ssm.put(slot, ssm.start)
        self.lengths[slot] = 0

    def snapshot(self, slot: int) -> Snapshot:
        """A copy of one sequence's state, independent of the cache."""
        length = self.length(slot)
        return Snapshot(
            length,
            tuple(None if kv is None else kv.take(slot, length) for kv in self.kv),
            tuple(None if ssm is None else ssm.take(slot) for ssm in self.ssm),
        )

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Put a snapshot of this or an equal cache into a slot, bit for bit."""
        self._check(slot)
        self.broken.discard(slot)
        for kv, pair in zip(self.kv, snapshot.kv, strict=True):
            if kv is not None and pair is not None:
                kv.reserve(snapshot.length)
                kv.put(slot, pair)
        for ssm, pair in zip(self.ssm, snapshot.ssm, strict=True):
            if ssm is not None and pair is not None:
                ssm.put(slot, pair)
        self.lengths[slot] = snapshot.length

    def nbytes(self) -> dict[str, int]:
        """Bytes really allocated, by kind; "meta" is shared by all slots."""
        found = dict.fromkeys(("global_kv", "window_kv", "conv", "ssm"), 0)
        for kv in filter(None, self.kv):
            found["global_kv" if kv.ring is None else "window_kv"] += kv.k.nbytes + kv.v.nbytes
        for ssm in filter(None, self.ssm):
            found["conv"] += ssm.conv.nbytes
            found["ssm"] += ssm.ssm.nbytes
        found["total"] = sum(found.values())
        found["meta"] = sum(x.nbytes for state in self.meta for x in state if x is not None)
        return found

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a cache of {self.slots}")


def start_of(config: Config, meta: State, like: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Convolution inputs (K-1, E) and SSM state (E, n) of a layer where a sequence begins."""
    if meta.conv is None or meta.ssm is None:
        conv = like.new_zeros(config.ssm_conv - 1, config.inner_size)
        return conv, like.new_zeros(config.inner_size, config.ssm_state, dtype=wide)
    return meta.conv[0].to(like.dtype), meta.ssm[0].to(wide)


class Stores(Protocol):
    """What every cache has: the stores of each layer, None where a layer keeps nothing."""

    config: Config
    meta: list[State]
    kv: list[KVStore | None]
    ssm: list[SSMStore | None]


def held(stores: Stores, slots: Tensor, lengths: Tensor) -> list[Held]:
    """What each layer is given at a decode step of `slots` (S,) that hold `lengths` (S,) tokens."""
    kinds: dict[int | None, Places] = {}  # by size of ring
    found = []
    for index, layer in enumerate(stores.config.layers):
        owner = index if layer.kv_from is None else layer.kv_from
        now, kv, ssm = Held(stores.meta[owner]), stores.kv[owner], stores.ssm[index]
        if layer.attention and kv is not None:
            if kv.ring not in kinds:
                kinds[kv.ring] = kv.places(slots, lengths)
            now = now._replace(k=kv.k, v=kv.v, places=kinds[kv.ring])
        if ssm is not None:
            now = now._replace(conv=ssm.conv, ssm=ssm.ssm, slots=slots)
        found.append(now)
    return found
