"""The transformers models: `HymbaModel` (hidden states) and `HymbaForCausalLM` (logits, loss).

They hold our Decoder and translate: padded or packed columns become rows (columns.py), a cache of
theirs becomes one of ours (cache.py), names become official (names.py). Nothing is computed here
that `hymba.model` does not compute.

A forward without a cache lets gradients flow, also through the meta tokens; one with a cache is
inference. `use_cache=None` means the config's wish where no gradients flow, else no cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hymba.hf.cache import HymbaCache
from hymba.hf.columns import Columns, InputError, read
from hymba.hf.config import HymbaConfig
from hymba.hf.generation import HymbaGeneration
from hymba.hf.names import rename_on_load
from hymba.hf.pretrained import HymbaPreTrainedModel
from hymba.model.batch import Batch
from hymba.model.decoder import Decoder


class HymbaModel(HymbaPreTrainedModel):
    """Token ids or embeddings to hidden states (B, T, D) after the final norm."""

    _keys_to_ignore_on_load_unexpected = {r"^lm_head\."}  # an untied head, which is not in here

    def __init__(self, config: HymbaConfig):
        super().__init__(config)
        self.decoder = Decoder(config.to_hymba())
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(rename_on_load)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """input_ids (B, T) or inputs_embeds (B, T, D) -> last_hidden_state (B, T, D).

        attention_mask (B, columns in the cache + T) of 0 and 1 marks padding anywhere.
        position_ids (B, T) may only say what the mask says, or restart at 0 for packed documents,
        which cu_seq_lens and seq_idx may say too; each document then begins after the meta tokens.
        A padding column shows the last text before it. Raises InputError (a ValueError)."""
        _refuse_unknown(kwargs)
        inputs = _either(input_ids, inputs_embeds)
        columns = self.columns(
            inputs,
            past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
        )
        _check_longest(columns, max_length_q, max_length_k)
        embeddings = self._embed(inputs, columns)
        cache = past_key_values
        if cache is None and self._wants_cache(use_cache, columns, embeddings):
            cache = HymbaCache(self)
        wanted = output_hidden_states
        wanted = self.config.output_hidden_states if wanted is None else wanted
        with self._recorded_blocks(bool(wanted), columns) as blocks:
            hidden = self._run(embeddings, columns, cache)
        states = (embeddings, *blocks[:-1], hidden) if wanted else None
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=states
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def columns(self, inputs: Tensor, cache: HymbaCache | None, **border: Any) -> Columns:
        """Which of the new columns hold text, and how it falls into sequences; `border` are the
        arguments of forward that say so, and may be others too."""
        if inputs.dim() < 2:
            raise InputError(f"the input must be (batch, columns), got {tuple(inputs.shape)}")
        batch, width = inputs.shape[:2]
        past, cached = None, 0
        if cache is not None:
            self._check_cache(cache, inputs)
            past, cached = cache.open(batch), cache.columns
        columns = read(
            batch,
            width,
            inputs.device,
            attention_mask=border.get("attention_mask"),
            position_ids=border.get("position_ids"),
            cu_seq_lens=(border.get("cu_seq_lens_q"), border.get("cu_seq_lens_k")),
            seq_idx=border.get("seq_idx"),
            past=past,
            cached_columns=cached,
        )
        self._check_positions(columns, past)
        return columns

    def _check_cache(self, cache: Any, inputs: Tensor) -> None:
        if not isinstance(cache, HymbaCache):
            raise InputError(
                f"past_key_values must be a HymbaCache, not {type(cache).__name__}:"
                " leave it out, or pass hymba.hf.HymbaCache(model)"
            )
        if self.training and self._gradients_flow(inputs):
            raise InputError("past_key_values makes a forward inference: leave it out in training")

    def _check_positions(self, columns: Columns, past: list[int] | None) -> None:
        limit = self.decoder.config.max_positions
        for owner, length in zip(columns.owners, columns.lengths, strict=True):
            total = length + (past[owner] if past is not None else 0)
            if total > limit:
                raise InputError(
                    f"row {owner} has {total} text tokens, the model has positions for {limit}:"
                    " shorten it (max_position_embeddings)"
                )

    def _embed(self, inputs: Tensor, columns: Columns) -> Tensor:
        """(B, T, D); padding embeds as token 0 and is never used."""
        if inputs.is_floating_point():
            if inputs.shape[2:] != (self.decoder.config.hidden_size,):
                raise InputError(f"inputs_embeds have shape {tuple(inputs.shape)}, not (B, T, D)")
            return inputs
        if inputs.dim() != 2:
            raise InputError(f"input_ids must be (batch, columns), got {tuple(inputs.shape)}")
        ids = inputs if columns.text is None else inputs.masked_fill(~columns.text, 0)
        size = self.decoder.embed_tokens.weight.shape[0]
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary (0 to {size - 1})")
        return self.decoder.embed_tokens(ids)

    def _wants_cache(self, use_cache: bool | None, columns: Columns, embeddings: Tensor) -> bool:
        packed = len(columns.owners) > columns.batch
        learning = self._gradients_flow(embeddings)
        if use_cache is None:
            return bool(self.config.use_cache) and not packed and not learning
        if use_cache and packed:
            raise InputError("packed documents cannot go into a cache: pass use_cache=False")
        if use_cache and learning and self.training:
            raise InputError("use_cache=True makes a forward inference: pass False in training")
        return use_cache

    def _gradients_flow(self, inputs: Tensor) -> bool:
        learning = inputs.requires_grad or any(p.requires_grad for p in self.parameters())
        return torch.is_grad_enabled() and learning

    def _run(self, embeddings: Tensor, columns: Columns, cache: HymbaCache | None) -> Tensor:
        if cache is not None:
            return cache.advance(embeddings, columns)
        rows = columns.flat(embeddings)
        hidden = self.decoder(rows, Batch.of(columns.lengths, device=rows.device))
        return columns.spread(hidden, hidden.new_zeros(columns.batch, hidden.shape[-1]))

    @contextmanager
    def _recorded_blocks(self, wanted: bool, columns: Columns) -> Iterator[list[Tensor]]:
        """What each block gives for the columns, (B, T, D); filled when the context ends."""
        if not wanted:
            yield []
            return
        found: dict[int, Tensor] = {}
        states: list[Tensor] = []

        def keep(index: int, module: nn.Module, args: Any, output: Any) -> None:
            found[index] = output[0]  # the meta tokens' own pass comes first and is overwritten

        hooks = [
            block.register_forward_hook(functools.partial(keep, index))
            for index, block in enumerate(self.decoder.layers)
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()
        empty = self.decoder.final_norm.weight.new_zeros(0, self.decoder.config.hidden_size)
        total = sum(columns.lengths)
        for index in range(len(self.decoder.layers)):
            rows = found.get(index, empty)  # empty: a chunk of padding only runs nothing
            rows = rows[len(rows) - total :]  # without the meta tokens' rows, which come first
            states.append(columns.spread(rows, rows.new_zeros(columns.batch, rows.shape[-1])))


class HymbaForCausalLM(HymbaPreTrainedModel, HymbaGeneration, GenerationMixin):
    """`HymbaModel` and a head over the vocabulary, tied to the embedding where the config says."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: HymbaConfig):
        super().__init__(config)
        self.model = HymbaModel(config)
        sizes = self.model.decoder.embed_tokens.weight.shape
        self.lm_head = nn.Linear(sizes[1], sizes[0], bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As HymbaModel, and logits (B, T or logits_to_keep, V). labels (B, T), -100 not counted,
        are shifted inside: each text token predicts the next one of its own sequence, so labels
        of padding and of a document's first token count nowhere. The loss is their mean, or their
        sum over `num_items_in_batch` where that is given."""
        items = kwargs.pop("num_items_in_batch", None)
        targets = None
        if labels is not None:
            use_cache = bool(use_cache)  # nobody goes on from a forward with labels unasked
            inputs = _either(input_ids, inputs_embeds)
            border = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
            columns = self.model.columns(inputs, past_key_values, **border)
            targets = _keep(columns.targets(labels), logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        # With a cache this is inference: gradients of the head alone would be silently wrong.
        with torch.set_grad_enabled(torch.is_grad_enabled() and outputs.past_key_values is None):
            logits = self.lm_head(_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if targets is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets.contiguous(),
                vocab_size=logits.shape[-1],
                num_items_in_batch=items,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


def _either(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give either input_ids or inputs_embeds")
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    assert inputs is not None
    return inputs


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Callers pass many arguments as None or False; one that asks for more must not be lost."""
    asked = [name for name, value in kwargs.items() if value is not None and value is not False]
    if asked:
        raise InputError(f"the model has no argument {', '.join(asked)}: leave it out")


def _check_longest(columns: Columns, *longest: int | Tensor | None) -> None:
    for value in longest:
        if value is not None and int(value) < max(columns.lengths):
            raise InputError(
                f"max_length_q/k say {int(value)}, the longest document has {max(columns.lengths)}"
            )


def _keep(x: Tensor, which: int | Tensor) -> Tensor:
    """The last `which` columns of (B, T, ...), 0 for all; or those columns that a tensor lists."""
    if isinstance(which, int):
        return x[:, -which:] if which else x
    if which.dim() != 1:
        raise InputError("logits_to_keep must be a number or a 1D tensor of columns")
    return x[:, which]
