"""Where the sequences of an engine live: tensors by slot, and pages for layers without a window.

    by slot   rings of the window layers, convolution inputs, SSM states: of one size for good
    by page   keys and values of layers without a window, KV_BLOCK tokens a page, through a table
    once      what the meta tokens left, shared by all

A page has its number in all layers without a window. Everything is allocated once, because captured
CUDA graphs hold the addresses; one slot and one page more than asked for are where the padding rows
of a graph go, and one page more is blank for good. To the model this is a cache like
`hymba.cache.Cache`; who has which slot and which pages, the scheduler says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.cache import Cache, Held, KVStore, Places, SSMStore, State, start_of
from hymba.config import KV_BLOCK, Config, Layer
from hymba.model.accounting import cache_bytes
from hymba.ops import Past, send


@dataclass(frozen=True)
class Sizes:
    """Bytes of a slot and of a page, from the config alone."""

    slot: int
    page: int

    @staticmethod
    def of(
        config: Config,
        max_tokens: int,
        kv_bytes: int,
        state_bytes: int,
        conv_bytes: int | None = None,
    ) -> Sizes:
        """Bytes of an element as for `cache_bytes`."""
        found = cache_bytes(config, max_tokens, kv_bytes, state_bytes, conv_bytes)
        pages = -(-max_tokens // KV_BLOCK)
        slot = found["window_kv"] + found["conv"] + found["ssm"]
        return Sizes(slot, found["global_kv"] // pages)


@dataclass(eq=False)
class Snapshot:
    """A sequence's first `length` tokens: what its slot held, and its pages. The pages stay where
    they are, with an owner more; or, away from the store, `contents` is what they held."""

    length: int
    rings: list[Tensor]
    states: list[Tensor]
    pages: list[int]
    contents: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Without the pages that stay."""
        return sum(x.nbytes for x in (*self.rings, *self.states, *self.contents))


