"""Perplexity and bits per byte by position, up to several times the length a model was trained at.

    result = run_perplexity(subject, length=4096, rows=16)                 # Python's library
    result = run_perplexity(subject, length=4096, files=["book.txt"])      # your own text

Every row has `length` tokens, so each position is measured on the same texts: where a line over
positions rises, that is the position, not another kind of text. Rows lie in one document each
where there are enough documents so long; else all documents are read end to end ("joined").
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from hymba.eval.hay import Pen, TextError, documents
from hymba.eval.subject import Subject, rows_fit

Progress = Callable[[str, int, int | None], None]
FIRST_EDGE = 16  # buckets of positions double from here
LONGER = 4  # times what a subject was made for, at most, unless a length is asked for
LENGTH = 8192  # the same


def run_perplexity(
    subject: Subject,
    length: int = 0,
    rows: int = 16,
    files: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    batch: int = 4,
    texts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """At most `rows` rows of `length` tokens (0: `default_length`) of `files`, else of the part
    of Python's library that `hymba train` holds out. UserError where there is not one row, or the
    subject's positions end before."""
    length = length or default_length(subject)
    if length < 2 or rows < 1:
        raise TextError(f"{rows} rows of {length} tokens: give 1 row or more, of 2 tokens or more")
    texts = documents(files) if texts is None else texts
    some, joined = cut_rows(subject, texts, length, rows, seed)
    edges = bucket_edges(length)
    nats, sizes = torch.zeros(len(edges) - 1, dtype=torch.float64), [0] * (len(edges) - 1)
    pen = Pen(subject.tokenizer)
    for at in range(0, len(some), batch):
        part = some[at : at + batch]
        with rows_fit(length):
            said = subject.logprobs(part, batch)
        for row, logprobs in zip(part, said, strict=True):
            nats += sums(-logprobs.double(), edges)
            sizes = [a + b for a, b in zip(sizes, row_bytes(pen, row, edges), strict=True)]
        if progress is not None:
            progress("perplexity", min(at + batch, len(some)), len(some))
    labels = [len(some) * (b - a) for a, b in pairwise(edges)]
    return {
        "suite": "perplexity",
        "model": subject.name,
        "made_for": subject.most_tokens,
        "text": list(files) or ["python-library, the held-out part"],
        "joined": joined,
        "length": length,
        "rows": len(some),
        "seed": seed,
        **figures(float(nats.sum()), sum(labels), sum(sizes)),
        "edges": edges,
        "by_position": [
            figures(*three) for three in zip(nats.tolist(), labels, sizes, strict=True)
        ],
    }


def default_length(subject: Subject) -> int:
    """4 times the positions that the subject was made for, at most 8192 and as many as it has."""
    length = min(LENGTH, LONGER * subject.most_tokens)
    return length if subject.last_position is None else min(length, subject.last_position)


def figures(nats: float, tokens: int, size: int) -> dict[str, Any]:
    """Of so many tokens that stand for so many bytes."""
    each = nats / tokens
    return {
        "tokens": tokens,
        "bytes": size,
        "nats": each,
        "perplexity": math.exp(min(each, 700)),
        "bits_per_byte": nats / math.log(2) / size if size else None,
    }


def bucket_edges(length: int) -> list[int]:
    """Positions of predicted tokens, 0 the first: 0, 16, 32, 64, ... length - 1."""
    edges, last = [0], length - 1
    while edges[-1] < last:
        edges.append(min(max(FIRST_EDGE, 2 * edges[-1]), last))
    return edges


def sums(values: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """(length - 1,) to the sum of each bucket."""
    return torch.stack([values[a:b].sum() for a, b in pairwise(edges)])


def row_bytes(pen: Pen, row: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Bytes that each bucket's tokens stand for. Half a character at an edge counts as the mark
    that decoding shows for it, three bytes."""
    first = row[: edges[0] + 1]
    sizes = []
    before = len(pen.text(first).encode())
    for edge in edges[1:]:
        now = len(pen.text(row[: edge + 1]).encode())
        sizes.append(now - before)
        before = now
    return sizes


def cut_rows(
    subject: Subject, texts: Sequence[str], length: int, rows: int, seed: int
) -> tuple[list[list[int]], bool]:
    """Rows of exactly `length` tokens, and whether documents had to be joined for them."""
    pen, size = Pen(subject.tokenizer), length - len(subject.begin)
    if size < 2:
        raise TextError(f"rows of {length} tokens have no text: give 3 or more")
    order = list(texts)
    random.Random(f"perplexity {seed}").shuffle(order)
    whole: list[list[int]] = []
    every: list[int] = []
    for text in order:
        ids = pen.ids("\n" + text)
        whole += [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
        every += ids
        if len(whole) >= rows:
            break
    joined = len(whole) < min(rows, len(every) // size)
    if joined:
        whole = [every[at : at + size] for at in range(0, len(every) - size + 1, size)]
    if not whole:
        raise TextError(
            f"the text has {len(every)} tokens and a row needs {length}: give a shorter length, or"
            " more text"
        )
    return [[*subject.begin, *row] for row in whole[:rows]], joined


def table(result: dict[str, Any]) -> str:
    """A line for each bucket of positions."""
    lines = [f"{'positions':>17}  {'nats':>7}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>8}"]
    parts = zip(pairwise(result["edges"]), result["by_position"], strict=True)
    for (a, b), found in parts:
        beyond = "  beyond what it was made for" if b > result["made_for"] else ""
        lines.append(_line(f"{a:,} to {b - 1:,}", found) + beyond)
    return "\n".join([*lines, _line("all", result)])


def _line(name: str, found: dict[str, Any]) -> str:
    bits = "-" if found["bits_per_byte"] is None else f"{found['bits_per_byte']:.4f}"
    return (
        f"{name:>17}  {found['nats']:7.4f}  {found['perplexity']:10.2f}  {bits:>9}"
        f"  {found['tokens']:8,}"
    )
