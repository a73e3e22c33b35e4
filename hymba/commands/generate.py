"""`hymba generate MODEL PROMPT ...`: continue prompts, streaming where there is one."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from hymba.commands import choose_threads, parse
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine import Sampling
    from hymba.model.decoder import LanguageModel
    from hymba.tokenizer import Tokenizer

EXAMPLES = (
    'runs/demo/hymba "def fibonacci(n):"',
    'runs/demo/hymba "import os" "class Node:" --max-tokens 100 --temperature 0.8 --seed 1',
    'nvidia/Hymba-1.5B-Base "The capital of France is" --device cuda --dtype bfloat16',
    "runs/demo/hymba - < prompt.txt",
)


@dataclass(frozen=True)
class Options:
    """Continue one prompt or several from a model folder. One prompt streams; several run as one
    batch and each gives the text it would give alone."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ..."), tyro.conf.Positional]
    """Texts to continue; - reads one from standard input."""
    max_tokens: int = 64
    """New tokens at most."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Choose among tokens at least so likely, as a share of the likeliest."""
    seed: int | None = None
    """The same seed gives the same text."""
    device: str | None = None
    """cpu, cuda, ...; without it a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, ...; without it the checkpoint's own."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "generate", EXAMPLES)
    if not options.prompts:
        raise UserError('no prompt given: hymba generate MODEL "some text"')
    prompts = [sys.stdin.read() if p == "-" else p for p in options.prompts]
    if not all(prompts):
        raise UserError(f"prompt {prompts.index('')} is empty: give some text to continue")
    import torch

    from hymba.engine import Sampling
    from hymba.hub import find
    from hymba.tokenizer import Tokenizer
    from hymba.weights import load

    names = "max_tokens temperature top_k top_p min_p seed".split()
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    folder = find(options.model)
    tokenizer = Tokenizer.from_folder(folder)
    choose_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(folder, device, options.dtype)
    answer = _stream_one if len(prompts) == 1 else _answer_all
    start = time.perf_counter()
    count = answer(model, tokenizer, prompts, sampling)
    seconds = time.perf_counter() - start
    print(f"{count} tokens, {count / seconds:.1f} tok/s, {device}", file=sys.stderr)
    return 0


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)


def _stream_one(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling
) -> int:
    from hymba.engine import stream

    text, count = tokenizer.stream(), 0
    ids = _encode(tokenizer, prompts[0])
    print(prompts[0], end="", flush=True)
    for _, token, _ in stream(model, [ids], sampling):
        if token is not None:
            count += 1
            print(text.push(token), end="", flush=True)
    print(text.finish())
    return count


def _answer_all(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling
) -> int:
    from hymba.engine import generate

    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    completions = generate(model, ids, sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"--- {prompt}{tokenizer.decode(completion.tokens)}")
    return sum(len(completion.tokens) for completion in completions)
