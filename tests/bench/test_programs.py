"""The GPU benchmarks as programs: their options, their help, and one line where there is no GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import gpu, model, train
from hymba import ops
from hymba.config import Config
from hymba.model.accounting import parameters
from hymba.model.decoder import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("ops", "train", "trainer", "prefill", "engine", "packed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"bench.{request.param}")


def test_help_says_what_is_measured(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said and f"python -m {program.__name__}" in said


def test_examples_are_accepted(program: ModuleType) -> None:
    for line in program.EXAMPLES.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if words[:2] == ["python", "-m"]:
            assert words[2] == program.__name__
            program.read(words[3:])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ops", ["--only", "scan,cnov"]),
        ("train", ["--rows", "0"]),
        ("train", ["--variants", "theirs"]),
        ("trainer", ["--plans", "mamba"]),
        ("trainer", ["--lengths", "2048,x"]),
        ("trainer", ["--tokens", "5000"]),
        ("prefill", ["--tokens", "0"]),
        ("engine", ["--batches", "1,0"]),
        ("engine", ["--skip", "lama"]),
        ("engine", ["--context", "100"]),
        ("packed", ["--schemes", "int5"]),
        ("packed", ["--engine-batches", "1,0"]),
    ],
)
def test_wrong_options_are_refused(
    name: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"bench.{name}").read(wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


@no_gpu
def test_without_a_gpu_one_line(program: ModuleType) -> None:
    with pytest.raises(SystemExit) as end:
        program.main([])
    assert re.fullmatch(
        r"bench/\w+\.py: no CUDA device \(torch .* sees none\)", str(end.value.code)
    )


@no_gpu
@pytest.mark.slow
def test_make_test_gpu_without_a_gpu_one_line() -> None:
    command = ["make", "--no-print-directory", "test-gpu", f"GPU_PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "make test-gpu: no CUDA device" in done.stderr


def test_the_twin_of_the_trainers_bench_is_as_large() -> None:
    from bench.trainer import RandomRows, plan_of

    for preset in ("hymba-350m", "hymba-1.5b"):
        ours, theirs = (
            parameters(plan_of(preset, plan, 0))["total"] for plan in ("hymba", "llama")
        )
        assert abs(ours - theirs) < 0.01 * ours
    rows = RandomRows(100, 8)
    assert torch.equal(rows.row(3).tokens[1:], rows.row(3).labels[:-1])
    assert not torch.equal(rows.row(3).tokens, rows.row(4).tokens)


def test_source_of_mamba_ssm_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_SSM_SOURCE", "somewhere/mamba_ssm.tar.gz")
    assert train.read([]).mamba_ssm == Path("somewhere/mamba_ssm.tar.gz")
    monkeypatch.delenv("MAMBA_SSM_SOURCE")
    assert train.read([]).mamba_ssm is None


# The parts that need no device


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_slug(device: str, name: str) -> None:
    assert gpu.slug(device) == name


def test_relative_error_never_passes_what_is_not_finite() -> None:
    x = torch.randn(8)
    assert gpu.relative_error(x, x) == 0
    assert gpu.relative_error(1.01 * x, x) == pytest.approx(0.01, rel=1e-4)
    for wrong in (x * math.nan, x + math.inf, x[:4]):
        assert gpu.relative_error(wrong, x) == math.inf


def test_report_is_whole_at_any_moment(tmp_path: Path) -> None:
    report = gpu.Report(tmp_path / "new" / "ops.json", {"device": "a GPU"})
    report.add({"op": "scan"})
    report.put(failed=[])
    assert json.loads(report.path.read_text()) == report.data
    assert report.data == {"device": "a GPU", "results": [{"op": "scan"}], "failed": []}
    assert os.listdir(report.path.parent) == ["ops.json"]


def test_a_failure_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.attempt("well", lambda: 3) == 3
    assert gpu.attempt("badly", lambda: 1 // 0) is None
    assert (
        capsys.readouterr().out
        == "  ! badly: ZeroDivisionError: integer division or modulo by zero\n"
    )


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128, 16>>", "scan"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("triton_poi_fused_add_mul_silu_3", "elementwise"),
        ("somebody_elses", "rest"),
    ],
)
def test_parts_of_foreign_kernels(kernel: str, part: str) -> None:
    assert model.part_of(kernel) == part


def test_parts_of_our_kernels_are_read_off_their_files() -> None:
    own = model.own_kernels()
    assert {part for parts in own.values() for part in parts.split(" or ")} <= set(model.PARTS)
    assert all(model.part_of(name) == part for name, part in own.items())
    cuda = ["scan_forward", "scan_adjoint", "scan_backward"]
    assert set(cuda) <= set(own)
    assert all(model.part_of(f"void {name}<__nv_bfloat16, 16>(float*)") == "scan" for name in cuda)


def test_what_the_device_runs_is_of_one_part() -> None:
    """A breakdown goes by name, so no two files may launch kernels of one name. (Functions that
    kernels call never run by themselves.)"""
    launched = {name: part for name, part in model.own_kernels().items() if "kernel" in name}
    assert launched and not [name for name, part in launched.items() if " or " in part]


@pytest.fixture
def tiny_model(
    tiny: Callable[[str], Config], lively: Callable[..., LanguageModel]
) -> LanguageModel:
    return lively(tiny("hymba"), dtype=torch.bfloat16)


def test_plain_is_no_different_from_plain(tiny_model: LanguageModel) -> None:
    assert model.difference(tiny_model, tokens=24) == 0


def test_a_wrong_op_makes_a_model_different(
    tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.selective_scan

    def wrong(*inputs: Any, **named: Any) -> Any:
        y, state = right(*inputs, **named)
        return y + 0.1 * named["u"], state  # not a factor: the norm behind it would take it out

    monkeypatch.setattr(ops, "selective_scan", wrong)
    assert model.difference(tiny_model, tokens=24) > model.TOLERANCE


def test_compiling_is_undone(tiny_model: LanguageModel) -> None:
    model.compiled(tiny_model)
    assert all(block._compiled_call_impl for block in tiny_model.decoder.layers)
    model.compiled(tiny_model, False)
    assert not any(block._compiled_call_impl for block in tiny_model.decoder.layers)


def test_mfu_is_a_share_of_what_was_measured() -> None:
    row = {"name": "ours"} | model.speed(4e14, 16384, 1000.0, 0.01, 8e14)
    assert (row["mfu"], row["tflop_per_s"], row["tokens_per_s"]) == (0.5, 400.0, 16384)
    assert "400 TFLOP/s, MFU 50.0% of the 800 measured in this run" in model.speed_line(row, 8e14)


def test_parts_add_up() -> None:
    kernels = [("nvjet_a", 3.0, 7), ("somebody_elses", 0.5, 1), ("nvjet_b", 1.0, 2)]
    found = model.by_part(kernels)
    assert found["ms_by_part"] == {"matrix products": 4.0, "rest": 0.5}
    assert found["device_ms"] == 4.5
    assert [row["launches"] for row in found["largest"]] == [7, 2, 1]
