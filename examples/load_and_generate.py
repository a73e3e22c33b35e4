"""Load a model and continue two prompts as one batch, then show the cache of one sequence.

    python examples/load_and_generate.py                            # a tiny untrained model
    python examples/load_and_generate.py runs/demo/hymba            # what `make demo` trained
    python examples/load_and_generate.py nvidia/Hymba-1.5B-Base     # downloads 3 GB

Without an argument it writes a model folder to a temporary place and loads that: its text is
noise, but everything else is as with a trained one. The released checkpoints come under NVIDIA's
own licence; in float32, as on a CPU here, the 1.5B needs about 7 GB of memory.
"""

import sys
import tempfile
from pathlib import Path

import torch

import hymba
from hymba.hub import find
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer

PROMPTS = ["import os\n", "def read_lines(path):\n    with open(path"]


def untrained(folder: str) -> str:
    """A folder as `hymba.save` writes it, with a tokenizer of nearly bare bytes."""
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], vocab_size=320)
    config = hymba.Config.preset("hymba-tiny").replace(vocab_size=tokenizer.vocab_size)
    hymba.save(LanguageModel(config).init_weights(seed=0), folder, tokenizer)
    return folder


def main(name: str) -> None:
    folder = find(name)  # a folder here, or downloaded from the hub
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hymba.load(folder, device=device, dtype="bfloat16" if device == "cuda" else "float32")
    tokenizer = Tokenizer.from_folder(folder)

    # Prompts of different lengths need no padding: each gives what it gives alone.
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    sampling = hymba.Sampling(max_tokens=24, temperature=0.7, top_p=0.9, seed=1)
    for prompt, answer in zip(PROMPTS, hymba.generate(model, prompts, sampling), strict=True):
        print(f"--- {prompt}[{tokenizer.decode(answer.tokens)}] ({answer.finish})")

    # The forward itself: hidden states of the new rows, a cache that keeps what they leave.
    with torch.no_grad():
        cache = model.new_cache(slots=1)
        tokens = torch.tensor(prompts[0], device=model.device)
        hidden = model(tokens, Batch.of([len(tokens)], device=model.device), cache)  # (N, D)
        likeliest = model.logits(hidden[-1]).topk(3).indices.tolist()  # (V,) -> 3
    print("likeliest next tokens:", [tokenizer.decode([token]) for token in likeliest])
    print("cache bytes after", cache.lengths[0], "tokens:", cache.nbytes())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(sys.argv[1] if len(sys.argv) > 1 else untrained(place))
