"""What `generate()` of transformers needs to know, and what it must not try."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from hymba.hf.cache import HymbaCache
from hymba.hf.columns import InputError

NO_BATCHING = (
    "transformers' continuous batching has no place for SSM states or meta tokens:"
    " use generate(), or hymba.generate"
)


class HymbaGeneration(GenerationMixin):
    """Greedy, sampled, beam and assisted generation with a HymbaCache."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by generate() once its inputs are ready."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.bool().any(-1).all()):
            row = int(mask.bool().any(-1).logical_not().nonzero()[0])
            raise InputError(f"prompt {row} is empty: a prompt needs at least one token")
        self._cap_length(generation_config, model_kwargs)
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise InputError(f"cache_implementation={kind!r} is not possible: leave it out")
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, HymbaCache):
            raise InputError(
                f"past_key_values must be a hymba.hf.HymbaCache(model), not {type(given).__name__}"
            )
        if given is not None:
            given._is_user_defined = True  # as transformers marks a cache that outlives the call
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = HymbaCache(self)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _cap_length(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Stop where the positions end, rather than fail there and lose what was generated."""
        if model_kwargs.get("inputs_embeds") is not None or generation_config.max_length is None:
            return  # max_length then counts other things
        room = self.config.max_position_embeddings
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            room += int((mask == 0).sum(-1).min())
        if generation_config.max_length > room:
            warnings.warn(f"generation stops at {room} columns: no more positions", stacklevel=4)
            generation_config.max_length = room

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Text positions from the mask. transformers gives padding 0 and counts on from the last
        column, which is wrong after right padding; here padding repeats the position before it."""
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            positions: Tensor = super()._prepare_position_ids_for_generation(
                inputs_tensor, model_kwargs
            )
            return positions
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NO_BATCHING)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NO_BATCHING)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NO_BATCHING)
