"""When may a constant of the weights be kept? Only while a fingerprint of them is the same.

A weight can change by an optimiser step or a load (its version counter moves), by a cast or a move
(its memory moves), or behind the counter's back, as adapter libraries merge through `.data`: so its
norm and a few of its values are looked at too, which reads every weight once, as decoding one
token does. Autocast changes what is computed from them. Modules that are neither ours nor torch's,
hooks, and replaced forwards can change a result without touching a weight: then nothing is kept.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import torch
from torch import Tensor, nn

SAMPLES = 64  # values compared one by one in each tensor


def fingerprint(module: nn.Module) -> Hashable | None:
    """Changes when a result of `module` may have changed; None where that cannot be told."""
    if any(_is_foreign(part) for part in module.modules()):
        return None
    tensors = list(chain(module.parameters(), module.buffers()))
    if any(x.is_meta for x in tensors):
        return None
    places = tuple((x.data_ptr(), _version(x), x.dtype, x.device, x.shape) for x in tensors)
    return places, _values(tensors), _autocast({x.device.type for x in tensors})


def _is_foreign(module: nn.Module) -> bool:
    home = type(module).__module__
    ours = home.startswith(("torch.nn.modules", "hymba."))
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not ours or bool(hooks) or "forward" in vars(module)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _values(tensors: list[Tensor]) -> bytes:
    """Norm and evenly spaced values of each tensor, as bytes."""
    values = []
    for x in tensors:
        flat = x.detach().reshape(-1)
        if x.is_floating_point():  # nothing merges into packed ones
            wide = torch.promote_types(x.dtype, torch.float32)
            values.append(torch.linalg.vector_norm(flat, dtype=wide).double()[None])
        values.append(flat[:: max(1, flat.numel() // SAMPLES)][: SAMPLES + 1].double())
    return torch.cat(values).cpu().numpy().tobytes() if values else b""


def _autocast(devices: set[str]) -> Hashable:
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in sorted(devices)
        if torch.is_autocast_enabled(device)
    )
