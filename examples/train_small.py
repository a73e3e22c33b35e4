"""Train a small hybrid-head model on the standard library's own sources, from Python.

    python examples/train_small.py                       # 40 steps, half a minute on two cores
    python examples/train_small.py runs/mine 2000        # a folder and more steps; Ctrl-C, go on

The same command goes on where it stopped. The result is a model folder that `hymba generate`,
`hymba.load` and transformers read. `hymba demo` is the same with a table and a figure at its end.
"""

import sys
import tempfile
from pathlib import Path

import hymba
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.train import Schedule, TrainConfig, Trainer, prepare, python_library, split
from hymba.train.sources import Files


def main(folder: Path, steps: int) -> None:
    everything = python_library()
    files = Files(everything.root, everything.names[:150])  # a part, so that this is quick
    train, held_out = split(files)
    tokenizer = Tokenizer.train(train, vocab_size=2048)
    data = prepare(folder / "train", train, tokenizer)
    unseen = prepare(folder / "held_out", held_out, tokenizer)

    # A preset with this vocabulary; `hymba.presets` has the functions that lay out other plans.
    config = hymba.Config.preset("hymba-tiny").replace(vocab_size=tokenizer.vocab_size)
    model = LanguageModel(config).init_weights(seed=0)
    run = TrainConfig(
        folder=folder / "run",
        steps=steps,
        rows=4,
        sequence_length=128,
        schedule=Schedule(peak=4e-3, warmup=0.1, decay=0.3),
        held_out_tokens=4096,
        log_every=max(1, steps // 8),
    )
    result = Trainer(model, run, data, unseen).run()
    if result.stopped:
        return

    hymba.save(model, folder / "model", tokenizer)
    prompt = tokenizer.encode("import ", bos=True)
    answer = hymba.generate(model, [prompt], hymba.Sampling(max_tokens=16))[0]
    print("import", repr(tokenizer.decode(answer.tokens)), "(it needs more steps than this)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(
            Path(sys.argv[1] if len(sys.argv) > 1 else place),
            int(sys.argv[2]) if len(sys.argv) > 2 else 40,
        )
