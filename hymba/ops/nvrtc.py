"""CUDA sources (cuda/) compiled at run time by NVRTC, through cuda-core, and launched.

Optional (`pip install 'hymba[gpu]'`): every op that has such a source has a Triton twin, which
serves where cuda-core is missing, or HYMBA_CUDA=0 is set. A kernel is a template; it is compiled
for its arguments when they are first met, in a second or two, once a process and device.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("hymba")


@cache
def present() -> bool:
    """Whether a kernel can be compiled and loaded on the current device."""
    if os.environ.get("HYMBA_CUDA") == "0" or not torch.cuda.is_available():
        return False
    try:
        from cuda.core import LaunchConfig

        LaunchConfig(grid=1, block=1, programmatic_stream_serialization=True)  # from 1.2 on
        _kernel(lambda _: "__global__ void nothing() {}", "nothing", _current())
    except ImportError:
        return False
    except Exception as error:  # NVRTC is looked for at its first use, in ways of its own
        log.warning("hymba: CUDA sources can't be compiled (%s); Triton's kernels serve", error)
        return False
    return True


def launch(
    source: Callable[[str], str],
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
    *args: Any,
    chained: bool = False,
) -> None:
    """Run kernel `name`, template arguments included, of the text source(name), on torch's current
    stream. args: tensors (of that device), None for a null pointer, numpy's numbers. chained: put
    in place before the kernel in front has ended (`chain_triton`)."""
    from cuda import core

    index = _current() if device.index is None else device.index
    with torch.cuda.device(index):
        if getattr(_thread, "index", None) != index:  # its first kernel may be this one
            core.Device(index).set_current()
            _thread.index = index
        kernel = _kernel(source, name, index)
        _make_room(kernel, name, shared, index)
        stream = _stream(torch.cuda.current_stream(index).cuda_stream, index)
        more = {"programmatic_stream_serialization": True} if chained else {}
        config = core.LaunchConfig(grid=grid, block=threads, shmem_size=shared, **more)
        core.launch(stream, config, kernel, *(_pointer(x, index) for x in args))


_thread = threading.local()


def _current() -> int:
    return torch.cuda.current_device()


@cache
def _kernel(source: Callable[[str], str], name: str, index: int) -> Any:
    """The compiled kernel on a device."""
    from cuda.core import Device, Program, ProgramOptions

    device = Device(index)
    device.set_current()
    major, minor = device.compute_capability
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}", ftz=True)
    built = Program(source(name), "c++", options=options).compile("cubin", name_expressions=(name,))
    return built.get_kernel(name)


_rooms: dict[tuple[str, int], int] = {}  # of kernels and devices: shared memory asked for so far


def _make_room(kernel: Any, name: str, shared: int, index: int) -> None:
    """Ask for dynamic shared memory; without, 48 KiB are the most, static memory included."""
    if shared <= _rooms.get((name, index), 0):
        return
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, index)
    if status:
        raise RuntimeError(f"{name}: {shared} bytes of shared memory refused: {status!r}")
    _rooms[name, index] = shared


class _Stream:
    """torch's current stream, as cuda-core knows streams."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def _stream(pointer: int, index: int) -> Any:
    from cuda.core import Device

    device = Device(index)
    device.set_current()  # cuda-core's devices are a thread's own
    return device.create_stream(_Stream(pointer))


def _pointer(x: Any, index: int) -> Any:
    if not isinstance(x, Tensor):
        return 0 if x is None else x
    if x.device.index != index:
        raise ValueError(f"a kernel runs on cuda:{index} and was given {x.device}")
    return x.data_ptr()
