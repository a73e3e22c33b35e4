"""What the tests of `hymba generate` share: a model that says letters, and what a run said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hymba.presets import hymba
from hymba.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def save_model(folder: Path, lively: Callable[..., Any], seed: int) -> Path:
    import torch

    from hymba.weights import save

    tokenizer = Tokenizer.train(["to be or not to be, that is the question\n"] * 9, 300)
    tokenizer.files["chat_template.jinja"] = TEMPLATE.encode()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "ssm_state": 4}
    heads = {"num_heads": 4, "num_kv_heads": 2, "window": 16, "meta_tokens": 3, "ssm_dt_rank": 3}
    config = hymba(
        num_layers=2, max_positions=2000, vocab_size=tokenizer.vocab_size, **sizes, **heads
    )
    model = lively(config.replace(tie_embeddings=False, eos_token_id=None), seed=seed)
    with torch.no_grad():
        for token in range(config.vocab_size):
            text = tokenizer.decode([token])
            if not text.isascii() or not text.strip().isalnum():
                model.lm_head.weight[token] = 0
    save(model, folder, tokenizer)
    return folder


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]


def as_jsonl(lines: list[Any] | bytes) -> bytes:
    if isinstance(lines, bytes):
        return lines
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def expected(folder: Path, prompts: list[Any], **sampling: Any) -> list[Any]:
    from hymba.engine import LLM, Sampling

    return list(LLM(folder, "cpu").generate(prompts, Sampling(**{"max_tokens": 6} | sampling)))
