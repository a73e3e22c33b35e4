"""How much an engine takes: what may be said, and what it makes of the memory there is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hymba.config import KV_BLOCK, Config
from hymba.engine.store import Sizes
from hymba.errors import UserError

GPU_SHARE = 0.85  # of a GPU's free memory, less what a step's activations take
HOST_SHARE = 0.25  # of a machine's memory
PREFIX_SHARE = 0.125  # of the cache, for beginnings kept for later
KV_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Limits:
    """0 or None: chosen for the model and the machine."""

    max_sequences: int = 0  # computed at once (128 on a GPU, 16 on a CPU)
    max_tokens: int = 0  # of a sequence, prompt and answer (the model's positions)
    step_tokens: int = 0  # of all sequences in one step (8192 on a GPU, 512 on a CPU)
    cache_bytes: int = 0  # of all sequences and kept beginnings
    prefix_bytes: int | None = None  # of kept beginnings; 0 keeps none
    shortest_prefix: int = 16  # tokens; a shorter beginning is not kept
    host_bytes: int = 4 * 2**30  # of preempted sequences; beyond it they are computed again
    queue: int = 1024  # requests that may wait
    kv_dtype: str | None = None  # of keys and values, "bfloat16" or "float32" (the model's)

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "kv_dtype" or value is None and name == "prefix_bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{name} must be a whole number, 0 or more, got {value!r}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            known = " or ".join(KV_DTYPES)
            raise UserError(f"kv_dtype must be {known}, got {self.kv_dtype!r}")
        if self.max_tokens == 1:
            raise UserError("max_tokens must be 2 or more: a prompt and an answer have one each")
        if self.queue == 0:
            raise UserError("queue must be 1 or more: nobody could be served without waiting")


@dataclass(frozen=True)
class Room:
    """What an engine allocates."""

    sequences: int
    max_tokens: int
    step_tokens: int
    pages: int
    sizes: Sizes
    prefix_bytes: int
    kv_dtype: torch.dtype | None = None  # if it is not the model's
    block: int = KV_BLOCK  # tokens of a page

    @property
    def cache_bytes(self) -> int:
        """With the slot and the page that padding rows use, and the blank page."""
        return (self.sequences + 1) * self.sizes.slot + (self.pages + 2) * self.sizes.page

    @staticmethod
    def of(config: Config, limits: Limits, device: torch.device, dtype: torch.dtype) -> Room:
        """UserError where not one sequence fits."""
        gpu = device.type == "cuda"
        max_tokens = min(limits.max_tokens or config.max_positions, config.max_positions)
        asked = limits.max_sequences or (128 if gpu else 16)
        step_tokens = max(limits.step_tokens or (8192 if gpu else 512), asked)
        kv_dtype = _kv_dtype(limits, device, dtype)
        wide = torch.promote_types(dtype, torch.float32).itemsize
        each = (kv_dtype or dtype).itemsize, wide, dtype.itemsize
        sizes = Sizes.of(config, max_tokens, *each)
        pages = -(-max_tokens // KV_BLOCK) if sizes.page else 0  # of one sequence
        budget = limits.cache_bytes or _found(config, step_tokens, device, dtype)
        spare = sizes.slot + 2 * sizes.page
        budget -= spare
        # Slots for as many as can be there with an eighth of the context each.
        sequences = budget // max(1, sizes.slot + -(-pages // 8) * sizes.page)
        sequences = min(asked, max(1, sequences))
        left = budget - sequences * sizes.slot
        # A page more a sequence: a kept beginning has a copy of its last one.
        pages = min(left // sizes.page, sequences * (pages + 2)) if pages else 0
        if left < 0 or (sizes.page and pages < 1):
            raise UserError(
                f"the cache may take {budget + spare} bytes, and one sequence needs at least"
                f" {2 * sizes.slot + 3 * sizes.page}: give a larger cache_bytes, or a smaller"
                " max_tokens"
            )
        if sizes.page:
            max_tokens = min(max_tokens, pages * KV_BLOCK)
            sizes = Sizes.of(config, max_tokens, *each)  # rings may be smaller
        prefix = limits.prefix_bytes
        if prefix is None:
            prefix = int(PREFIX_SHARE * (budget if gpu else 2 * budget))
        return Room(sequences, max_tokens, step_tokens, pages, sizes, prefix, kv_dtype)


def _kv_dtype(limits: Limits, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """None: the model's."""
    asked = KV_DTYPES.get(limits.kv_dtype or "", dtype)
    if asked != dtype and device.type != "cpu":
        raise UserError(
            f"kv_dtype {limits.kv_dtype}: on a GPU keys and values have the model's dtype"
        )
    return None if asked == dtype else asked


def _found(config: Config, step_tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cuda":
        return int(HOST_SHARE * host_memory())
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    widest = 2 * config.intermediate_size + 8 * config.inner_size + 4 * config.hidden_size
    return int(GPU_SHARE * (free - 2 * step_tokens * widest * dtype.itemsize))


def host_memory() -> int:
    """Of the machine, or of the container that this runs in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                found = min(found, int(file.read()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return found
