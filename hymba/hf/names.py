"""Tensor names at transformers' border: the files hold official names, the modules ours.

transformers renames tensors by a list of transforms for each model type, and reverses the list when
it saves. Ours is one transform over the one table in `hymba.weights`, not a list of regular
expressions: those chain, differ between versions, and would say the table a second time.

    file     model.layers.0.mamba.A_log.0
    module   model.decoder.layers.0.mixer.ssm.A_log      (HymbaForCausalLM; HymbaModel: no "model.")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hymba.weights import WeightsError, some, to_official, to_ours

MODULE = "model.decoder."


def to_module(official: str) -> str:
    """A file's name to the module's; names that are not official are left alone."""
    ours = to_ours(official)
    return f"model.{ours}" if ours != official and not official.startswith(MODULE) else official


def to_file(module: str) -> str:
    """The inverse of `to_module`, for both model classes."""
    return to_official(module.removeprefix("model.") if module.startswith(MODULE) else module)


class OfficialNames(WeightRenaming):
    """The transform, in either direction."""

    __slots__ = ("reading",)

    def __init__(self, reading: bool = True):
        super().__init__("model.", MODULE)  # for its printed form; the table does the work
        self.reading = reading

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = to_module(source_key) if self.reading else to_file(source_key)
        if renamed == source_key:
            return source_key, None
        self._was_used = True  # type: ignore[misc]  # a slot of the parent
        return renamed, self.source_patterns[0]

    def reverse_transform(self) -> OfficialNames:
        return OfficialNames(not self.reading)


def rename_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """For `load_state_dict` with a file's names, inside any wrapper: transformers' Trainer resumes
    that way, not strictly, and would go on with weights that were never loaded."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        official = name if name.startswith("model.") else f"model.{name}"
        ours = to_ours(official)
        if not official.startswith(MODULE) and ours != official:
            state_dict[prefix + ours] = state_dict.pop(key)


def register(model_type: str) -> None:
    register_checkpoint_conversion_mapping(model_type, [OfficialNames()], overwrite=True)


def refuse_misfit(report: Mapping[str, Any], where: str, misshaped_is_fine: bool) -> None:
    """transformers only warns where tensors are missing or left over, and calls the rest of a
    silently wrong model "newly initialized". Raises WeightsError, one line with official names."""
    if any(name.endswith(".tiles") for name in report["unexpected_keys"]):
        raise WeightsError(
            f"{where} has quantised weights, which hymba.load reads and every command but finetune"
            " and train; take the model as it was trained"
        )
    shapes = [] if misshaped_is_fine else report["mismatched_keys"]
    faults = [
        _fault("missing", map(to_file, sorted(report["missing_keys"]))),
        _fault("not expected", map(to_file, sorted(report["unexpected_keys"]))),
        _fault(
            "misshaped",
            (f"{to_file(name)} {tuple(a)}, not {tuple(b)}" for name, a, b in sorted(shapes)),
        ),
    ]
    if any(faults):
        told = "; ".join(filter(None, faults))
        raise WeightsError(f"{where}: tensors do not fit the model: {told}")


def _fault(what: str, names: Iterable[str]) -> str:
    told = some(names)
    return f"{what} {told}" if told else ""
