"""A corpus as token ids on disk, made once: shards that are memory-mapped, and a manifest.

    store/manifest.json     what it was made of (tokenizer, source), counts, the shards
          00000.bin         token ids of whole documents, end to end
          00000.npy         int64 (documents, 4): tokens, bytes, two hashes (see `DOCUMENT`)

A document is stored as  <s> t1 t2 ... tn </s>  and read as n+1 pairs of input and label (rows.py).
It lies in one shard, whatever its length; a shard ends with the document that fills it.

A store appears whole or not at all: it is written beside its place and renamed. What a killed
preparation has written of it is kept shard by shard, and the next one goes on from there. Two
processes that want one store do not meet: the second waits, and finds it made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hymba.tokenizer import Tokenizer
from hymba.train.readers import DataError
from hymba.train.sources import BEGIN, Document, Place, Source, digest, key_of

try:
    import fcntl
except ImportError:  # Windows: there one command at a time must prepare a store
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int | None], None]  # how much is done, of how much (None: unknown)

FORMAT = 2  # of a token store; a store of another format is made again
SHARD_TOKENS = 64 << 20
SHARD_DOCUMENTS = 1 << 20
ENCODE_AT_ONCE = 64  # documents per call into the tokenizer, which spreads them over the cores,
ENCODE_BYTES = 1 << 20  # or fewer, of about so many bytes: it needs 80 for each
# Columns of a shard's documents: tokens with <s> and </s>, UTF-8 bytes of the text, the key that
# decides whether it is held out, and a hash of the text, by which copies are known.
DOCUMENT = ("tokens", "bytes", "key", "hash")
NAMES = {"plan": "unfinished.json", "manifest": "manifest.json", "lock": "lock"}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents of one corpus, or of several, or of a part of one, as token ids.

    manifest: documents, tokens, bytes, and of a whole store also what it was made of.
    files, ends: the shards' token files, and how many tokens lie before the end of each.
    documents: (documents, 4) as in `DOCUMENT`; starts: (documents,), where each begins.
    identity: equal exactly when tokens and order of the documents are (for resuming).
    """

    manifest: dict[str, Any]
    files: tuple[Path, ...]
    ends: tuple[int, ...]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    identity: str

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`; DataError where there is none or it is damaged."""
        try:
            manifest = json.loads((folder / NAMES["manifest"]).read_text())
            shards = manifest["shards"]
            good = all(_is_whole(folder, i, shard, manifest) for i, shard in enumerate(shards))
            documents = np.concatenate([np.load(_facts(folder, i)) for i in range(len(shards))])
            good = good and documents.shape == (manifest["documents"], len(DOCUMENT))
            good = good and int(documents[:, 0].sum()) == manifest["tokens"]
            made_of = f"{manifest['tokenizer'][:16]}-{manifest['source'][:16]}"
            most = manifest["most_tokens"]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{folder} is no token store: {error}") from error
        if not good:
            raise DataError(f"the token store {folder} is damaged: delete it to make it again")
        return cls(
            manifest,
            tuple(_tokens(folder, i) for i in range(len(shards))),
            tuple(np.cumsum([shard["tokens"] for shard in shards]).tolist()),
            documents,
            np.cumsum(documents[:, 0]) - documents[:, 0],
            made_of if most is None else f"{made_of}-{most}",
        )

    @classmethod
    def joined(cls, stores: Sequence[TokenStore]) -> TokenStore:
        """Several stores of one tokenizer as one, end to end."""
        if len(stores) == 1:
            return stores[0]
        before = np.cumsum([0, *(store.ends[-1] for store in stores)]).tolist()
        pairs = list(zip(stores, before, strict=False))
        documents = np.concatenate([store.documents for store in stores])
        return cls(
            {"dtype": stores[0].manifest["dtype"], **_counts(documents)},
            tuple(path for store in stores for path in store.files),
            tuple(end + shift for store, shift in pairs for end in store.ends),
            documents,
            np.concatenate([store.starts + shift for store, shift in pairs]),
            "joined-" + digest(store.identity for store in stores)[:32],
        )

    # ---- parts

    def part(self, wanted: NDArray[np.bool_], name: str) -> TokenStore:
        """The documents where `wanted` (documents,) holds; `name` tells this part from others."""
        documents = self.documents[wanted]
        return TokenStore(
            {"dtype": self.manifest["dtype"], **_counts(documents)},
            self.files,
            self.ends,
            documents,
            self.starts[wanted],
            f"{self.identity}-{name}",
        )

    def split(self, percent: float) -> tuple[TokenStore, TokenStore]:
        """(train, held out): held out are the documents whose keys are in the first `percent`.

        Either may have no documents. No text is in both: copies of held-out ones are left out.
        """
        held = self.documents[:, 2] < percent / 100 * 2.0**63
        train = self.part(~held, f"train-{percent:g}")
        return train.without(out := self.part(held, f"held-{percent:g}")), out

    def without(self, other: TokenStore) -> TokenStore:
        """The documents whose text is not in `other`."""
        copies = np.isin(self.documents[:, 3], other.documents[:, 3])
        if not copies.any():
            return self
        return self.part(~copies, f"without-{digest([other.identity])[:16]}")

    # ---- reading

    def read(self, first: int, count: int) -> NDArray[Any]:
        """`count` token ids from place `first` on (fewer at the end), from disk as touched."""
        found = []
        shard = bisect_right(self.ends, first)
        while count > 0 and shard < len(self.files):
            begin = self.ends[shard - 1] if shard else 0
            found.append(self._map(shard)[first - begin : first - begin + count])
            first, count, shard = first + len(found[-1]), count - len(found[-1]), shard + 1
        if len(found) == 1:  # as always within a document
            return found[0]
        return np.concatenate(found or [np.empty(0, self.manifest["dtype"])])

    def _map(self, shard: int) -> NDArray[Any]:
        if shard not in self._maps:
            dtype = np.dtype(self.manifest["dtype"])
            self._maps[shard] = np.memmap(self.files[shard], dtype=dtype, mode="r")
        return self._maps[shard]

    @cached_property
    def _maps(self) -> dict[int, NDArray[Any]]:
        return {}

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """(documents,): pairs of input and label that each document gives."""
        pairs: NDArray[np.int64] = self.documents[:, 0] - 1
        return pairs

    @property
    def bytes_per_label(self) -> float:
        """Mean UTF-8 bytes that one predicted token stands for."""
        return float(self.documents[:, 1].sum() / self.pairs.sum())


def _counts(documents: NDArray[np.int64]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "tokens": int(documents[:, 0].sum()),
        "bytes": int(documents[:, 1].sum()),
    }


def _tokens(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.bin"


def _facts(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.npy"


def _is_whole(folder: Path, shard: int, record: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a shard's files are as long as it says."""
    size = record["tokens"] * np.dtype(made["dtype"]).itemsize
    least = record["documents"] * len(DOCUMENT) * 8
    good = _tokens(folder, shard).stat().st_size == size
    return good and _facts(folder, shard).stat().st_size > least


# ------------------------------------------------------------------------------------- preparing


def prepare(
    folder: str | Path,
    source: Source,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    most_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """The token store of `source` in `folder`: the one that is there if it fits, else a new one.

    With `most_tokens` the source is read no further than the document that reaches them. Empty
    documents are left out. Memory is that of the largest document, not of the corpus.
    """
    folder = Path(folder)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise DataError("the tokenizer names no tokens that begin and end a document")
    wanted = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "source": source.fingerprint,
        "most_tokens": most_tokens,
        "dtype": "<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
    }
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    while (store := _fitting(folder, wanted)) is None:
        _refuse_other_things(folder)
        with _claimed(unfinished) as ours:
            # Another process may have finished while we waited.
            if ours and _fitting(folder, wanted) is None:
                work = _Preparation(unfinished, wanted, source, tokenizer, progress)
                work.run(shard_tokens)
                _put_in_place(unfinished, folder)
            elif ours:
                shutil.rmtree(unfinished)
    return store


def _fitting(folder: Path, wanted: dict[str, Any]) -> TokenStore | None:
    try:
        store = TokenStore.open(folder)
    except DataError:
        return None  # absent or damaged: made again
    return store if wanted.items() <= store.manifest.items() else None


def _refuse_other_things(folder: Path) -> None:
    """A folder that is in the way is replaced only if it is a token store."""
    if folder.exists() and not (folder / NAMES["manifest"]).is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise DataError(f"{folder} is no token store: name another folder for the tokens")


@contextmanager
def _claimed(place: Path) -> Iterator[bool]:
    """Make a folder and hold it against other processes, waiting for one that holds it.

    False if it was renamed or deleted meanwhile. The lock ends with the process, however it ends.
    """
    place.mkdir(parents=True, exist_ok=True)
    try:
        file = open(place / NAMES["lock"], "w")
    except FileNotFoundError:  # gone between these two lines
        yield False
        return
    with file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(place / NAMES["lock"]))
        except FileNotFoundError:
            same = False
        yield same


def _put_in_place(unfinished: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(unfinished, folder)
    shutil.rmtree(old, ignore_errors=True)
    (folder / NAMES["plan"]).unlink()  # not before: a kill here must cost nothing
    (folder / NAMES["lock"]).unlink()  # who waits for it sees that it is gone


class _Encoded(NamedTuple):
    document: Document
    tokens: bytes
    facts: tuple[int, int, int, int]


class _Preparation:
    """One store being written; its whole shards and where the source goes on are in a file."""

    def __init__(
        self,
        folder: Path,
        wanted: dict[str, Any],
        source: Source,
        tokenizer: Tokenizer,
        progress: Progress | None,
    ) -> None:
        self.folder, self.wanted, self.source, self.tokenizer = folder, wanted, source, tokenizer
        self.progress, self.size = progress, source.size
        self.shards = self._whole_shards()
        self.tokens = sum(shard["tokens"] for shard in self.shards)

    def run(self, shard_tokens: int) -> None:
        start: Place = tuple(self.shards[-1]["after"]) if self.shards else BEGIN
        try:
            self._save_plan()
            encoded = self._encoded(start)
            while record := self._write_shard(encoded, shard_tokens):
                self.shards.append(record)
                self._save_plan()
            if not self.shards:
                raise DataError("there are no documents to tokenise")
            totals = {key: sum(shard[key] for shard in self.shards) for key in _KEYS}
            self._save(NAMES["manifest"], {**self.wanted, **totals, "shards": self.shards})
        finally:
            if not self.shards:  # nothing to go on from
                shutil.rmtree(self.folder)

    def _whole_shards(self) -> list[dict[str, Any]]:
        """What an earlier preparation of the same store has done; all else is deleted."""
        whole: list[dict[str, Any]] = []
        try:
            plan = json.loads((self.folder / NAMES["plan"]).read_text())
            if self.wanted.items() <= plan.items():
                for number, shard in enumerate(plan["shards"]):
                    if not _is_whole(self.folder, number, shard, self.wanted):
                        break
                    whole.append(shard)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        kept = {name(self.folder, i) for i in range(len(whole)) for name in (_tokens, _facts)}
        for path in self.folder.iterdir():
            if path not in kept and path.name != NAMES["lock"]:
                path.unlink()
        return whole

    def _save_plan(self) -> None:
        self._save(NAMES["plan"], {**self.wanted, "shards": self.shards})

    def _save(self, name: str, content: dict[str, Any]) -> None:
        """Write a small file whole or not at all, after all that it speaks of."""
        unfinished = self.folder / f"{name}.unfinished"
        with open(unfinished, "w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            _flush(file)
        os.replace(unfinished, self.folder / name)

    def _write_shard(self, encoded: Iterator[_Encoded], room: int) -> dict[str, Any] | None:
        """Write the next shard; None at the end of the source."""
        number, many, tokens = len(self.shards), len(DOCUMENT), 0
        facts, after = array("q"), BEGIN
        with open(_tokens(self.folder, number), "wb") as file:
            for one in encoded:
                file.write(one.tokens)
                facts.extend(one.facts)
                after = one.document.after
                tokens += one.facts[0]
                if tokens >= room or len(facts) >= many * SHARD_DOCUMENTS:
                    break
            _flush(file)
        if not facts:
            _tokens(self.folder, number).unlink()
            return None
        table = np.array(facts, np.int64).reshape(-1, many)  # (documents, 4)
        with open(_facts(self.folder, number), "wb") as file:
            np.save(file, table)
            _flush(file)
        return {**_counts(table), "after": list(after)}

    def _encoded(self, start: Place) -> Iterator[_Encoded]:
        """Documents from `start` on as they are stored, until there are `most_tokens`."""
        bos, eos, dtype = self.tokenizer.bos_id, self.tokenizer.eos_id, self.wanted["dtype"]
        most = math.inf if self.wanted["most_tokens"] is None else self.wanted["most_tokens"]
        for batch in _batches(self.source.documents(start)):
            if self.tokens >= most:
                return
            texts = [document.text for document in batch]
            for document, ids in zip(batch, self.tokenizer.encode_batch(texts), strict=True):
                if self.tokens >= most:
                    break
                size, summary = len(document.text.encode()), key_of(document.text)
                key = summary if document.key is None else document.key
                self.tokens += len(ids) + 2
                tokens = np.array([bos, *ids, eos], dtype).tobytes()
                yield _Encoded(document, tokens, (len(ids) + 2, size, key, summary))
            self._tell(document)

    def _tell(self, last: Document) -> None:
        if self.progress is None:
            return
        most, size = self.wanted["most_tokens"], self.size
        if most is not None and (size is None or self.tokens * size > last.done * most):
            self.progress(min(self.tokens, most), most)
        else:
            self.progress(last.done, size)


_KEYS = ("documents", "tokens", "bytes")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """As many documents as go into the tokenizer at once; empty ones are left out."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if not document.text:
            continue
        batch.append(document)
        size += len(document.text)
        if len(batch) == ENCODE_AT_ONCE or size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _flush(file: IO[Any]) -> None:
    """Force to disk, so that no record outlives what it speaks of."""
    file.flush()
    os.fsync(file.fileno())
