"""Continue a text with a folder that `hymba export` wrote: onnxruntime, numpy, tokenizers, no more.

    hymba export results/lab-models/hymba --onnx runs/onnx
    python examples/onnx_loop.py runs/onnx "def read_lines(path):" --tokens 100

The cache lies in memory of onnxruntime's. Each output is bound to the memory of its input, so a
step writes one row into each layer's K/V and moves nothing else.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--temperature", type=float, default=0.0)
asked = parser.parse_args()

told = json.loads((asked.folder / "hymba.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(asked.folder / "tokenizer.json"))
options = ort.SessionOptions()
options.enable_mem_pattern = False  # memory planned for a chunk would be kept for every step
start = ort.InferenceSession(asked.folder / "start.onnx", options)
model = ort.InferenceSession(asked.folder / "model.onnx", options)

ids = tokenizer.encode(asked.prompt, add_special_tokens=False).ids
ids = ids if told["begin"] is None else [told["begin"], *ids]
room = ort.OrtValue.ortvalue_from_numpy(np.array([len(ids) + asked.tokens]))
logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, told["vocabulary"]), np.float32))
binding = model.io_binding()
binding.bind_ortvalue_output("logits", logits)
before = start.run_with_ort_values(None, {"room": room})
del start  # its zeros are not needed any more
for name, value in zip(told["cache"], before, strict=True):
    binding.bind_ortvalue_input(f"past.{name}", value)
    binding.bind_ortvalue_output(f"present.{name}", value)

draw, past, said, begun = np.random.default_rng(0), 0, [], time.perf_counter()
chunks = [ids[i : i + told["chunk"]] for i in range(0, len(ids), told["chunk"])]
while chunks and len(said) < asked.tokens:
    chunk = chunks.pop(0)
    binding.bind_cpu_input("ids", np.array(chunk))
    binding.bind_cpu_input("past", np.array([past]))
    model.run_with_iobinding(binding)
    past += len(chunk)
    if not chunks:  # the prompt is read
        scores = logits.numpy()[0].astype(np.float64)
        if asked.temperature > 0:
            scores = scores / asked.temperature + draw.gumbel(size=len(scores))
        token = int(scores.argmax())
        if token not in told["end"]:
            said.append(token)
            chunks.append([token])
print(asked.prompt + tokenizer.decode(said))
print(f"{past / (time.perf_counter() - begun):.1f} tokens a second, with the prompt's")
