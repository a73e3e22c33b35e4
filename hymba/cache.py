"""What a sequence leaves behind, so that its next token costs one token.

    window layer with own K/V    a ring of window + 1 keys and values: it stops growing
    global layer with own K/V    every key and value, in blocks
    layer that shares K/V        nothing
    SSM branch                   its state (E x n) and the last K-1 inputs of its convolution
    meta tokens                  one copy for the whole cache, never evicted, never per sequence

Keys are stored after rotary embedding, so the order of places does not matter: the token at
position p lies in place p % (window + 1). A forward reads the cache as it was and commits what it
computed at its end, so a chunk sees the old ring and itself, and consumers of shared K/V see what
their producer saw. Only a step of one token a sequence updates SSM states as it goes, in place: a
copy would cost as much as the step. Because a sequence's state is small, branching, preemption and
roll-back are a `snapshot` and a `restore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.config import Config, Layer
from hymba.ops import Past, Segments


class State(NamedTuple):
    """What rows leave behind in one layer. N rows in S segments; absent branches are None."""

    k: Tensor | None = None  # (N, G, h), after rotary embedding
    v: Tensor | None = None  # (N, G, e)
    conv: Tensor | None = None  # (S, K-1, E) last inputs of the convolution
    ssm: Tensor | None = None  # (S, E, n)


class Slots(NamedTuple):
    """One layer's SSM states where a cache keeps them, and which of them are meant."""

    conv: Tensor  # (slots, K-1, E)
    ssm: Tensor  # (slots, E, n)
    slots: Tensor  # (S,)


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

    def __init__(self, layer: Layer, slots: int, heads: int, widths: tuple[int, int], like: Tensor):
        self.layer = layer
        self.k = like.new_zeros(slots, heads, 0, widths[0])
        self.v = like.new_zeros(slots, heads, 0, widths[1])

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

    def positions(self, lengths: tuple[int, ...], used: int) -> Tensor:
        """(S, used): the text position in each place, negative where there is none."""
        place = torch.arange(used, device=self.k.device)
        last = torch.tensor(lengths, device=self.k.device)[:, None] - 1
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
    """Convolution inputs (S, K-1, E) and SSM states (S, E, n) of one layer for S slots."""

    def __init__(self, conv: Tensor, ssm: Tensor, slots: int):
        self.start = conv[0], ssm[0]  # where every sequence begins: after the meta tokens
        self.conv, self.ssm = conv.repeat(slots, 1, 1), ssm.repeat(slots, 1, 1)

    def write(self, slots: Sequence[int], conv: Tensor, ssm: Tensor) -> None:
        index = torch.tensor(list(slots), device=self.conv.device)
        self.conv[index] = conv.to(self.conv.dtype)
        self.ssm[index] = ssm.to(self.ssm.dtype)

    def select(self, slots: Tensor) -> None:
        self.conv, self.ssm = self.conv[slots], self.ssm[slots]

    def take(self, slot: int) -> tuple[Tensor, Tensor]:
        return self.conv[slot].clone(), self.ssm[slot].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor]) -> None:
        self.conv[slot], self.ssm[slot] = kept


def _rows(x: Tensor, slots: Sequence[int]) -> Tensor:
    """Rows of the slots asked for; a view where that is all of them in order."""
    if list(slots) == list(range(x.shape[0])):
        return x
    return x[torch.tensor(list(slots), device=x.device)]


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
    rows, owners, at = torch.cat(columns, dim=1).to(device)
    return rows, owners, at


class Cache:
    """The states of `slots` sequences. `lengths` counts text tokens, never meta tokens."""

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
            store = KVStore(layer, slots, config.num_kv_heads, widths, like)
            self.kv.append(store if layer.owns_kv else None)
            self.ssm.append(self._ssm_store(layer, slots, begin, like, wide))

    def _ssm_store(
        self, layer: Layer, slots: int, begin: State, like: Tensor, wide: torch.dtype
    ) -> SSMStore | None:
        if not layer.ssm:
            return None
        config, (conv, ssm) = self.config, begin[2:]
        if conv is None or ssm is None:
            conv = like.new_zeros(1, config.ssm_conv - 1, config.inner_size)
            ssm = like.new_zeros(1, config.inner_size, config.ssm_state)
        return SSMStore(conv.to(like.dtype), ssm.to(wide), slots)

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

    def ssm_slots(self, index: int, slots: Tensor) -> Slots | None:
        """For a step that updates the states of layer `index` where they lie."""
        store = self.ssm[index]
        return None if store is None else Slots(store.conv, store.ssm, slots)

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
        device = next((s.conv.device for s in self.ssm if s), None)
        device = device or next(s.k.device for s in self.kv if s)
        index = torch.tensor(list(slots), device=device)
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