class PagedKV(KVStore):
    """K/V of a layer without a window: keys (pages, G, P, h) and values (pages, G, P, e)."""

    def __init__(self, layer: Layer, k: Tensor, v: Tensor, table: Tensor):
        super().__init__(layer, k, v)
        self.table = table  # (slots, pages of a sequence) int32
        self.columns = table.shape[1]  # of which a decode step looks at so many

    def reserve(self, tokens: int) -> None:
        """Whoever gives out pages has seen to it."""

    def past(self, slots: Sequence[int], lengths: tuple[int, ...]) -> Past:
        pages = -(-max(lengths) // KV_BLOCK)
        table = self.table[send(torch.tensor(list(slots)), self.k.device), :pages].long()
        # (S, pages, G, P, width) -> (S, G, pages * P, width)
        k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (self.k, self.v))
        return Past(k, v, self.positions(lengths, pages * KV_BLOCK), lengths)

    def places(self, slots: Tensor, lengths: Tensor) -> Places:
        table = self.table[slots, : self.columns]
        page = table.gather(1, (lengths // KV_BLOCK)[:, None])[:, 0].long()
        most = table.shape[1] * KV_BLOCK
        return Places(table, (lengths + 1).int(), page, lengths % KV_BLOCK, most)

    def write(self, rows: Tensor, owners: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        pages = self.table[owners, at // KV_BLOCK].long()
        self.k[pages, :, at % KV_BLOCK] = k[rows].to(self.k.dtype)
        self.v[pages, :, at % KV_BLOCK] = v[rows].to(self.v.dtype)


class Store(Cache):
    """The caches of up to `slots` sequences of up to `max_tokens` tokens each, in `pages` pages."""

    def __init__(
        self,
        config: Config,
        slots: int,
        pages: int,
        max_tokens: int,
        meta: Sequence[State],
        like: Tensor,
        state_dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ):
        """`like` and `state_dtype` as for `Cache`; `kv_dtype` of K/V, if not `like`'s."""
        self.config, self.meta, self.spare = config, list(meta), slots
        self.lengths, self.broken = [0] * (slots + 1), set()
        self.kv, self.ssm = [None] * config.num_layers, [None] * config.num_layers
        width = -(-max_tokens // KV_BLOCK)
        self.blank_page = pages + 1  # always zeros: where a sequence has no page
        self.table = torch.full((slots + 1, width), pages, dtype=torch.int32, device=like.device)
        self.rings: list[Tensor] = []  # each (layers, slots + 1, G, P, width)
        self.paged: list[Tensor] = []  # each (layers, pages + 2, G, P, width)
        self.states: list[Tensor] = []  # each (layers, slots + 1, ...)
        self.starts: list[Tensor] = []  # of `states`, without slots
        self.kv_dtype = kv_dtype
        self._make_kv(pages, max_tokens, like.to(kv_dtype or like.dtype))
        self._make_ssm(like, torch.promote_types(like.dtype, state_dtype))
        self.reset(self.spare)
        self.clear_pages([pages, self.blank_page])

    def _make_kv(self, pages: int, max_tokens: int, like: Tensor) -> None:
        config = self.config
        kinds: dict[tuple[int | None, int], list[int]] = {}  # by window and width of a value
        for index in config.kv_owners:
            layer = config.layers[index]
            kinds.setdefault((layer.window, config.value_dim(layer)), []).append(index)
        for (window, value_dim), members in kinds.items():
            layer = config.layers[members[0]]
            count, places = pages + 2, KV_BLOCK
            if window is not None:
                count, places = self.slots, layer.kv_places(max_tokens)
            shape = len(members), count, config.num_kv_heads, places
            k, v = (like.new_empty(*shape, width) for width in (config.head_dim, value_dim))
            (self.paged if window is None else self.rings).extend((k, v))
            for at, index in enumerate(members):
                own = config.layers[index], k[at], v[at]
                ring = window is not None
                self.kv[index] = KVStore(*own) if ring else PagedKV(*own, self.table)

    def _make_ssm(self, like: Tensor, wide: torch.dtype) -> None:
        members = [i for i, layer in enumerate(self.config.layers) if layer.ssm]
        if not members:
            return
        starts = [start_of(self.config, self.meta[i], like, wide) for i in members]
        conv, ssm = (torch.stack(each) for each in zip(*starts, strict=True))
        self.starts = [conv, ssm]
        self.states = [x.new_empty(len(members), self.slots, *x.shape[1:]) for x in self.starts]
        for at, index in enumerate(members):
            self.ssm[index] = SSMStore(starts[at], self.states[0][at], self.states[1][at])

    # ---- slots and pages

    def reset(self, slot: int) -> None:
        """A sequence begins, after the meta tokens."""
        for ring in self.rings:  # zeros: what a sequence left may have overflowed
            ring[:, slot].zero_()
        for state, start in zip(self.states, self.starts, strict=True):
            state[:, slot] = start
        self.lengths[slot] = 0
        self.broken.discard(slot)

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zeros, for whoever gets them."""
        if pages:
            index = self._index(pages)
            for x in self.paged:
                x.index_fill_(1, index, 0)

    def blank(self, slot: int, first: int) -> list[tuple[int, int, int]]:
        """For `set_pages`: from its page `first` on a sequence has none."""
        return [(slot, at, self.blank_page) for at in range(first, self.table.shape[1])]

    def set_pages(self, edits: Sequence[tuple[int, int, int]]) -> None:
        """(slot, which of its pages, page): enter them into the table."""
        if edits:
            slots, columns, pages = self._index(edits).T
            self.table[slots, columns] = pages.int()

    def look_at(self, tokens: int) -> None:
        """Decode steps that follow are of sequences that have at most so many tokens then."""
        for kv in self.kv:
            if isinstance(kv, PagedKV):
                kv.columns = min(-(-tokens // KV_BLOCK), self.table.shape[1])

    def begin_step(self, slots: Sequence[int]) -> tuple[Tensor, list[Held]]:
        self.look_at(max(self.lengths[slot] for slot in slots) + 1)
        return super().begin_step(slots)

    # ---- snapshots

    def keep(self, slot: int, own: Sequence[int], pages: list[int]) -> Snapshot:
        """A snapshot that stays in the store: `pages` are the sequence's `own`, the last of them,
        if it is not full, a fresh one that gets a copy."""
        length = self.lengths[slot]
        full, rest = divmod(length, KV_BLOCK)
        if rest and self.paged:
            self._copy_page(own[full], pages[full])
        return Snapshot(length, *self._of_slot(slot, length), pages, [])

    def carry_out(self, slot: int, own: Sequence[int]) -> Snapshot:
        """A snapshot in the host's memory; slot and pages may be used again at once."""
        length = self.lengths[slot]
        index = self._index(own[: -(-length // KV_BLOCK)])
        contents = [_to_host(x[:, index]) for x in self.paged]
        rings, states = self._of_slot(slot, length)
        return Snapshot(
            length, [_to_host(x) for x in rings], [_to_host(x) for x in states], [], contents
        )

    def bring_back(self, slot: int, snapshot: Snapshot, own: Sequence[int]) -> None:
        """Put a snapshot into a slot whose sequence has the pages `own`, bit for bit. Full pages
        that stayed in the store are among them already."""
        self.reset(slot)
        for ring, part in zip(self.rings, snapshot.rings, strict=True):
            ring[:, slot, :, : part.shape[2]].copy_(part, non_blocking=True)
        for state, part in zip(self.states, snapshot.states, strict=True):
            state[:, slot].copy_(part, non_blocking=True)
        full, rest = divmod(snapshot.length, KV_BLOCK)
        if snapshot.contents:
            index = self._index(own[: full + (rest > 0)])
            for x, content in zip(self.paged, snapshot.contents, strict=True):
                x[:, index] = content.to(x.device, non_blocking=True)
        elif rest and self.paged:
            self._copy_page(snapshot.pages[full], own[full])
        self.lengths[slot] = snapshot.length

    def _of_slot(self, slot: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
        rings = [x[:, slot, :, : min(length, x.shape[3])].clone() for x in self.rings]
        return rings, [x[:, slot].clone() for x in self.states]

    def _copy_page(self, old: int, new: int) -> None:
        for x in self.paged:
            x[:, new] = x[:, old]

    def _index(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return send(torch.tensor(values, dtype=torch.long), self.table.device)


def _to_host(x: Tensor) -> Tensor:
    """On its way: in stream order before whatever is written over `x` next."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
