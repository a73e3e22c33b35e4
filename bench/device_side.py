"""A side of bench/device.py as its parent sees it: a process that is told what to do, by name.

hymba-int4            this package's engine on a folder in few bits (bench/device_ours.py)
hymba-int4-kv16       the same, with keys and values in bfloat16, as wide as llama.cpp's own
transformers-bf16     the same model through transformers
llama-3b-q4_0         llama.cpp on a shape with random weights (bench/device_llama.py)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NARROW = "-kv16"
OURS = (
    *(f"hymba-{scheme}" for scheme in ("int4", "int8", "bf16", "int4-kv16", "int8-kv16")),
    "transformers-bf16",
)
LLAMA = tuple(
    f"{shape}-{form}"
    for shape in ("llama-3b", "llama-1b", "falcon-h1-1.5b", "llama-tiny", "falcon-h1-tiny")
    for form in ("q4_0", "q8_0")
)
ROOT = Path(__file__).resolve().parent.parent


class SideError(Exception):
    """Why a side is left out, in one line."""


class Side:
    def __init__(self, name: str, options: argparse.Namespace, **special: Any):
        """Start it; its model is loaded (and made, the first time) when this returns."""
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            command(name, options, special),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **how: Any) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: what follows says why
            self.process.stdin.write(json.dumps({"do": do} | how) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SideError(f"its process ended ({ended(self.process.returncode)}){self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer["value"]

    def _said(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with contextlib.suppress(OSError):  # of what it will not read any more
                    pipe.close()


def command(name: str, options: argparse.Namespace, special: dict[str, Any]) -> list[str]:
    asked = {"cache": str(options.cache), "threads": options.threads, "room": options.room}
    if name in LLAMA:
        shape, _, form = name.rpartition("-")
        python, module = options.llama_python, "bench.device_llama"
        asked |= {"shape": shape, "form": form}
    else:
        kind, _, scheme = name.removesuffix(NARROW).rpartition("-")
        python, module = sys.executable, "bench.device_ours"
        asked |= {"kind": kind, "scheme": scheme, "preset": options.preset}
        asked |= {"kv_dtype": "bfloat16"} if name.endswith(NARROW) else {}
    return [str(python), "-P", "-m", module, json.dumps(asked | special)]


def ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"
