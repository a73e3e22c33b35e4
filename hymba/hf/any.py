"""Any causal language model that transformers reads from a folder, for comparisons: its weights,
its tokenizer, and the few facts that evaluation wants. Nothing of Hymba is in here.

    peer = open_any(folder, "cpu")
    peer.logits(ids, mask)          peer.generate([[1, 5, 9]], max_tokens=8, stop=("\\n",))
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

import hymba.hf  # noqa: F401  (so that the Auto classes know our own folders too)
from hymba.errors import UserError

# What a model calls the number of positions it was made for, and what a table of them.
LONGEST = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
TABLES = ("wpe", "embed_positions", "position_embeddings")
UNLIMITED = 1 << 30  # a tokenizer that says more than this says nothing


class PeerError(UserError):
    """A folder that transformers cannot read as a causal language model."""


class PeerTokenizer:
    """Any tokenizer of transformers with our two verbs."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.bos_id: int | None = inner.bos_token_id
        plain, usual = self.encode("a"), list(inner("a").input_ids)
        found = usual[: len(usual) - len(plain)] if usual[-len(plain) :] == plain else []
        self.begin: list[int] = found  # what this tokenizer puts in front of every text

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; text that looks like one stays text, where it can."""
        given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self._inner(text, **given).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


@dataclass
class Peer:
    """A model, its tokenizer, and how many positions it was made for and has at most."""

    model: Any
    tokenizer: PeerTokenizer
    most_tokens: int
    last_position: int | None  # a table of positions ends; None: any number can be computed

    @property
    def vocab_size(self) -> int:
        size: int = self.model.config.get_text_config().vocab_size
        return size

    def logits(self, ids: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
        """ids, mask (B, T), padded on the right; logits (B, C, V) at these columns (C,)."""
        takes = inspect.signature(self.model.forward).parameters
        given = {"use_cache": False} if "use_cache" in takes else {}
        found: Tensor
        if "logits_to_keep" in takes:
            found = self.model(ids, attention_mask=mask, logits_to_keep=columns, **given).logits
        else:
            found = self.model(ids, attention_mask=mask, **given).logits[:, columns]
        return found

    def generate(
        self, prompts: Sequence[Sequence[int]], most: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """New ids of each prompt, greedily, padded on the left where they differ in length."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        said = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=most,
            stopping_criteria=StoppingCriteriaList([_Said(self.tokenizer, width, stop)]),
        )
        return [row[width:].tolist() for row in said]


class _Said(StoppingCriteria):
    """A row is done when its new text has one of these strings."""

    def __init__(self, tokenizer: PeerTokenizer, width: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.width, self.stop = tokenizer, width, tuple(stop)

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self.tokenizer.decode(row[self.width :].tolist()) for row in ids]
        done = [any(word in text for word in self.stop) for text in texts]
        return torch.tensor(done, device=ids.device)


def open_any(
    folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> Peer:
    """PeerError, one line, where the folder is no causal language model with a tokenizer."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = _tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except UserError:
        raise
    except Exception as error:  # of many kinds: an unknown model, missing files, wrong shapes
        raise PeerError(f"{folder} is no causal language model: {_line(error)}") from error
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    model = model.to(device).eval()
    # Greedy, whatever the checkpoint's own habits are: penalties and filters change an argmax.
    eos = model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    plain = GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=0 if pad is None else pad
    )
    model.generation_config = plain
    last = _last_position(model)
    return Peer(model, tokenizer, min(_made_for(model.config), last or UNLIMITED), last)


def _tokenizer(folder: str | Path) -> PeerTokenizer:
    try:
        inner = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise PeerError(f"{folder} has no tokenizer that can be read: {_line(error)}") from error
    return PeerTokenizer(inner)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _made_for(config: Any) -> int:
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in LONGEST)
    return min((n for n in found if isinstance(n, int) and n > 0), default=UNLIMITED)


def _last_position(model: nn.Module) -> int | None:
    """Entries of a table of learnt positions, as GPT-2 has one; rotary models have none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None
