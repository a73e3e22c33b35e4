"""config.json as transformers wants it: `HymbaConfig`, the official keys and nothing else.

    HymbaConfig.from_pretrained(folder).to_hymba()          a hymba.config.Config
    HymbaConfig.from_hymba(Config.preset("hymba-1.5b"))     the other way

The class declares no sizes and no defaults for them: the released code's class defaults are not the
released model's values, so a key that a file lacks must stay lacking until `to_hymba` says so. Keys
that we do not know are kept as they came and written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hymba.config import Config

# Keys of the released files that say nothing about the model but mean something to other libraries:
# as attributes they would make transformers look for an attention called "flex", and fine-tuning
# libraries take a model without a router for a mixture of experts. They are kept out of sight and
# written back.
ASIDE = (
    "attn_implementation",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
)


class HymbaConfig(PreTrainedConfig):
    """The keys of a Hymba config.json as attributes."""

    model_type = "hymba"
    # What evaluation loops must not gather: a cache is no tensor.
    keys_to_ignore_at_inference = ["past_key_values"]
    # trl looks at it without asking whether the file had it.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    # Declared because transformers drops a `use_cache` that is not a field of the class.
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._aside = {key: kwargs.pop(key) for key in ASIDE if key in kwargs}
        super().__post_init__(**kwargs)

    def to_hymba(self) -> Config:
        """The architecture. Raises ConfigError, one line, where these keys cannot be a model."""
        return Config.from_dict(self.to_diff_dict())

    @classmethod
    def from_hymba(cls, config: Config, **kwargs: Any) -> HymbaConfig:
        """The same model for transformers; `kwargs` are further keys, such as `use_cache`."""
        return cls(**{**config.to_dict(), **kwargs})

    def to_dict(self) -> dict[str, Any]:
        keys: dict[str, Any] = super().to_dict()
        return keys | keys.pop("_aside", {})

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the dtype under its official name, which every version reads."""
        keys: dict[str, Any] = super().to_diff_dict()
        dtype = keys.pop("dtype", None)
        return keys if dtype is None else keys | {"torch_dtype": dtype}
