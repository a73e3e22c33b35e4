"""Documents to rows: nothing lost, nothing twice, the same again, resumable anywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hymba.tokenizer import Tokenizer
from hymba.train.rows import HeldOut, Loader, Packed, Packer
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
