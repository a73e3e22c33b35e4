"""What turns gradients into steps: AdamW and Muon, the learning rate, clipping, unit weights.

    made = optimizers(model, OptimConfig(kind="muon"))
    normalize_weights(model)                    # where the config says so: before the first step
    norm = clip(model.parameters(), 1.0)        # each step, before it
    set_lr(made, Schedule().at(step, steps))

Settings are in config.py. Nothing here keeps state of its own: groups are read off the parameters'
names and shapes, the learning rate is a function of the step alone (so a resumed run needs no
scheduler state). All of it works on the sharded parameters (DTensors) of FSDP2 as on plain ones;
Muon itself is in muon.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hymba.model.hybrid import HybridMixer
from hymba.model.ssm import SSM
from hymba.train.config import OptimConfig, OptimError
from hymba.train.muon import Muon

# Matrices of the blocks, by what they do with the residual stream.
READERS = {"in_proj", "gate_proj", "up_proj"}
WRITERS = {"out_proj", "down_proj"}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay shrinks this parameter: matrices and convolution kernels, but not

    | undecayed | why |
    |---|---|
    | norms, biases, D (one dimension) | scales and offsets: zero is no natural resting place |
    | A_log | the state's time constants; 0 would mean one fixed forgetting rate (as in Mamba) |
    | meta tokens | inputs, learnt as such; the norm after them makes their size meaningless |
    | embeddings, tied or not | the same, and shrunken rows get larger gradients through that norm |
    """
    parts = name.split(".")
    return parameter.ndim >= 2 and not {"A_log", "meta_tokens", "embed_tokens"} & set(parts)


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves this parameter (kind "muon"):

    | parameter | moved by | why |
    |---|---|---|
    | in_proj, x_proj: each part of them | Muon | matrices between hidden states, as meant for it |
    | out_proj, gate_proj, up_proj, down_proj | Muon | the same |
    | dt_proj | AdamW | with dt_bias and A_log it sets time constants, through a softplus |
    | conv | AdamW | a filter of four taps a channel; as a matrix of (E, 4) it means nothing |
    | embeddings, head | AdamW | a row is a word: rare ones should not move as far as common ones |
    | meta tokens | AdamW | rows of an input, as embeddings |
    | norms, biases, A_log, D | AdamW | no matrices |

    Adapters within a projection (LoRA) are not it: AdamW.
    """
    return parameter.ndim == 2 and _module(name) in READERS | WRITERS | {"x_proj"}


def _module(name: str) -> str:
    """in_proj, of layers.3.mixer.in_proj.weight."""
    *_, module, _ = ["", *name.split(".")]
    return module


def optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW over the model's trainable parameters, after Muon over its part (`is_hidden`) if asked.

    AdamW is fused (one pass over memory) where it exists. The learning rate is set before each step
    (`set_lr`). For FSDP2 the model is sharded first.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise OptimError("the model has no trainable parameters")
    muon = config.kind == "muon"
    matrices = [(name, p) for name, p in named if muon and is_hidden(name, p)]
    others = [(name, p) for name, p in named if not (muon and is_hidden(name, p))]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        groups = _groups(matrices, config.weight_decay, ratio=config.muon_lr)
        made.append(Muon(groups, parts(model), momentum=config.muon_momentum))
    if others:
        fused = all(p.device.type in ("cpu", "cuda") for _, p in others)
        groups = _groups(others, config.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
        made.append(adamw)
    return made


def _groups(
    named: list[tuple[str, nn.Parameter]], weight_decay: float, ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Those that decay and those that do not; "ratio" is what `set_lr` multiplies by."""
    decayed = [p for name, p in named if decays(name, p)]
    others = [p for name, p in named if not decays(name, p)]
    return [
        {"params": params, "weight_decay": decay, "ratio": ratio}
        for params, decay in ((decayed, weight_decay), (others, 0.0))
        if params
    ]


def parts(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Rows of the projections that lie one behind the other in a weight: q, k, v, u, gate of
    in_proj, and dt, B, C of x_proj."""
    found: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, HybridMixer):
            found[module.in_proj.weight] = tuple(module.sizes.values())
        elif isinstance(module, SSM):
            norms = module.dt_norm, module.B_norm, module.C_norm
            found[module.x_proj.weight] = tuple(len(norm.weight) for norm in norms)
    return found


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give all groups the learning rate `lr`, times the group's ratio where it has one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("ratio", 1.0)


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale the gradients so that their joint norm is at most `most`; return the norm before.

    The norm is inf or nan exactly when some gradient is; the gradients are of no use then. Of
    sharded gradients it is the norm of the whole, the same in every process.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@torch.no_grad()
def normalize_weights(model: nn.Module) -> None:
    """Scale trainable matrices of the blocks to vectors of length 1 (Nemotron-Flash, 2511.18890):

    | matrix | of length 1 | why |
    |---|---|---|
    | in_proj, gate_proj, up_proj | rows | they read the residual stream along them |
    | out_proj, down_proj | columns | they write to the stream along them |
    | x_proj, dt_proj, conv | none | neither touches the stream; norms follow x_proj |
    | embeddings, head, meta tokens | none | see below |

    So a weight has a direction alone: what is large is decided by the norms' weights, and a step
    turns a vector by the same angle early and late. Embeddings: it is told of the layers' matrices,
    and unit rows would bound the logits, for which nGPT has learned scales and this model none.

    Called after each step, and once before the first of a new run; not when a run goes on, which
    would round once more and end elsewhere. Vectors of zeros stay. Sharded weights stay sharded.
    """
    for name, p in model.named_parameters():
        module = _module(name)
        if p.requires_grad and p.ndim == 2 and module in READERS | WRITERS:
            along = 1 if module in READERS else 0
            length = torch.linalg.vector_norm(p, dim=along, keepdim=True, dtype=torch.float32)
            p.div_(length.clamp(min=torch.finfo(torch.float32).tiny))
