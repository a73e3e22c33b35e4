"""Documents: found, split and told apart, the same on every machine."""

from pathlib import Path

import pytest

from hymba.train.sources import DataError, Files, python_library, split


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
