"""Small files that are whole or not there."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hymba.files import filled, is_empty, is_leftover, write_json, write_text


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_what_a_kill_leaves_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    write_text(tmp_path / "a.json", "")
    (left,) = tmp_path.iterdir()
    assert is_leftover(left)
    for name in ("a.json", ".hidden", ".a.json.7", "x.7-0123abcd"):
        assert not is_leftover(tmp_path / name)


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_text(path, str(i) * 100), range(200)))
    assert len(path.read_text()) % 100 == 0 and list(tmp_path.iterdir()) == [path]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"command": "caf\udce9"})
    assert json.loads((tmp_path / "a").read_text()) == {"command": "caf\udce9"}
    write_text(tmp_path / "b", "caf\udce9")
    assert (tmp_path / "b").read_bytes() == b"caf\xe9"


def test_files_of_a_folder_come_together(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with filled(folder) as place:
        (place / "a").write_text("1")
        (place / "b").write_text("1")
        assert is_empty(folder)
    with filled(folder, replaced=["b", "c"]) as place:
        (place / "a").write_text("2")
        assert (folder / "a").read_text() == "1"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "2"}


def test_a_folder_that_could_not_be_filled_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("1")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), filled(tmp_path / name) as place:
            (place / "a").write_text("2")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.read_text() for path in (tmp_path / "old").iterdir()] == ["1"]


def test_the_next_to_fill_a_folder_removes_what_a_kill_left(tmp_path: Path) -> None:
    left = tmp_path / ".new.12-0123abcd"
    left.mkdir()
    (left / "weights.bin").write_text("half")
    assert is_empty(tmp_path)
    with filled(tmp_path):
        assert not left.exists()


def test_a_linked_folder_is_filled_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with filled(tmp_path / "link") as place:
        (place / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "1"
