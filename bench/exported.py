"""What an exported model costs in onnxruntime on this machine: prompt, steps, memory.

    hymba export MODEL --onnx runs/onnx --quantize int4
    python -m bench.exported runs/onnx --threads 4 --depth 0 1024

Steps are timed one by one: the median tells the machine as it was, the quickest what it can do
while nobody else reads memory. Tokens are drawn at random, and so may the weights be.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hymba.files import write_json

EXAMPLES = """examples:
  python -m bench.exported runs/onnx
  python -m bench.exported runs/onnx --threads 2 --depth 0 4096 --json exported.json
"""


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exported", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="what `hymba export` wrote")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--depth", type=int, nargs="+", default=[0, 1024], help="tokens before")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="the figures, as a file")
    return parser.parse_args(argv)


def measure(asked: argparse.Namespace, depth: int) -> dict[str, Any]:
    """One sequence: `depth` tokens in whole chunks, then single ones."""
    from hymba.export.session import Session

    session = Session(asked.folder, depth + asked.steps, asked.threads)
    ids, chunk = np.random.default_rng(0), session.told["chunk"]
    chunks, steps = [], []
    for first in range(0, depth, chunk):
        part = ids.integers(session.told["vocabulary"], size=min(chunk, depth - first)).tolist()
        begun = time.perf_counter()
        session.feed(part)
        chunks.append(len(part) / (time.perf_counter() - begun))
    for token in ids.integers(session.told["vocabulary"], size=asked.steps).tolist():
        begun = time.perf_counter()
        session.feed([token])
        steps.append(time.perf_counter() - begun)
    return {
        "depth": depth,
        "prefill tokens/s, median chunk": statistics.median(chunks) if chunks else None,
        "decode ms, median": 1e3 * statistics.median(steps),
        "decode ms, quickest": 1e3 * min(steps),
        "resident MB": resident(),
    }


def resident() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def main(argv: Sequence[str] | None = None) -> int:
    asked = read(argv)
    rows = [measure(asked, depth) for depth in asked.depth]
    for row in rows:
        print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}))
    if asked.json:
        told = {"threads": asked.threads, "machine": platform.processor(), "rows": rows}
        write_json(asked.json, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
