"""Answer many prompts at once from Python: a stream, a list, and a run without end.

    python examples/batch_generate.py                            # a tiny untrained model
    python examples/batch_generate.py runs/demo/hymba            # what `make demo` trained
    python examples/batch_generate.py nvidia/Hymba-1.5B-Base     # downloads 3 GB

Without an argument it writes a model folder to a temporary place and loads that: its text is
noise. For files there is `hymba generate MODEL --file prompts.jsonl --out answers.jsonl`,
which goes on where it was stopped.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hymba
from hymba import LLM, Limits, Sampling
from hymba.errors import UserError
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer

NAMES = ("read_lines", "write_lines", "count_words", "is_prime", "flatten")


def untrained(folder: str) -> str:
    """A folder as `hymba.save` writes it, with a tokenizer of nearly bare bytes."""
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], vocab_size=320)
    config = hymba.Config.preset("hymba-tiny").replace(vocab_size=tokenizer.vocab_size)
    hymba.save(LanguageModel(config).init_weights(seed=0), folder, tokenizer)
    return folder


def questions() -> Iterator[tuple[str, Sampling]]:
    """As many as you like: they are taken as the engine has room for them."""
    for i, name in enumerate(NAMES):
        yield f"def {name}(", Sampling(max_tokens=4 + 4 * (i % 3), seed=i, temperature=0.7)
    yield "x = " * 5000, Sampling()  # too long for most


def main(name: str) -> None:
    llm = LLM(name, limits=Limits(max_sequences=8))

    print("--- one prompt, as its text comes")
    for delta in llm.stream("import os\n", Sampling(max_tokens=16)):
        print(delta.text, end="", flush=True)
    print()

    print("--- several, in their order")
    prompts = [f"def {name}(" for name in NAMES]
    for prompt, output in zip(prompts, llm.generate(prompts, Sampling(max_tokens=8)), strict=True):
        print(repr(prompt + output.text), output.finish)

    print("--- each with its own sampling, as they are done")
    for index, output in llm.run(questions()):
        if isinstance(output, UserError):
            print(index, "cannot be answered:", output)
        else:
            print(index, repr(output.text), len(output.tokens), "tokens")

    stats = llm.engine.stats()
    print(f"{stats.generated_tokens} tokens said, {stats.prefix_hit_tokens} found in the cache")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(sys.argv[1] if len(sys.argv) > 1 else untrained(place))
