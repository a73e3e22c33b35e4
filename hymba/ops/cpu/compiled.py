"""How kernels are compiled: four kinds of function, and a cache on disk that cannot be stale.

    kernel   called by other kernels
    pointer  called by kernels, through its address
    entry    called by Python, without the GIL
    job      called by every thread of a team (team.py), through its address

numba keeps compiled entries and jobs in files, but looks only at the source of the function itself:
a change in a kernel that it calls would go unseen, and old code run. So they are kept in a folder
named after the sources of all kernels, the versions and the CPU:
$XDG_CACHE_HOME/hymba/numba-<hash> (~/.cache without that variable). Where that cannot be written,
each process compiles for itself.

Kernels that a function makes (of so many bits, or rows) need names of their own: what two processes
compiled and a third one loads is put together by name, and a kernel that is called like another one
may then be replaced by it. So a name tells what its kernel was made with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding

PACKAGE = Path(__file__).resolve().parents[2]
FOLDERS = ("ops/cpu", "engine/cpu")  # where kernels live
UNUSED_DAYS = 30  # after which what other versions left behind is removed
OPTIONS = {"error_model": "numpy"}  # a division by zero is not an exception


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled with what calls it."""
    name_apart(function)
    return numba.njit(nogil=True, **OPTIONS)(function)


def name_apart(function: Callable[..., Any]) -> None:
    """Let its name tell what it closes over."""
    if function.__closure__:
        inside = [_told(cell.cell_contents) for cell in function.__closure__]
        mark = hashlib.sha256(repr(inside).encode()).hexdigest()[:12]
        function.__name__ += f"_{mark}"
        function.__qualname__ += f"_{mark}"


def _told(inside: Any) -> str:
    """A number as it is; another kernel or operation by its name, which tells the rest."""
    inside = getattr(inside, "py_func", inside)
    return str(getattr(inside, "__qualname__", inside))


def entry(function: Callable[..., Any]) -> Any:
    """Compiled at its first call from Python, or found on disk."""
    with _kept() as keep:
        return numba.njit(nogil=True, cache=keep, **OPTIONS)(function)


class pointer:
    """A function of int64 values that returns nothing, called by kernels through its address: it is
    compiled by itself, where a kernel would be compiled again with each that calls it."""

    def __init__(self, function: Callable[..., None]):
        self.function = function
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Any:
        kind = numba.void(*[numba.int64] * self.function.__code__.co_argcount)
        named = not self.function.__closure__  # else numba would never find it again
        with _kept() as keep:
            return numba.cfunc(kind, cache=keep and named, **OPTIONS)(self.function)

    @cached_property
    def address(self) -> int:
        return int(self.compiled.address)


class job(pointer):
    """What all threads of a team run: function(thread, threads, phases, arguments), int64 all.

    `thread` counts from 0, the caller's. `phases` and `arguments` are addresses: of the phases'
    counters (see team.py), and of the int64 values that were given to `Team.run`."""


@contextmanager
def _kept() -> Iterator[bool]:
    """numba looks at its folder when a function is decorated, so it is ours only then."""
    ours, theirs = folder(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(ours or theirs)
    try:
        yield ours is not None
    finally:
        numba.config.CACHE_DIR = theirs


@cache
def folder() -> Path | None:
    """Where compiled kernels are kept, made if need be; None where nothing can be written."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hymba"
        path = root / f"numba-{_fingerprint()}"
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            _remove_unused(root)
        with tempfile.TemporaryFile(dir=path):
            os.utime(path)  # in use
        return path
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def _fingerprint() -> str:
    told = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_CPU_")}
    parts = [sys.version, numba.__version__, llvmlite.__version__, binding.get_host_cpu_name()]
    digest = hashlib.sha256(repr((parts, sorted(told.items()))).encode())
    digest.update(binding.get_host_cpu_features().flatten().encode())
    for where in FOLDERS:
        for path in sorted((PACKAGE / where).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _remove_unused(root: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in root.glob("numba-*"):
        if path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
