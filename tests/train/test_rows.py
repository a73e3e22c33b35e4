"""Documents to rows: nothing lost, nothing twice, the same again, resumable anywhere."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba.tokenizer import Tokenizer
from hymba.train.rows import HeldOut, Loader, Mixture, Packed, Packer, shares
from hymba.train.sources import DataError, Texts
from hymba.train.store import TokenStore, prepare

LENGTH = 16


def pairs_of(packed: Packed) -> list[tuple[int, int]]:
    return list(zip(packed.tokens.tolist(), packed.labels.tolist(), strict=True))


def test_every_pair_comes_once_an_epoch_but_for_a_last_part_row(store: TokenStore) -> None:
    packer = Packer(store, LENGTH, seed=0)
    total = int(store.pairs.sum())
    for epoch in (0, 1):
        seen: list[int] = []
        for row in range(packer.rows_per_epoch):
            pieces = packer.pieces(epoch * packer.rows_per_epoch + row)
            assert sum(length for _, length in pieces) == LENGTH
            seen += [first + i for first, length in pieces for i in range(length)]
        assert len(seen) == len(set(seen)) == total - total % LENGTH
        last_tokens = store.starts + store.documents[:, 0] - 1
        assert not set(seen) & set(last_tokens.tolist())  # </s> is never an input


def test_labels_are_the_next_tokens_of_the_same_document(store: TokenStore) -> None:
    """At the end of a row too: no label is lost where a document is cut."""
    packer = Packer(store, LENGTH, seed=3)
    loader = Loader(packer)
    flat = store.read(0, store.ends[-1]).tolist()
    after = {}  # position in the store -> next token
    for start, length in zip(store.starts, store.documents[:, 0], strict=True):
        after |= {int(start) + i: flat[start + i + 1] for i in range(length - 1)}
    for row in range(packer.rows_per_epoch):
        [packed] = loader.take(1)
        places = [f + i for f, length in packer.pieces(row) for i in range(length)]
        assert packed.tokens.tolist() == [flat[p] for p in places]
        assert packed.labels.tolist() == [after[p] for p in places]
        assert packed.tokens.dtype == packed.labels.dtype == torch.int64


def test_documents_begin_with_bos_and_pieces_break_at_documents(store: TokenStore) -> None:
    [packed] = Loader(Packer(store, LENGTH, seed=0)).take(50)
    starts = np.cumsum([0, *packed.lengths[:-1]])
    begins = (packed.tokens == 1).nonzero().squeeze(1).tolist()
    assert begins and set(begins) <= set(starts.tolist())
    ends = set((starts + np.array(packed.lengths) - 1).tolist())
    assert set((packed.labels == 2).nonzero().squeeze(1).tolist()) <= ends
    assert len(packed.lengths) > 50 and max(packed.lengths) == LENGTH


def test_rows_are_shuffled_differently_by_epoch_and_seed(store: TokenStore) -> None:
    packer = Packer(store, LENGTH, seed=0)
    count = packer.rows_per_epoch
    first = [packer.pieces(row) for row in range(count)]
    assert first != [packer.pieces(count + row) for row in range(count)]
    assert first != [Packer(store, LENGTH, seed=1).pieces(row) for row in range(count)]
    assert first == [Packer(store, LENGTH, seed=0).pieces(row) for row in range(count)]
    in_a_row = sum(b[0][0] == a[0][0] + LENGTH for a, b in zip(first, first[1:], strict=False))
    assert in_a_row < count / 5  # cuts of one document are spread out


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    """A checkpoint names a row by number; these numbers must outlive versions of numpy."""
    order = np.random.RandomState([7, 2]).permutation(8).tolist()
    assert order == [7, 6, 4, 1, 5, 2, 0, 3]


@pytest.mark.parametrize("at", [0, 1, 7, 100])
def test_loader_goes_on_at_the_exact_row(store: TokenStore, at: int) -> None:
    one = Loader(Packer(store, LENGTH, seed=0))
    for _ in range(at):
        one.take(3)
    other = Loader(Packer(store, LENGTH, seed=0))
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        [a], [b] = one.take(3), other.take(3)
        assert pairs_of(a) == pairs_of(b) and a.lengths == b.lengths
    assert one.epoch == other.epoch == (at + 3) * 3 / Packer(store, LENGTH, seed=0).rows_per_epoch


def test_rows_do_not_depend_on_how_many_are_taken_at_once(store: TokenStore) -> None:
    """So a checkpoint may go on with another batch size or number of processes."""
    packer = Packer(store, LENGTH, seed=0)
    one, other = Loader(packer), Loader(packer)
    count = packer.rows_per_epoch + 3  # over the end of an epoch
    [many] = one.take(count)
    few = [packed for _ in range(count) for packed in other.take(1)]
    assert pairs_of(many) == [pair for packed in few for pair in pairs_of(packed)]


@pytest.mark.parametrize(
    ("key", "packer"),
    [
        ("sequence_length", lambda store, _: Packer(store, LENGTH + 1, 0)),
        ("seed", lambda store, _: Packer(store, LENGTH, 1)),
        ("corpus", lambda _, other: Packer(other, LENGTH, 0)),
    ],
)
def test_loader_refuses_a_row_number_of_other_rows(
    store: TokenStore, tokenizer: Tokenizer, tmp_path: Path, key: str, packer
) -> None:
    other = prepare(tmp_path / "s", Texts(("some other text " * 9,)), tokenizer)
    state = Loader(Packer(store, LENGTH, 0)).state_dict()
    with pytest.raises(DataError, match=f"made with {key}"):
        Loader(packer(store, other)).load_state_dict(state)


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 5), (2, None), (3, 1), (4, 2), (6, 9)])
def test_processes_share_the_rows_of_a_step(
    store: TokenStore, world: int, micro: int | None
) -> None:
    """Each row once, whoever has it; micro-batches change nothing but where a forward ends."""
    packer = Packer(store, LENGTH, seed=0)
    loaders = [Loader(packer) for _ in range(world)]
    for step in range(2):
        seen: dict[int, Packed] = {}
        for rank, loader in enumerate(loaders):
            batches = loader.take(12, micro, rank, world)
            sizes = [len(packed.tokens) // LENGTH for packed in batches]
            assert sum(sizes) == 12 // world and max(sizes) <= (micro or 12)
            whole = Packed.joined(batches)
            for place, number in enumerate(range(step * 12 + rank, step * 12 + 12, world)):
                cut = slice(place * LENGTH, (place + 1) * LENGTH)
                seen[number] = Packed(whole.tokens[cut], whole.labels[cut], ())
        assert sorted(seen) == list(range(step * 12, step * 12 + 12))
        for number, packed in seen.items():
            assert pairs_of(packed) == pairs_of(packer.row(number))
    with pytest.raises(ValueError, match="shared evenly"):
        loaders[0].take(13, world=5)


def test_too_little_text_for_a_row_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="too few for one row"):
        Packer(store, 100_000, seed=0)


# ---- held out


@pytest.mark.parametrize("rows", [1, 4])
def test_held_out_covers_whole_documents_once(store: TokenStore, rows: int) -> None:
    held = HeldOut(store, LENGTH, rows)
    seen: list[tuple[int, int]] = []
    for packed in held:
        assert 0 < sum(packed.lengths) == packed.tokens.numel() <= rows * LENGTH
        assert max(packed.lengths) <= LENGTH
        seen += pairs_of(packed)
    flat = store.read(0, store.ends[-1]).tolist()
    spans = zip(store.starts, store.documents[:, 0], strict=True)
    expected = [(flat[s + i], flat[s + i + 1]) for s, n in spans for i in range(n - 1)]
    assert seen == expected
    assert held.labels == len(expected) and held.bytes == store.manifest["bytes"]


def test_held_out_stops_at_whole_documents(store: TokenStore) -> None:
    held = HeldOut(store, LENGTH, 4, most_tokens=500)
    seen = [pair for packed in held for pair in pairs_of(packed)]
    assert len(seen) == held.labels <= 500
    assert sum(label == 2 for _, label in seen) == sum(token == 1 for token, _ in seen) > 1
    assert held.bytes < store.manifest["bytes"]
    again = [pair for p in HeldOut(store, LENGTH, 4, most_tokens=500) for pair in pairs_of(p)]
    assert seen == again
    assert HeldOut(store, LENGTH, 4, most_tokens=1).labels >= 1  # at least one document


def test_batches_of_held_out_can_be_asked_for_by_number(store: TokenStore) -> None:
    held = HeldOut(store, LENGTH, 2)
    numbered = [pair for i in range(len(held)) for pair in pairs_of(held[i])]
    assert len(held) > 3 and numbered == [pair for packed in held for pair in pairs_of(packed)]


# ---- mixtures


class Counting:
    """Rows whose only token is their number (and their source's)."""

    sequence_length = 2
    bytes_per_label: float | None = 3.0

    def __init__(self, source: int = 0, rows_per_epoch: int = 100) -> None:
        self.source, self.rows_per_epoch = source, rows_per_epoch

    def row(self, number: int) -> Packed:
        both = torch.tensor([self.source, number])
        return Packed(both, both, (2,))

    @property
    def identity(self) -> dict[str, Any]:
        return {"corpus": f"counting {self.source}"}

    def epochs(self, rows: int) -> float:
        return rows / self.rows_per_epoch


def mixture(weights: Sequence[float], seed: int = 0) -> Mixture:
    return Mixture([Counting(i) for i in range(len(weights))], weights, seed)


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    seed=st.integers(-5, 2**40),
    number=st.integers(0, 10**9),
)
def test_any_row_of_a_mixture_is_the_next_of_its_source(
    weights: list[float], seed: int, number: int
) -> None:
    """The slow twin walks the block and counts. Any row, asked for alone, is the same one."""
    mixed = mixture(weights, seed)
    block = number // Mixture.BLOCK
    nexts = [block * count for count in mixed.counts]
    for i in range(block * Mixture.BLOCK, (block + 1) * Mixture.BLOCK):
        source, place = mixed.row(i).tokens.tolist()
        assert place == nexts[source]
        nexts[source] += 1
        if i == number:
            assert mixture(weights, seed).row(number).tokens.tolist() == [source, place]
    assert nexts == [(block + 1) * count for count in mixed.counts]


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), total=st.integers(0, 2000))
def test_shares_are_whole_and_add_up(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * total) < 1
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    for less, more in zip(order, order[1:], strict=False):
        assert counts[less] <= counts[more] or weights[less] == weights[more]


