"""What is compiled is found again by the next process, never after a change, and works without a
place to keep it; kernels of one name do not take each other's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hymba.ops.cpu import compiled

COUNT = """
import sys
import numpy as np
from hymba.ops.cpu import compiled
from hymba.ops.cpu.team import Team, _alone
from tests.ops.cpu.test_team import run
run(Team(1))
print(sum(_alone.stats.cache_hits.values()), compiled.folder())
"""


def alone(code: str, home: Path, **env: str) -> str:
    env = os.environ | {"XDG_CACHE_HOME": str(home)} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kept_for_the_next_process(tmp_path: Path) -> None:
    first, second = (alone(COUNT, tmp_path) for _ in range(2))
    (folder,) = (tmp_path / "hymba").iterdir()
    assert first == f"0 {folder}" and second == f"1 {folder}"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX paths")
def test_works_where_nothing_can_be_written() -> None:
    assert alone(COUNT, Path("/dev/null/nowhere")) == "0 None"


def test_another_source_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops/cpu").mkdir(parents=True)
    (tmp_path / "engine/cpu").mkdir(parents=True)
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    seen = {compiled._fingerprint()}
    for name, text in (("ops/cpu/a.py", ""), ("engine/cpu/a.py", ""), ("ops/cpu/a.py", "1")):
        (tmp_path / name).write_text(text)
        seen.add(compiled._fingerprint())
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert len(seen | {compiled._fingerprint()}) == 5


def test_what_was_long_unused_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, days in (("numba-old", 31), ("numba-new", 29), ("other", 99)):
        (tmp_path / "hymba" / name).mkdir(parents=True)
        then = compiled.time.time() - days * 24 * 3600
        os.utime(tmp_path / "hymba" / name, (then, then))
    compiled.folder.cache_clear()
    made = compiled.folder()
    compiled.folder.cache_clear()
    assert {path.name for path in (tmp_path / "hymba").iterdir()} == {
        "numba-new",
        "other",
        made.name,
    }


ONE = """
import torch
from hymba.ops.cpu.tiles import packed_linear
from tests.ops.cpu.test_tiles import SCHEMES, activations, dequantize, error, matrix
for name, exact in {asked}:
    packed, x = matrix(40, 100, SCHEMES[name]), activations(3, 100)
    off = error(packed_linear(x, packed, exact), x.double() @ dequantize(packed).double().T)
    assert (off < 2e-6) is exact and off < 2e-2, (name, exact, off)
"""


@pytest.mark.slow
def test_compiled_apart_and_loaded_together(tmp_path: Path) -> None:
    """Each process numbers its functions anew, so that of two files the names are the same."""
    asked = [("int4", False), ("int4", True)]
    for one in asked:
        alone(ONE.format(asked=[one]), tmp_path)
    alone(ONE.format(asked=asked), tmp_path)


def test_names_tell_what_is_inside() -> None:
    def make(bits: int, inner: object) -> object:
        @compiled.kernel
        def run() -> int:
            return bits if inner is None else inner()  # type: ignore[operator]

        return run

    one, two = make(4, None), make(8, None)
    names = {x.py_func.__qualname__ for x in (one, two, make(4, one), make(4, two))}
    assert len(names) == 4
    assert make(4, None).py_func.__qualname__ in names
