"""A tiny base model without a chat template, chats to teach it, and runs of `hymba finetune`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.model.decoder import LanguageModel
from hymba.presets import hymba
from hymba.tokenizer import Tokenizer
from hymba.weights import save

for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package, reason="fine-tuning needs hymba[finetune]")

WORDS = "red blue green black white grey pink brown".split()
Line = dict[str, Any]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(*contents: str) -> list[dict[str, str]]:
    """A user's message, an answer, a user's message ..."""
    return [says(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Learnt from the chat format too, so that chats are short."""
    format = "<extra_id_0>System\n\n<extra_id_1>User\nsay red\n<extra_id_1>Assistant\n"
    return Tokenizer.train([format, " ".join(WORDS), "say it, once more. "] * 9, 340)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Every feature of the model in four layers, with weights as at the start of a training."""
    config = hymba(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        window=8,
        meta_tokens=3,
        ssm_state=4,
        ssm_dt_rank=3,
        max_positions=256,
        global_layers=(0, 3),
        share=[[1, 2]],
        vocab_size=tokenizer.vocab_size,
        initializer_range=0.05,
    )
    folder = tmp_path_factory.mktemp("base")
    save(LanguageModel(config).init_weights(seed=0), folder, tokenizer)
    (folder / "LICENSE").write_text("as you like\n")
    return folder


@pytest.fixture(scope="session")
def chats() -> list[Line]:
    """Forty short chats: the answer is the word that was asked for."""
    rng = random.Random(0)
    words = [rng.choice(WORDS) for _ in range(40)]
    return [{"messages": chat(f"say {word}", word)} for word in words]


@pytest.fixture(scope="session")
def preferences() -> list[Line]:
    rng = random.Random(1)
    pairs = [rng.sample(WORDS, 2) for _ in range(24)]
    return [
        {
            "prompt": [says("user", f"say {word}")],
            "chosen": [says("assistant", word)],
            "rejected": [says("assistant", f"{other} {other}")],
        }
        for word, other in pairs
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(lines, "name.jsonl") -> the file."""

    def make(lines: Sequence[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        told = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
        return path

    return make
