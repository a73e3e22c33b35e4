"""A side of bench/device.py: llama.cpp on a shape with random weights.

Runs where llama-cpp-python, gguf and numpy are (`--llama-python`), and imports nothing else. The
file is written once, tensor by tensor: random codes, with scales that give weights of about 0.02,
so that no number is special. Q4_0 is as llama-quantize makes it: blocks of Q4_0, and the head (the
tied embedding, where it is tied) in Q6_K.

Its work is `llama_decode` through the low-level interface, with no tokenizer and no sampling, so
nothing of Python's is in the time. Contexts are made one for each depth and each mode (flash
attention on or off), since neither may change afterwards.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.device_child import need_memory, resident, serve

STD = 0.02
MODES = ("flash", "plain")  # attention


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    inner: int = 0  # of the SSM beside attention (Mamba-2); 0: there is none
    ssm_heads: int = 0
    states: int = 0
    conv: int = 4

    @property
    def arch(self) -> str:
        return "falcon-h1" if self.inner else "llama"


# Falcon-H1-1.5B's MLP width follows from its published 1.55 billion parameters.
SHAPES = {
    "llama-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256, True),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True),
    "falcon-h1-1.5b": Shape(
        2048, 24, 8, 2, 128, 4608, 65536, False, inner=3072, ssm_heads=48, states=256
    ),
    "llama-tiny": Shape(256, 2, 4, 2, 64, 512, 1024, True),
    "falcon-h1-tiny": Shape(256, 2, 4, 2, 64, 512, 1024, False, inner=512, ssm_heads=8, states=64),
}
FORMATS = ("q4_0", "q8_0")


def tensors(shape: Shape, form: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every tensor; kind is q4_0, q6_k, q8_0 or f32."""
    head = "q6_k" if form == "q4_0" else form
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden = shape.hidden
    yield "token_embd.weight", (shape.vocab, hidden), head if shape.tied else form
    if not shape.tied:
        yield "output.weight", (shape.vocab, hidden), head
    yield "output_norm.weight", (hidden,), "f32"
    if not shape.inner:
        yield "rope_freqs.weight", (shape.head_dim // 2,), "f32"
    for i in range(shape.layers):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", (hidden,), "f32"
        yield block + "attn_q.weight", (q, hidden), form
        yield block + "attn_k.weight", (kv, hidden), form
        yield block + "attn_v.weight", (kv, hidden), form
        yield block + "attn_output.weight", (hidden, q), form
        if shape.inner:
            yield from ssm_tensors(shape, form, block)
        yield block + ("ffn_norm" if shape.inner else "ffn_norm.weight"), (hidden,), "f32"
        yield block + "ffn_gate.weight", (shape.mlp, hidden), form
        yield block + "ffn_up.weight", (shape.mlp, hidden), form
        yield block + "ffn_down.weight", (hidden, shape.mlp), form


def ssm_tensors(shape: Shape, form: str, block: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    mixed = shape.inner + 2 * shape.states  # what the convolution sees: u, B and C
    yield block + "ssm_in.weight", (shape.inner + mixed + shape.ssm_heads, shape.hidden), form
    yield block + "ssm_conv1d.weight", (mixed, shape.conv), "f32"
    yield block + "ssm_conv1d.bias", (mixed,), "f32"
    yield block + "ssm_dt.bias", (shape.ssm_heads,), "f32"
    yield block + "ssm_a", (shape.ssm_heads, 1), "f32"
    yield block + "ssm_d", (shape.ssm_heads, 1), "f32"
    yield block + "ssm_out.weight", (shape.hidden, shape.inner), form


# Blocks of a kind: weights, bytes, and where the scale (float16) is; its value for weights of STD.
BLOCKS = {
    "q4_0": (32, 18, 0, STD / 4.61),
    "q8_0": (32, 34, 0, STD / 73.9),
    "q6_k": (256, 210, 208, STD / (18.5 * 32)),
}


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    count = int(np.prod(shape))
    if kind == "f32":
        return 4 * count
    weights, size, _, _ = BLOCKS[kind]
    return count // weights * size


def values(name: str, shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> Any:
    """Random codes, as bytes (rows, bytes of a row); floats where there are no codes."""
    if kind == "f32":
        if name.endswith("ssm_a"):
            return -np.linspace(1, 16, shape[0], dtype=np.float32).reshape(shape)
        if name.endswith("bias"):
            return np.zeros(shape, np.float32)
        return np.ones(shape, np.float32) if "conv1d" not in name else np.full(shape, STD, "f4")
    weights, size, at, scale = BLOCKS[kind]
    blocks = rng.bytes(nbytes(shape, kind))
    found = np.frombuffer(blocks, np.uint8).reshape(-1, size).copy()
    found[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    if kind == "q6_k":
        found[:, 192:208] = 32  # scales of its 16 groups
    return found.reshape(shape[0], shape[1] // weights * size)


def write(path: Path, shape: Shape, form: str) -> None:
    """A GGUF file of random weights; at most one tensor is in memory."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, shape.arch)
    kinds = gguf.GGMLQuantizationType
    described(writer, shape)
    for name, dims, kind in tensors(shape, form):
        what = kinds[kind.upper()]
        writer.add_tensor_info(name, dims, np.dtype(np.float32), nbytes(dims, kind), what)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.Generator(np.random.SFC64(0))
        for name, dims, kind in tensors(shape, form):
            writer.write_tensor_data(values(name, dims, kind, rng))
        writer.close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def described(writer: Any, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.inner:
        writer.add_ssm_conv_kernel(shape.conv)
        writer.add_ssm_inner_size(shape.inner)
        writer.add_ssm_state_size(shape.states)
        writer.add_ssm_time_step_rank(shape.ssm_heads)
        writer.add_ssm_group_count(1)
    writer.add_tokenizer_model("no_vocab")


class Llama:
    """A file in llama.cpp, with contexts that are filled once and cut back after each use."""

    def __init__(
        self, shape: str, form: str, cache: str, threads: int, room: int, mapped: bool = True
    ):
        """`room`: tokens behind the deepest prompt. `mapped`: the file is mapped, as llama.cpp does
        unless told otherwise; repacked weights are then in memory beside it."""
        import llama_cpp

        self.api, self.shape, self.form = llama_cpp, SHAPES[shape], form
        self.threads, self.room = threads, room
        self.path = Path(cache) / f"{shape}-{form}.gguf"
        self.size = sum(nbytes(dims, kind) for _, dims, kind in tensors(self.shape, form))
        if not self.path.is_file():
            write(self.path, self.shape, form)
        need_memory(2 * self.size + (1 << 30))
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        if not mapped:
            options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model = llama_cpp.llama_model_load_from_file(bytes(self.path), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        self.contexts: dict[tuple[int, str], Any] = {}
        self.random = np.random.default_rng(0)

    def about(self) -> dict[str, Any]:
        parameters = sum(int(np.prod(dims)) for _, dims, _ in tensors(self.shape, self.form))
        return {
            "modes": MODES,
            "engine": f"llama-cpp-python {self.api.__version__}",
            "features": self.api.llama_print_system_info().decode().strip(),
            "parameters": parameters,
            "file_bytes": self.path.stat().st_size,
        }

    def bytes(self, depth: int) -> int:
        """Weights but for a table of which one row is read, K/V in float16, and the states read and
        written."""
        shape = self.shape
        rows = ((name, nbytes(dims, kind)) for name, dims, kind in tensors(shape, self.form))
        weights = sum(size for name, size in rows if shape.tied or name != "token_embd.weight")
        kv = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * depth
        state = shape.inner * shape.states + (shape.inner + 2 * shape.states) * (shape.conv - 1)
        return weights + kv + 2 * 4 * shape.layers * state * bool(shape.inner)

    def fill(self, depth: int, mode: str, compute: int | None = None) -> dict[str, Any]:
        """`compute`: fewer tokens than there is room for, where only memory is looked at."""
        api = self.api
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = depth + self.room, 2048
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = {
            "flash": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "plain": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }[mode]
        context = api.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {options.n_ctx} tokens")
        self.contexts[depth, mode] = context
        seconds = self._run(context, depth if compute is None else compute)
        self._run(context, 1)  # allocates what a decode step has
        self._check(context)
        self._cut(context, depth)
        return {"seconds": seconds, "memory": resident()}

    def decode(self, depth: int, mode: str, tokens: int) -> float:
        context = self.contexts[depth, mode]
        seconds = sum(self._run(context, 1) for _ in range(tokens))
        self._cut(context, depth)
        return seconds

    def prefill(self, tokens: int) -> float:
        context = self.contexts[0, MODES[0]]
        seconds = self._run(context, tokens)
        self._cut(context, 0)
        return seconds

    def _run(self, context: Any, count: int) -> float:
        """Seconds of so many more tokens, 2048 at a time, with the logits of the last."""
        ids = self.random.integers(0, self.shape.vocab, count, dtype=np.int32)
        seconds = 0.0
        for first in range(0, count, 2048):
            part = np.ascontiguousarray(ids[first : first + 2048])
            tokens = part.ctypes.data_as(self.api.llama_token_p)
            batch = self.api.llama_batch_get_one(tokens, len(part))
            begin = time.perf_counter()
            failed = self.api.llama_decode(context, batch)
            seconds += time.perf_counter() - begin
            if failed:
                raise RuntimeError(f"llama_decode gave {failed}")
        return seconds

    def _cut(self, context: Any, depth: int) -> None:
        """Back to `depth` tokens. Recurrent states cannot, unless to nothing: such a context grows
        by what it has decoded."""
        memory = self.api.llama_get_memory(context)
        if depth == 0:
            self.api.llama_memory_clear(memory, False)
        else:
            self.api.llama_memory_seq_rm(memory, 0, depth, -1)

    def _check(self, context: Any) -> None:
        found = self.api.llama_get_logits_ith(context, -1)
        logits = np.ctypeslib.as_array(found, (self.shape.vocab,))
        if not np.isfinite(logits).all() or logits.std() == 0:
            raise RuntimeError("its logits are not numbers")


if __name__ == "__main__":
    serve(Llama)
