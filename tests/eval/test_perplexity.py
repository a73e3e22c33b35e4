"""Perplexity by position: sums by hand, every byte counted once, whatever the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.errors import UserError
from hymba.eval import figures
from hymba.eval.hay import HELD_OUT, LIBRARY, Pen, documents
from hymba.eval.perplexity import bucket_edges, cut_rows, run_perplexity, table
from hymba.eval.subject import open_subject
from hymba.tokenizer import Tokenizer
from hymba.train.data import find
from tests.commands.generating import save_model

TEXTS = [
    "".join(f"{word} {i} is what {name} said, é {i * i}.\n" for i in range(150))
    for name, word in (("Ann", "line"), ("Bob", "row"), ("Cid", "verse"))
]


class Known:
    """Each token costs what `nats` says of its position, 0 being the first predicted one."""

    name, most_tokens, last_position = "known", 100, None

    def __init__(self, tokenizer: Tokenizer, nats: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tokenizer, self.nats, self.begin = tokenizer, nats, [1]

    def logprobs(self, rows: list[list[int]], batch: int) -> list[torch.Tensor]:
        return [-self.nats(torch.arange(len(row) - 1)) for row in rows]

    score: Any = None
    generate: Any = None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


def test_positions_and_bytes_by_hand(tokenizer: Tokenizer) -> None:
    subject = Known(tokenizer, lambda positions: positions.double())
    found = run_perplexity(subject, 200, 5, texts=TEXTS)
    assert found["edges"] == [0, 16, 32, 64, 128, 199] and found["rows"] == 5
    rows, joined = cut_rows(subject, TEXTS, 200, 5, seed=0)
    assert not joined and not found["joined"]
    for (a, b), part in zip(pairwise(found["edges"]), found["by_position"], strict=True):
        assert part["tokens"] == 5 * (b - a)
        assert part["nats"] == pytest.approx((a + b - 1) / 2)
    said = [Pen(tokenizer).text(row[1:]) for row in rows]
    assert found["tokens"] == 5 * 199 and found["nats"] == pytest.approx(99)
    assert found["bytes"] == sum(part["bytes"] for part in found["by_position"])
    assert abs(found["bytes"] - sum(len(text.encode()) for text in said)) <= 2 * 5  # half an é
    bits = 5 * sum(range(199)) / math.log(2) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits)
    assert found["perplexity"] == pytest.approx(math.exp(99))


def test_a_guess_among_all_tokens(tokenizer: Tokenizer) -> None:
    """ln V nats everywhere; perplexity is the size of the vocabulary."""
    size = tokenizer.vocab_size
    subject = Known(tokenizer, lambda x: torch.full(x.shape, math.log(size)))
    found = run_perplexity(subject, 90, 3, texts=TEXTS)
    assert found["perplexity"] == pytest.approx(size)
    assert all(part["perplexity"] == pytest.approx(size) for part in found["by_position"])


def test_rows_lie_in_one_document_where_they_can(tokenizer: Tokenizer) -> None:
    subject, pen = Known(tokenizer, torch.zeros_like), Pen(tokenizer)
    sizes = [len(pen.ids("\n" + text)) for text in TEXTS]
    rows, joined = cut_rows(subject, TEXTS, min(sizes) // 2, 3, seed=1)
    assert len(rows) == 3 and not joined
    texts = [pen.text(row[1:]).strip() for row in rows]
    assert all(any(text in "\n" + whole for whole in TEXTS) for text in texts)
    rows, joined = cut_rows(subject, TEXTS, max(sizes) + 10, 3, seed=1)
    assert joined and 1 <= len(rows) <= 2 and len(rows[0]) == max(sizes) + 10
    assert cut_rows(subject, TEXTS, 100, 3, seed=1) == cut_rows(subject, TEXTS, 100, 3, seed=1)
    assert cut_rows(subject, TEXTS, 100, 3, seed=1) != cut_rows(subject, TEXTS, 100, 3, seed=3)


@pytest.mark.parametrize("length", [2, 3, 17, 18, 33, 1000])
def test_buckets_cover_every_position_once(length: int) -> None:
    edges = bucket_edges(length)
    assert edges[0] == 0 and edges[-1] == length - 1 and edges == sorted(set(edges))
    assert all(b <= max(16, 2 * a) for a, b in pairwise(edges))


def test_the_batch_changes_nothing(tmp_path: Path, lively: Callable[..., Any]) -> None:
    """And the model's own positions may be left behind."""
    subject = open_subject(save_model(tmp_path / "model", lively, 1), "cpu", "float32")
    told: list[Any] = []
    results = [
        run_perplexity(
            subject, 300, 5, texts=TEXTS, batch=batch, progress=lambda *x: told.append(x)
        )
        for batch in (1, 4)
    ]
    assert told[-2:] == [("perplexity", 4, 5), ("perplexity", 5, 5)] and len(told) == 7
    for a, b in zip(*(result["by_position"] for result in results), strict=True):
        assert a["nats"] == pytest.approx(b["nats"], abs=1e-5) and a["bytes"] == b["bytes"]
    json.dumps(results)
    longer = run_perplexity(subject, 2100, 1, texts=TEXTS)
    assert longer["length"] == 2100 > longer["made_for"]
    lines = table(longer).splitlines()
    assert lines[-2].endswith("beyond what it was made for") and len(lines) == 11
    pytest.importorskip("matplotlib")
    assert figures.draw_perplexity([*results, longer], tmp_path / "p.png").stat().st_size > 1000


def test_users_files_and_the_held_out_library(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text(TEXTS[0])
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    names = [str(tmp_path / "book.txt"), str(tmp_path / "lines.jsonl")]
    assert documents(names) == TEXTS[:2]
    found = run_perplexity(Known(tokenizer, torch.zeros_like), 200, 99, files=names)
    assert found["text"] == names and found["rows"] > 2
    held = documents()
    every = [document.text for document in find(LIBRARY).documents()]
    assert set(held) < set(every) and 0.2 * HELD_OUT < len(held) / len(every) < 3 * HELD_OUT


def test_perplexity_mistakes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    subject = Known(tokenizer, torch.zeros_like)
    (tmp_path / "empty.txt").write_text(" \n")
    asked: list[tuple[str, dict[str, Any]]] = [
        ("a row needs 100000", {"length": 100_000, "texts": TEXTS}),
        ("2 tokens or more", {"length": 1, "texts": TEXTS}),
        ("have no text", {"length": 2, "texts": TEXTS}),
        ("1 row or more", {"rows": 0, "texts": TEXTS}),
        ("no file or folder", {"files": [str(tmp_path / "nothing.txt")]}),
        ("there is no text", {"files": [str(tmp_path / "empty.txt")]}),
    ]
    for words, options in asked:
        with pytest.raises(UserError, match=words) as raised:
            run_perplexity(subject, **options)
        assert "\n" not in str(raised.value)
