"""A corpus as token ids on disk: made once, memory-mapped, whole or not there at all.

A document is stored as  <s> t1 t2 ... tn </s>  and read as n+1 pairs of input and label (rows.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hymba.tokenizer import Tokenizer
from hymba.train.sources import DataError, Source

Progress = Callable[[int, int], None]  # documents done, documents in all

FORMAT = 1  # of a token store; a store of another format is made again
ENCODE_AT_ONCE = 64  # documents per call into the tokenizer, which spreads them over the cores


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a corpus in a folder: tokens.bin (flat ids), documents.npy and manifest.json.

    `manifest`: format, dtype, tokenizer and source (fingerprints), documents, tokens, bytes.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`; DataError where there is none or it is damaged."""
        try:
            store = cls(folder, json.loads((folder / "manifest.json").read_text()))
            whole = store.manifest["tokens"] * np.dtype(store.manifest["dtype"]).itemsize
            good = (folder / "tokens.bin").stat().st_size == whole
            good = good and store.documents.shape == (store.manifest["documents"], 2)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no token store: {error}") from error
        if not good:
            raise DataError(f"the token store {folder} is damaged: delete it to make it again")
        return store

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All documents end to end, (tokens,), read from disk as touched."""
        dtype = np.dtype(self.manifest["dtype"])
        return np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r")

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """(documents, 2): tokens with <s> and </s>, and UTF-8 bytes of the text."""
        loaded: NDArray[np.int64] = np.load(self.folder / "documents.npy")
        return loaded

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(documents,): where each document begins in `tokens`."""
        lengths = self.documents[:, 0]
        return np.cumsum(lengths) - lengths

    @property
    def pairs(self) -> NDArray[np.int64]:
        """(documents,): pairs of input and label that each document gives."""
        return self.documents[:, 0] - 1

    @property
    def bytes_per_label(self) -> float:
        """Mean UTF-8 bytes that one predicted token stands for."""
        return float(self.documents[:, 1].sum() / self.pairs.sum())

    @property
    def identity(self) -> str:
        """Equal exactly when tokens and order of the documents are (for resuming)."""
        return f"{self.manifest['tokenizer'][:16]}-{self.manifest['source'][:16]}"


def prepare(
    folder: str | Path, source: Source, tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenStore:
    """The token store of `source` in `folder`: the one that is there if it fits, else a new one.

    A new one appears whole or not at all: it is written beside its place and renamed.
    """
    folder = Path(folder)
    wanted = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "source": source.fingerprint,
    }
    try:
        store = TokenStore.open(folder)
        if wanted.items() <= store.manifest.items():
            return store
    except DataError:
        pass  # absent or damaged: made again below
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        counts = _write_tokens(unfinished, source, tokenizer, progress)
        (unfinished / "manifest.json").write_text(json.dumps(wanted | counts, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore.open(folder)


def _write_tokens(
    folder: Path, source: Source, tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, Any]:
    """Write tokens.bin and documents.npy; return the manifest's counts."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or eos is None:
        raise DataError("the tokenizer names no tokens that begin and end a document")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    sizes: list[tuple[int, int]] = []
    documents = iter(source)
    with open(folder / "tokens.bin", "wb") as file:
        while texts := list(islice(documents, ENCODE_AT_ONCE)):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                file.write(np.array([bos, *ids, eos], dtype).tobytes())
                sizes.append((len(ids) + 2, len(text.encode())))
            if progress:
                progress(len(sizes), len(source))
    if not sizes:
        raise DataError("there are no documents to tokenise")
    counts = np.array(sizes, np.int64)  # (documents, 2)
    np.save(folder / "documents.npy", counts)
    return {
        "dtype": dtype.str,
        "documents": len(sizes),
        "tokens": int(counts[:, 0].sum()),
        "bytes": int(counts[:, 1].sum()),
    }
