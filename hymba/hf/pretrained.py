"""What both transformers models share: files in and out, initial values, checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization

from hymba.hf.config import HymbaConfig
from hymba.hf.names import refuse_misfit
from hymba.model.layers import MetaTokens, RMSNorm, Scales
from hymba.model.ssm import SSM, DepthwiseConv
from hymba.weights import MODEL_CARD, WeightsError


class HymbaPreTrainedModel(PreTrainedModel):
    config_class = HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    # Our attention picks its kernel by itself; "sdpa" and "eager" may be asked for and mean that.
    _supports_sdpa = True
    _supports_context_parallel = False  # SSM states would have to travel between ranks
    _is_stateful = False  # a HymbaCache can roll back

    def get_decoder(self) -> Any:
        """The HymbaModel, where fine-tuning libraries look for hidden states."""
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.get_decoder().decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.get_decoder().decoder.embed_tokens = value

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As everywhere in transformers, but a checkpoint that does not fit is an error.

        Raises WeightsError for missing, extra, misshaped or damaged tensors and ConfigError for an
        impossible config, one line each. `ignore_mismatched_sizes` keeps its meaning."""
        where = str(pretrained_model_name_or_path)
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report has the names
                **kwargs,
            )
        except SafetensorError as error:
            raise WeightsError(f"{where}: weights are damaged or cut short ({error})") from None
        refuse_misfit(report, where, ignore_mismatched_sizes)
        tied = cls._tied_weights_keys if model.config.to_hymba().tie_embeddings else None
        if tied and not tied.keys() <= model.all_tied_weights_keys.keys():
            raise WeightsError(f"{where}: lm_head.weight differs from the embedding it is tied to")
        return (model, report) if output_loading_info else model

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers, but an adapter that does not fit is an error (5.17 cannot
        load whole modules that peft saved, and only warns)."""
        report = super().load_adapter(*args, **kwargs)
        if report is not None:
            refuse_misfit(report.to_dict(), "the adapter", misshaped_is_fine=False)
        return report

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As everywhere in transformers, with official tensor names and a model card."""
        if getattr(self, "hf_quantizer", None) is None:
            self._weight_conversions = None  # official names, whatever names were read
        card = Path(save_directory) / "README.md"
        if is_main_process and not card.exists() and not Path(save_directory).is_file():
            card.parent.mkdir(parents=True, exist_ok=True)
            card.write_text(MODEL_CARD, encoding="utf-8")
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The released code's initial values, as `LanguageModel.init_weights`.

        transformers asks module by module; its `initialization` leaves loaded values alone."""
        if isinstance(module, (nn.Linear, nn.Embedding, DepthwiseConv)):
            self._init_matrix(module)
        elif isinstance(module, MetaTokens):
            initialization.normal_(module.weight, mean=0.0, std=1.0)
        elif isinstance(module, (RMSNorm, Scales)):
            initialization.ones_(module.weight)
        elif isinstance(module, SSM):
            states = torch.arange(1, module.A_log.shape[1] + 1, device=module.A_log.device)
            initialization.copy_(module.A_log, states.log().expand_as(module.A_log))
            initialization.ones_(module.D)
            initialization.zeros_(module.dt_bias)

    def _init_matrix(self, module: nn.Linear | nn.Embedding | DepthwiseConv) -> None:
        config = self.get_decoder().decoder.config
        weight, bias = module.weight, getattr(module, "bias", None)
        loaded = getattr(weight, "_is_hf_initialized", False)
        initialization.normal_(weight, mean=0.0, std=config.initializer_range)
        if bias is not None:
            initialization.zeros_(bias)
        if isinstance(module, nn.Embedding) and config.pad_token_id is not None and not loaded:
            initialization.zeros_(weight[config.pad_token_id])

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Called by activation_checkpointing_enable and gradient_checkpointing_enable."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True gives wrong gradients where layers share keys and values:"
                " pass use_reentrant=False"
            )
        if enable and every_n_layers != 1:
            raise ValueError("every_n_layers must be 1: every block is checkpointed, or none")
        run = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        backbone = self.get_decoder()
        backbone.gradient_checkpointing = enable
        backbone.decoder.checkpoint_blocks = run if enable else None
