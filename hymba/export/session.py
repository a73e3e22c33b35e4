"""An exported folder, run: what a program on a device does, for `--check` and for tests.

The cache stays where it is: each output is bound to the memory of its input, so a step writes one
row of each K/V and moves nothing (examples/onnx_loop.py is the same without this package).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from hymba.export.run import MODEL, START, read_told
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel


class Session:
    """One sequence of at most `room` tokens."""

    def __init__(self, folder: str | Path, room: int, threads: int = 0):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_mem_pattern = False  # planned for a chunk, it would be kept for every step
        self.told = read_told(folder)
        self._value = ort.OrtValue.ortvalue_from_numpy
        start, self._model = (
            ort.InferenceSession(str(Path(folder) / name), options, ["CPUExecutionProvider"])
            for name in (START, MODEL)
        )
        self._binding = self._model.io_binding()
        self._start, self._room = start, np.array([room])
        self._logits = self._value(np.empty((1, self.told["vocabulary"]), np.float32))
        self._binding.bind_ortvalue_output("logits", self._logits)
        self.reset()

    def reset(self) -> None:
        """A new sequence."""
        self.past = 0
        values = self._start.run_with_ort_values(None, {"room": self._value(self._room)})
        for output, value in zip(self._start.get_outputs(), values, strict=True):
            self._binding.bind_ortvalue_input(output.name, value)
            self._binding.bind_ortvalue_output(output.name.replace("past", "present"), value)

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Go on with these tokens; logits (V,) after the last."""
        for first in range(0, len(ids), self.told["chunk"]):
            part = np.array(ids[first : first + self.told["chunk"]], np.int64)
            self._binding.bind_cpu_input("ids", part)
            self._binding.bind_cpu_input("past", np.array([self.past]))
            self._model.run_with_iobinding(self._binding)
            self.past += len(part)
        return self._logits.numpy()[0].copy()


class Agreement(NamedTuple):
    same: int  # of `tokens` greedy tokens
    tokens: int
    off: float  # the largest difference of logits, over their standard deviation


@torch.no_grad()
def compare(model: LanguageModel, folder: str | Path, tokens: int = 64) -> Agreement:
    """Feed both the same tokens, a chunk and then the model's own choices one by one."""
    size, told = model.config.vocab_size, read_told(folder)
    prompt = torch.randint(size, (told["chunk"] + 3,), generator=torch.Generator().manual_seed(0))
    exported, cache = Session(folder, len(prompt) + tokens), model.new_cache(1)
    ids, same, off = prompt.tolist(), 0, 0.0
    for _ in range(tokens):
        batch = Batch.of([len(ids)], [cache.length(0)])
        ours = model.logits(model(torch.tensor(ids), batch, cache)[-1]).float().numpy()
        theirs = exported.feed(ids)
        same += int(ours.argmax() == theirs.argmax())
        off = float(np.maximum(off, np.abs(ours - theirs).max() / ours.std()))  # nan stays
        ids = [int(ours.argmax())]
    return Agreement(same, tokens, off)
