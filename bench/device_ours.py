"""A side of bench/device.py: our model, from a folder as a user has it, through `hymba.LLM` or
through transformers.

A folder of random weights is made once, in bfloat16, and from it those in few bits by
`hymba.load(..., quantize=...)` and `hymba.save`, so what is timed has gone the whole way. There is
an engine for each depth, with a cache for one sequence of that depth; a prompt that comes again
begins from the engine's own snapshot of it, so every measurement starts at the same depth.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bench.device_child import need_memory, resident, serve
from hymba import __version__
from hymba.commands import choose_threads
from hymba.config import Config
from hymba.engine import LLM, Limits, Sampling
from hymba.model.accounting import cache_bytes, step_bytes
from hymba.model.decoder import LanguageModel
from hymba.weights import load, save

WARM_UP = 600  # tokens of the first prompt: more than the engine computes in one step


def folder_of(preset: str, scheme: str, cache: Path) -> Path:
    """A folder with random weights of a preset, made if it is not there."""
    folder = cache / f"{preset}-{scheme}"
    if (folder / "config.json").is_file():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        if scheme == "bf16":
            save(random_model(Config.preset(preset)), unfinished)
        else:
            save(load(folder_of(preset, "bf16", cache), quantize=scheme), unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@torch.no_grad()
def random_model(config: Config) -> LanguageModel:
    need_memory(4 * sum(p.numel() for p in _empty(config).parameters()))
    plain = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LanguageModel(config).init_weights(0)
    finally:
        torch.set_default_dtype(plain)


def _empty(config: Config) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)


class Side:
    """What both sides know of the model; `room`: tokens behind the deepest prompt."""

    def __init__(self, preset: str, scheme: str, cache: str, threads: int, room: int):
        choose_threads(threads)
        self.folder, self.room = folder_of(preset, scheme, Path(cache)), room
        self.config = Config.preset(preset)
        sizes = (file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self.file_bytes = sum(sizes)
        need_memory(int(1.3 * self.file_bytes) + (1 << 30))
        self.generator = torch.Generator().manual_seed(0)

    def prompt(self, length: int) -> list[int]:
        size = self.config.vocab_size
        return torch.randint(3, size, (length,), generator=self.generator).tolist()

    def about(self) -> dict[str, Any]:
        return {
            "modes": [""],
            "engine": self.engine_name(),
            "parameters": sum(p.numel() for p in _empty(self.config).parameters()),
            "file_bytes": self.file_bytes,
        }

    def engine_name(self) -> str:
        raise NotImplementedError


class Ours(Side):
    """hymba.LLM, batch 1, greedy."""

    def __init__(self, kv_dtype: str | None = None, **asked: Any):
        super().__init__(**asked)
        self.model, self.kv_dtype = load(self.folder), kv_dtype
        self.engines: dict[int, LLM] = {}
        self.prompts: dict[int, list[int]] = {}
        self.fill(WARM_UP)  # compiles what is compiled when it is first used, or loads it
        self.engines.clear()

    def engine_name(self) -> str:
        return f"hymba {__version__}, torch {torch.__version__}"

    def bytes(self, depth: int) -> int:
        """Weights as they are kept (of the meta tokens only their K/V is read), K/V that is seen,
        states read and written."""
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        decoder = self.model.decoder
        unread = [] if decoder.meta_tokens is None else [*decoder.meta_tokens.parameters()]
        if not self.config.tie_embeddings:
            unread += decoder.embed_tokens.parameters()
        total = sum(weights.values()) - sum(p.nbytes for p in unread)
        kv = next(x for x in (*self._engine(depth).store.rings, *self._engine(depth).store.paged))
        moved = step_bytes(self.config, depth, kv_bytes=kv.element_size())
        once = step_bytes(self.config, depth, kv_bytes=self.model.dtype.itemsize)
        return total + once["meta"] + moved["kv"] + once["states"]

    def _engine(self, depth: int) -> Any:
        return self.engines[depth].engine

    def fill(self, depth: int, mode: str = "") -> dict[str, Any]:
        room = max(1, depth) + self.room + 2
        one = cache_bytes(self.config, room, kv_bytes=4)["total"]  # the only beginning to be kept
        limits = Limits(max_sequences=1, max_tokens=room, prefix_bytes=one, kv_dtype=self.kv_dtype)
        self.engines[depth] = LLM(self.model, limits=limits)
        self.prompts[depth] = self.prompt(max(1, depth))
        seconds = self._begin(depth, 2, logprobs=0)
        self._end(depth)
        return {"seconds": seconds, "memory": resident()}

    def decode(self, depth: int, mode: str, tokens: int) -> float:
        """The prompt is not computed again, but for its last token. Nobody says the last of the
        tokens asked for: an answer that ends is kept as a beginning, too."""
        self._begin(depth, tokens + 2)
        engine = self._engine(depth)
        begin = time.perf_counter()
        said = sum(len(delta.tokens) for _ in range(tokens) for delta in engine.step())
        seconds = time.perf_counter() - begin
        cached = self.request.cached_tokens
        if said != tokens or cached < depth - 1:
            raise RuntimeError(f"said {said} of {tokens} tokens behind {cached} kept ones")
        self._end(depth)
        return seconds

    def prefill(self, tokens: int) -> float:
        seconds = self._begin(0, 2, self.prompt(tokens))
        self._end(0)
        return seconds

    def _begin(
        self, depth: int, tokens: int, prompt: list[int] | None = None, **sampling: Any
    ) -> float:
        """Seconds until a prompt's first token is said."""
        engine = self._engine(depth)
        how = Sampling(max_tokens=tokens, stop_ids=(), **sampling)
        begin = time.perf_counter()
        self.request = engine.add(prompt or self.prompts[depth], how)
        deltas: list[Any] = []
        while not deltas:
            deltas = engine.step()
        seconds = time.perf_counter() - begin
        if sampling and not abs(deltas[0].logprobs[0].logprob) < 1e4:
            raise RuntimeError("its logits are not numbers")
        return seconds

    def _end(self, depth: int) -> None:
        self._engine(depth).cancel(self.request)


class Transformers(Side):
    """AutoModelForCausalLM on the same folder: a forward a token, and the likeliest token."""

    def __init__(self, **asked: Any):
        super().__init__(**asked)
        from transformers import AutoModelForCausalLM

        import hymba.hf  # noqa: F401  (registers the model)

        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto").eval()
        self.filled: dict[int, Any] = {}  # depth: the cache, the next token

    def engine_name(self) -> str:
        import transformers

        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def bytes(self, depth: int) -> int:
        moved = step_bytes(self.config, depth)
        return moved["total"]

    @torch.no_grad()
    def fill(self, depth: int, mode: str = "") -> dict[str, Any]:
        begin = time.perf_counter()
        ids = torch.tensor([self.prompt(max(1, depth))])
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - begin
        if not bool(torch.isfinite(out.logits).all()):
            raise RuntimeError("its logits are not numbers")
        self.filled[depth] = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return {"seconds": seconds, "memory": resident()}

    @torch.no_grad()
    def decode(self, depth: int, mode: str, tokens: int) -> float:
        kept, ids = self.filled[depth]
        cache = copy.deepcopy(kept)
        begin = time.perf_counter()
        for _ in range(tokens):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        ids = torch.tensor([self.prompt(tokens)])
        begin = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin


def make(kind: str, **asked: Any) -> Side:
    return {"hymba": Ours, "transformers": Transformers}[kind](**asked)


if __name__ == "__main__":
    serve(make)
