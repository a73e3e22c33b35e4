"""Lively models behind transformers' door, a tokenizer of letters, and padding by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from hymba.config import Config
from hymba.hf import HymbaConfig, HymbaForCausalLM
from hymba.model.decoder import LanguageModel

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@pytest.fixture(scope="package", autouse=True)
def quiet_and_one_thread() -> Iterator[None]:
    """Tensors this small are slower on more threads; progress bars and reports fill the log."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def wrap() -> Callable[[LanguageModel], HymbaForCausalLM]:
    """wrap(model) -> the same weights in a HymbaForCausalLM that never stops by itself."""

    def build(model: LanguageModel) -> HymbaForCausalLM:
        twin = HymbaForCausalLM(HymbaConfig.from_hymba(model.config)).to(model.dtype)
        weights = {name: x.clone() for name, x in model.decoder.state_dict().items()}
        twin.model.decoder.load_state_dict(weights)
        if not model.config.tie_embeddings:
            twin.lm_head.load_state_dict(model.lm_head.state_dict())
        # These models say anything, also special tokens. With a pad id transformers would take
        # each of those for padding wherever it is given no mask.
        twin.generation_config.eos_token_id = twin.generation_config.pad_token_id = None
        return twin.eval()

    return build


@pytest.fixture(scope="session")
def build(
    tiny: Callable[[str], Config], lively: Callable[..., LanguageModel], wrap: Callable[..., Any]
) -> Callable[..., HymbaForCausalLM]:
    """build("hymba", seed=0) -> a fresh lively model of that plan."""
    return lambda plan="hymba", seed=0: wrap(lively(tiny(plan), seed))


@pytest.fixture(scope="module")
def model(build: Callable[..., HymbaForCausalLM]) -> HymbaForCausalLM:
    """One lively model for tests that do not change it."""
    return build()


@pytest.fixture(scope="session")
def pad() -> Callable[..., dict[str, Tensor]]:
    """pad(rows, "left", fill=0) -> input_ids and attention_mask."""

    def make(rows: Sequence[Tensor], side: str, fill: int = 0) -> dict[str, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), fill)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters: 32 ids, <pad> <s> </s> <unk> in front."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *LETTERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
