"""Several processes train one model: who this one is, and the weights in shares (FSDP2).

    torchrun --nproc-per-node 4 -m hymba train RECIPE        # each process runs the same program

    with join() as world:               # alone where torchrun did not start us
        spread(model, world)            # every process keeps a share of each weight
        whole = gathered(model, world)  # the whole model again, on the first process

Every process makes the same model from the same seed and then keeps its share, so that one process
and many begin, and go on, with the same numbers. A block's weights are gathered when it is
computed and put away again; gradients are summed into the shares. All of it is PyTorch's own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.weights import usable_device

PATIENCE = timedelta(days=30)  # with the first process, which may have a corpus to tokenise


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        return self.size > 1

    def sum(self, numbers: Tensor) -> Tensor:
        """`numbers` added up over all processes, in place."""
        if self.joined:
            dist.all_reduce(numbers)
        return numbers

    def wait(self) -> None:
        """Until every process is here."""
        if self.joined:
            dist.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does the work within, however long it takes, the others after it (and
        find it done)."""
        # A group of its own: elsewhere waiting for more than some minutes is taken for a hang.
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.joined else None
        if not self.first:
            _wait_long(group)
        yield
        if self.first and self.joined:
            _wait_long(group)


def _wait_long(group: Any) -> None:
    """Until every process is here, or Ctrl-C comes, which a barrier alone does not see."""
    work = dist.barrier(group, async_op=True)
    while not work.is_completed():
        time.sleep(0.05)
    work.wait()


@contextmanager
def join(device: str | None = None) -> Iterator[tuple[World, torch.device]]:
    """This process among those that torchrun started, and the device that it computes on.

    `device` is "cpu" or "cuda"; without it a GPU where there is one."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", 0)))
    if kind == "cuda":
        kind = f"cuda:{_gpu(world)}"
    own = usable_device(kind)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not world.joined:
        yield world, own
        return
    # gloo beside NCCL: checkpoints are written while the GPUs train.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        yield world, own
    finally:
        dist.destroy_process_group()


def _gpu(world: World) -> int:
    count = torch.cuda.device_count()
    if count and world.local_rank >= count:
        raise UserError(
            f"process {world.local_rank} of this machine has no GPU of its own, there are {count}:"
            f" torchrun --nproc-per-node {count}, or --device cpu"
        )
    return world.local_rank


def spread(model: LanguageModel, world: World, copies: int = 1) -> LanguageModel:
    """Leave this process its share of every weight, in place; nothing where it is alone.

    `copies`: how many times the whole model is held, each in shares of size / copies processes
    (one a machine keeps the gathering within machines)."""
    if not world.joined:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if copies < 1 or world.size % copies:
        raise UserError(f"{world.size} processes cannot hold {copies} copies of the model")
    shape: tuple[int, ...] = (world.size,)
    names: tuple[str, ...] = ("share",)
    if copies > 1:
        shape, names = (copies, world.size // copies), ("copy", "share")
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=names)
    for block in model.decoder.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")  # the head's weight is used outside forward
    # Blocks give views of their rows, which nothing in training changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    return model


def exchange(model: LanguageModel, world: World, last: bool) -> None:
    """Whether the next backward gives gradients to the processes whose shares they are, or keeps
    them, whole, to be added to: once a step is enough, whatever the number of its micro-batches."""
    if world.joined:
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(model, FSDPModule)  # `spread` has made it one
        model.set_requires_gradient_sync(last)


def share(parameter: Tensor) -> Tensor:
    """What this process holds of a weight: all of it where it is alone."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def gathered(model: LanguageModel, world: World) -> LanguageModel | None:
    """The whole model on the CPU of the first process, None on the others; every process must
    call it. Alone: the model itself."""
    if not world.joined:
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not world.first:
        return None
    with torch.device("meta"):  # what was gathered becomes the weights, held once
        whole = LanguageModel(model.config)
    whole.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        whole.lm_head.weight = whole.decoder.embed_tokens.weight
    whole.folder = model.folder
    return whole
