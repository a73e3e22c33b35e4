"""Documents: found, read from any place on, split, told apart; what cannot be read says where."""

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba.train import sources
from hymba.train.readers import DataError, read
from hymba.train.sources import (
    Files,
    HubStream,
    Source,
    Texts,
    file,
    folder,
    key_of,
    python_library,
    split,
)


def texts_of(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def resumes_anywhere(source: Source) -> None:
    """Whoever goes on behind any document gets exactly those that follow it."""
    whole = list(source.documents())
    assert whole
    for number, document in enumerate(whole, 1):
        assert list(source.documents(document.after)) == whole[number:]
    done = [document.done for document in whole]
    assert done == sorted(done) and (source.size is None or done[-1] == source.size)


def test_python_library_is_real_text_without_tests_and_copies() -> None:
    files = python_library()
    assert len(files) > 300
    assert {"token.py", "json/decoder.py"} <= set(files.names)
    assert not [name for name in files.names if "/test/" in f"/{name}" or "encodings/" in name]
    texts = list(files)
    assert len(set(texts)) == len(texts)
    assert sum(len(text) for text in texts) > 5e6


def test_python_library_skips_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes("# é\r\n".encode())
    (tmp_path / "copy.py").write_bytes("# é\r\n".encode())
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_bytes(b"\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_bytes(b"x = 1\n")
    (tmp_path / "test.py").write_bytes(b"y = 1\n")
    files = python_library(tmp_path)
    assert files.names == ("copy.py", "test.py")
    assert list(files) == ["# é\r\n", "y = 1\n"]  # line ends as they are: bits per byte counts them
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no Python sources"):
        python_library(tmp_path / "bare")


def test_split_depends_on_each_name_alone(tmp_path: Path) -> None:
    many = Files(tmp_path, tuple(f"package/file_{i}.py" for i in range(4000)))
    train, held = split(many, percent=5)
    assert sorted(train.names + held.names) == sorted(many.names)
    assert 150 < len(held) < 250
    _, fewer = split(Files(tmp_path, many.names[::2]), percent=5)
    assert set(fewer.names) == set(held.names) & set(many.names[::2])
    with pytest.raises(DataError, match="cannot be split"):
        split(Files(tmp_path, ("a.py",)))


def test_which_files_are_held_out_never_changes() -> None:
    """Results name bits per byte on these files; another hash would make them incomparable."""
    _, held = split(python_library())
    assert {"copyreg.py", "sched.py", "token.py"} <= set(held.names)


def test_files_tell_what_they_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        list(Files(tmp_path, ("a.txt",)))


# ---- files of text


@given(
    text=st.text(st.sampled_from("ab é🦊\n\r "), max_size=60),
    piece=st.integers(4, 20),
)
def test_a_long_text_is_cut_into_pieces_that_are_the_text(
    text: str, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PAGE", piece)
        found = list(read(path, "", 0, piece))
        assert "".join(part for part, _ in found) == text
        assert all(0 < len(part.encode()) <= piece for part, _ in found)
        ends = [sum(len(p.encode()) for p, _ in found[: i + 1]) for i in range(len(found))]
        assert [end for _, end in found] == ends
        for part, _ in found[:-1]:  # cut inside a line only where it has no other end
            assert part.endswith("\n") or ("\n" not in part)
        if found:
            resumes_anywhere(file(path))


def test_every_file_is_one_document_held_out_by_its_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(f"text of {name}")
    found = list(folder(tmp_path).documents())
    assert [d.key for d in found] == [key_of("a.txt"), key_of("b.md")]


def test_a_file_alone_is_read_in_pages_held_out_by_their_text(tmp_path: Path) -> None:
    """By its name all of it or nothing would be held out."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a book\n" for i in range(20_000)))
    found = list(file(path).documents())
    assert len(found) == -(-path.stat().st_size // sources.PAGE) and {d.key for d in found} == {
        None
    }
    assert "".join(d.text for d in found) == path.read_text()
    assert len(list(folder(tmp_path).documents())) == 1
    assert folder(tmp_path).fingerprint != file(path).fingerprint


# ---- JSON lines


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_documents_held_out_by_their_text(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f"é {i} \u2028"} for i in range(50)]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n  \n"
    path = tmp_path / f"rows{ending}"
    packed = gzip.compress if ending.endswith("gz") else bytes
    path.write_bytes(packed(content.encode()))
    source = file(path)
    assert texts_of(source) == [row["text"] for row in rows]
    assert {document.key for document in source.documents()} == {None}
    whole = list(source.documents())
    assert list(source.documents(whole[30].after)) == whole[31:]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a', "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('"text"', "line 3 is no JSON object"),
        ('{"body": "x", "n": 1}', r'line 3 has no "text" \(it has body, n\)'),
        ("{}", r'line 3 has no "text" \(it has nothing\)'),
        ('{"text": 7}', 'line 3: "text" is int, not text'),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str | bytes, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "good"}\n\n' + content + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=said) as error:
        texts_of(file(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_another_key_and_null(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"body": "x"}, {"body": None}, {"body": ""}])
    assert texts_of(file(path, "body")) == ["x", "", ""]
    assert file(path, "body").fingerprint != file(path).fingerprint


def test_a_gzip_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(os.urandom(3000).hex().encode())
    for content in (packed[:-900], b"no gzip", packed[:20] + b"\0" * 99 + packed[120:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz (is no whole gzip|, line|is not)"):
            texts_of(file(tmp_path / "a.jsonl.gz"))


# ---- parquet


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": range(len(texts)), column: texts}), path, 7)
    return path


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(40)] + [None]
    path = write_parquet(tmp_path / "a.parquet", texts)  # in row groups of 7
    assert texts_of(file(path)) == [*texts[:-1], ""]
    resumes_anywhere(file(path))


def test_what_is_wrong_with_parquet_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"], "body")
    with pytest.raises(DataError, match=r'no column "text" \(it has n, body\)'):
        texts_of(file(path))
    with pytest.raises(DataError, match='row 1: "n" is int'):
        texts_of(file(path, "n"))
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"b\.parquet is no whole parquet file"):
        texts_of(file(tmp_path / "b.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'hymba\[data\]'"):
        texts_of(file(path))


# ---- folders


def test_a_folder_is_all_that_can_be_read_below_it(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "b.TXT").write_text("plain")
    write_lines(tmp_path / "sub" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write_parquet(tmp_path / "sub" / "c.parquet", ["three"])
    for name in (".hidden.txt", "sub/.git/x.txt", "image.png", "empty.txt"):
        (tmp_path / name).write_text("" if "empty" in name else "not wanted")
    source = folder(tmp_path)
    assert source.names == ("b.TXT", "empty.txt", "sub/a.jsonl", "sub/c.parquet")
    assert texts_of(source) == ["plain", "one", "two", "three"]
    resumes_anywhere(source)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none holds no text files: .*\.jsonl"):
        folder(tmp_path / "none")


def test_kinds_that_are_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"give plain text, JSON lines"):
        file(tmp_path / "a.json")
    gone = Files(tmp_path, ("a.json",))
    (tmp_path / "a.json").chmod(0)
    if os.geteuid():
        with pytest.raises(DataError, match="cannot be read"):
            texts_of(gone)


def test_texts_in_memory_resume(texts: Texts) -> None:
    resumes_anywhere(texts)


# ---- datasets


class Stream(list):
    def skip(self, count: int) -> "Stream":
        return Stream(self[count:])


def test_a_dataset_is_named_by_name_config_and_split() -> None:
    assert HubStream.parse("a/b") == HubStream("a/b", None, "train")
    assert HubStream.parse("a/b:en:test", "body") == HubStream("a/b", "en", "test", "body")
    assert HubStream.parse("a/b::test") == HubStream("a/b", None, "test")
    for wrong in ("", ":en", "a:b:c:d"):
        with pytest.raises(DataError, match="no dataset"):
            HubStream.parse(wrong)


def test_a_folder_of_json_lines_is_a_dataset_too(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "n": i} for i in range(20)]
    write_lines(tmp_path / "train.jsonl", rows)
    source = HubStream.parse(str(tmp_path))
    assert texts_of(source) == [row["text"] for row in rows]
    place = list(source.documents())[11].after
    assert [d.text for d in source.documents(place)] == [row["text"] for row in rows[12:]]
    before = source.fingerprint
    write_lines(tmp_path / "train.jsonl", rows[:5])
    assert HubStream.parse(str(tmp_path)).fingerprint != before
    with pytest.raises(DataError, match=r'row 1 has no "body" \(it has text, n\)'):
        texts_of(HubStream.parse(str(tmp_path), "body"))


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Stream:
        raise ConnectionError("no network\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(DataError, match=r"^hf:a/b::train cannot be opened \(no network\)[^\n]*$"):
        texts_of(HubStream("a/b"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets: pip install 'hymba\[data\]'"):
        texts_of(HubStream("a/b"))


def test_a_stream_that_breaks_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Stream):
        def __iter__(self) -> Any:
            yield from ({"text": str(i)} for i in range(3))
            raise TimeoutError("gone")

    load = lambda *_, **__: Breaking()  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(DataError, match=r"ended after 3 rows \(gone\)"):
        texts_of(HubStream("a/b"))
