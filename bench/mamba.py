"""mamba-ssm's CUDA selective scan as a peer, built from its source package where one is given.

Its kernels are compiled as they are, for bfloat16 and float32 weights only: small files of ours
name the few instantiations that are needed, one of each launch size a file, so that a build takes
a minute or two. Nothing of it is used by the package.

    python -m bench.mamba SOURCE         builds ahead (SOURCE: the sdist, or its unpacked folder)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
NAME = "selective_scan_bf16"
KERNELS = Path("csrc/selective_scan")
LONGEST = 240  # seconds to wait for a build
SIZES = [(32, 4), (32, 8), (32, 16), (64, 16), (128, 16)]  # threads, items: its launch sizes
FLAGS = """-O3 --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda
    -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ -U__CUDA_NO_BFLOAT16_OPERATORS__
    -U__CUDA_NO_BFLOAT16_CONVERSIONS__ -U__CUDA_NO_BFLOAT162_OPERATORS__
    -U__CUDA_NO_BFLOAT162_CONVERSIONS__""".split()
REST = """
#include <ATen/ATen.h>
#include <cuda_runtime.h>
#include "selective_scan.h"
template <typename I, typename W> void selective_scan_fwd_cuda(SSMParamsBase &, cudaStream_t);
template <typename I, typename W> void selective_scan_bwd_cuda(SSMParamsBwd &, cudaStream_t);
#define LEFT_OUT(PASS, PARAMS, I, W) template <> \\
    void selective_scan_##PASS##_cuda<I, W>(PARAMS &, cudaStream_t) { \\
        TORCH_CHECK(false, "built for bfloat16 only"); }
#define NEITHER(I, W) LEFT_OUT(fwd, SSMParamsBase, I, W) LEFT_OUT(bwd, SSMParamsBwd, I, W)
NEITHER(float, float)
NEITHER(at::Half, float)
NEITHER(float, c10::complex<float>)
NEITHER(at::Half, c10::complex<float>)
NEITHER(at::BFloat16, c10::complex<float>)
"""


# The build


def build_folder() -> Path:
    """Where torch keeps extensions: TORCH_EXTENSIONS_DIR or its own cache."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root) / NAME


def unpacked(source: Path, into: Path) -> Path:
    """The folder of kernels in a source package or its folder."""
    if source.is_file():
        with tarfile.open(source) as package:
            package.extractall(into, filter="data")
        source = into
    found = sorted(source.glob(f"**/{KERNELS}/selective_scan.cpp"))
    if not found:
        raise FileNotFoundError(f"no {KERNELS}/selective_scan.cpp in {source}")
    return found[0].parent


def write_files(folder: Path) -> list[Path]:
    """The files that say which instantiations are built."""
    texts = {"rest.cu": REST}
    for name, params in (("fwd", "SSMParamsBase"), ("bwd", "SSMParamsBwd")):
        include = f'#include "selective_scan_{name}_kernel.cuh"\n'
        arguments = f"at::BFloat16, float>({params} &, cudaStream_t);\n"
        launches = [f"selective_scan_{name}_launch<{t}, {i}, {arguments}" for t, i in SIZES]
        chooser = f"template void selective_scan_{name}_cuda<{arguments}"
        elsewhere = "".join(f"extern template void {launch}" for launch in launches)
        texts[f"{name}.cu"] = include + elsewhere + chooser
        for (threads, items), launch in zip(SIZES, launches, strict=True):
            texts[f"{name}_{threads}_{items}.cu"] = f"{include}template void {launch}"
    for file, text in texts.items():
        if not (folder / file).exists() or (folder / file).read_text() != text:
            (folder / file).write_text(text)  # untouched files are not built again
    return [folder / file for file in texts]


@cache
def load(source: Path) -> Any:
    """The extension's module, with `fwd` and `bwd`; builds it where that has not been done."""
    from torch.utils import cpp_extension

    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    kernels = unpacked(source, folder / "source")
    os.environ.setdefault("MAX_JOBS", str(min(16, os.cpu_count() or 1)))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    files = [kernels / "selective_scan.cpp", *write_files(folder)]
    return cpp_extension.load(
        NAME,
        [str(file) for file in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=FLAGS,
        extra_include_paths=[str(kernels)],
        build_directory=str(folder),
        with_cuda=True,
    )


def version(source: Path) -> str:
    """As its source package is named: mamba_ssm-2.3.2.tar.gz is 2.3.2."""
    return source.name.removesuffix(".tar.gz").rpartition("-")[2]


class Build:
    """A build in the background: `kernels()` waits for it."""

    def __init__(self, source: Path):
        self.source, self.module = source, None
        command = [sys.executable, "-m", "bench.mamba", str(source.resolve())]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kernels(self) -> Any:
        """The module; raises with the build's last lines where it failed."""
        if self.module is None:
            said, _ = self.process.communicate(timeout=LONGEST)
            if self.process.returncode:
                raise RuntimeError(f"the build of mamba-ssm failed: {' / '.join(errors(said))}")
            self.module = load(self.source)
        return self.module


def errors(said: str) -> list[str]:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return [line for line in lines if "error" in line.lower()][:3] or lines[-3:]


# Its operation


class _Scan(torch.autograd.Function):
    """y of u, delta, z (S, E, T); A (E, n); B, C (S, 1, n, T); D, bias (E,), all as its kernels
    want them. The state is returned without a gradient, since they give none."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        u, delta, A, B, C, D, z, bias = inputs
        plain, states, gated = kernels.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.kernels = kernels
        ctx.save_for_backward(*inputs, states, plain)
        final = states[:, :, -1, 1::2].clone()
        ctx.mark_non_differentiable(final)
        return gated, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, states, plain = ctx.saved_tensors
        dy = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        du, ddelta, dA, dB, dC, dD, dbias, dz = ctx.kernels.bwd(
            u, delta, A, B, C, D, z, bias, dy, states, plain, None, True, False
        )
        return None, du, ddelta, dA, dB, dC, dD, dz, dbias


def scan(kernels: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """u, delta, A, B, C, D, z, bias in its layout -> y (S, E, T) and the last state (S, E, n)."""
    return _Scan.apply(kernels, *inputs)


def to_its_layout(inputs: dict[str, Tensor], count: int) -> list[Tensor]:
    """Our scan's inputs (N, E), (N, n) of `count` equal segments as its kernels want them."""

    def turned(x: Tensor) -> Tensor:  # (N, E) -> (S, E, T)
        return x.unflatten(0, (count, -1)).transpose(1, 2).contiguous()

    u, delta, z = (turned(inputs[name]) for name in ("u", "dt", "z"))
    B, C = (turned(inputs[name])[:, None] for name in ("B", "C"))
    A, D, bias = (inputs[name].float() for name in ("A", "D", "dt_bias"))
    return [u, delta, A, B, C, D, z, bias]


def door(kernels: Any) -> Callable[..., Any]:
    """An `ops.selective_scan` that runs on its kernels, for equal segments. They take no initial
    state, so it is ignored: the work is the same, the numbers are not."""

    def selective_scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        segments: Any,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if segments.uniform is None:
            raise ValueError("mamba-ssm's scan takes segments of one length")
        inputs = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        y, final = scan(kernels, *to_its_layout(inputs, segments.count))
        return y.transpose(1, 2).reshape(u.shape), final

    return selective_scan


if __name__ == "__main__":
    load(Path(sys.argv[1]))