def test_shares_by_hand() -> None:
    assert shares([1, 1, 1], 1024) == (342, 341, 341)
    assert shares([0.7, 0.3], 1024) == (717, 307)
    assert shares([70, 30], 1024) == (717, 307)
    assert shares([5], 3) == (3,)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, math.nan], [math.inf, 1]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights must be numbers above 0"):
        shares(weights, 1024)


def test_a_weight_below_a_row_in_a_block_is_refused() -> None:
    with pytest.raises(DataError, match="weight 0.0001 of 1.0001 has less than one row in 1024"):
        mixture([1, 0.0001])


def test_a_mixture_is_shuffled_differently_by_block_and_seed() -> None:
    mixed = mixture([0.5, 0.5])

    def order(mixed: Mixture, block: int) -> list[int]:
        return [mixed.place(block * 1024 + i)[0] for i in range(1024)]

    assert order(mixed, 0) != order(mixed, 1) != order(mixed, 2)
    assert order(mixed, 0) != order(mixture([0.5, 0.5], 1), 0)
    assert sum(order(mixed, 0)[:100]) == pytest.approx(50, abs=20)  # mixed all along


def test_a_mixture_of_stores_resumes_in_the_middle(
    store: TokenStore, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = prepare(tmp_path / "s", Texts(("some other text " * 90,)), tokenizer)
    mixed = Mixture([Packer(store, LENGTH, 3), Packer(other, LENGTH, 3)], [3, 1], 3)
    one = Loader(mixed)
    one.take(1000)
    state = json.loads(json.dumps(one.state_dict()))
    again = Loader(Mixture([Packer(store, LENGTH, 3), Packer(other, LENGTH, 3)], [0.75, 0.25], 3))
    again.load_state_dict(state)
    [a], [b] = one.take(100), again.take(100)
    assert pairs_of(a) == pairs_of(b) and a.lengths == b.lengths
    for changed, key in (
        (Mixture(mixed.sources[::-1], [1, 3], 3), "corpus"),
        (Mixture(mixed.sources, [1, 1], 3), "rows of each"),
        (Mixture(mixed.sources, [3, 1], 4), "seed"),
        (Packer(store, LENGTH, 3), "corpus"),
    ):
        with pytest.raises(DataError, match=f"made with {key}"):
            Loader(changed).load_state_dict(state)
    with pytest.raises(DataError, match="made with corpus"):
        one.load_state_dict(Loader(Packer(store, LENGTH, 3)).state_dict())


def test_what_a_mixture_says_of_itself() -> None:
    a, b = Counting(0, rows_per_epoch=100), Counting(1, rows_per_epoch=300)
    b.bytes_per_label = 5.0
    mixed = Mixture([a, b], [1, 3], 0)
    assert mixed.epochs(200) == pytest.approx(0.5)  # of 400 rows
    assert mixed.bytes_per_label == pytest.approx(0.25 * 3 + 0.75 * 5)
    a.bytes_per_label = None
    assert mixed.bytes_per_label is None
    a.epochs = lambda rows: 0.0  # type: ignore[method-assign]
    assert mixed.epochs(200) == 0.0
    b.sequence_length = 3
    with pytest.raises(ValueError, match="different lengths"):
        Mixture([a, b], [1, 3], 0)


def test_rows_made_ahead_are_those_that_are_taken(store: TokenStore) -> None:
    """And they are no part of the state: a run that goes on makes them again."""
    ahead, plain = (Loader(Packer(store, 16, seed=0)) for _ in range(2))
    for rows, micro in ((4, 2), (4, 3), (6, None)):
        ahead.prepare(4, 2)  # of another size in the end, or not
        assert ahead.state_dict() == plain.state_dict()
        for ours, theirs in zip(ahead.take(rows, micro), plain.take(rows, micro), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and ours.lengths == theirs.lengths
        assert ahead.state_dict() == plain.state_dict()
    ahead.prepare(4)
    ahead.load_state_dict(plain.state_dict() | {"row": 0})
    [first], [again] = Loader(Packer(store, 16, seed=0)).take(4), ahead.take(4)
    assert torch.equal(first.tokens, again.tokens)
