"""What bench/ops.py compares and counts, at tiny sizes and without a GPU: every case agrees with
its reference, a wrong op is caught, and the counts are those of a loop over what is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, gpu, mamba, model, ops, peers
from hymba import ops as door
from hymba.ops.attention import visible

SIZES = {
    "E": 24, "STATES": 4, "D": 20, "MLP": 12, "VOCAB": 50, "RANK": 6, "HEADS": 6, "GROUPS": 3,
    "KEY": 8, "VALUE": 16, "META": 5, "WINDOW": 8, "CONTEXT": 40, "ROWS": 32,
    "SIZES": [(2, 16), (1, 33)], "BATCHES": [1, 3],
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SIZES.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "host_us", lambda work: 1.0)


def every_case() -> Iterator[cases.Case]:
    for group, builders in cases.CASES.items():
        if group != "attention":
            yield from (build() for build in builders(cases.Options()))
    for shape in SHAPES:
        yield cases.attention(shape)


SHAPES = (
    peers.Shape(2, 16, 5, 8),
    peers.Shape(1, 33),
    peers.Shape(1, 16, 5, 8, past=40),
    peers.Shape(1, 16, 5, None, past=40),
)


class Stopped:
    """A stopwatch that runs the work and says one millisecond."""

    def time(self, work: Callable[[], Any], flush: bool = True) -> gpu.Timing:
        work()
        return gpu.Timing(1.0, 0.01, 3)


LIMITS = {
    "read_bytes_per_s": 4e12,
    "copy_bytes_per_s": 4e12,
    "matrix_flops_per_s": 8e14,
    "exps_per_s": 4e12,
}


@pytest.fixture
def bench(tmp_path: Path) -> ops.Bench:
    return ops.Bench(gpu.Report(tmp_path / "ops.json", {}), Stopped(), LIMITS)  # type: ignore[arg-type]


def test_every_case_agrees_with_its_reference() -> None:
    for case in every_case():
        errors = ops.check(case)
        assert max(errors.values()) <= case.tolerance, f"{case.op} {case.size}: {errors}"
        expected = set(case.inputs) - case.fixed if case.backward else set()
        assert {
            name.removeprefix("gradient of ") for name in errors if "gradient" in name
        } == expected


def test_a_case_is_timed_in_every_pass_and_beside_its_peers(
    bench: ops.Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.case(cases.conv(2, 16))
    bench.case(cases.ssm_step(3))
    assert not bench.failed
    rows = bench.report.data["results"]
    assert [row["pass"] for row in rows] == ["forward", "backward", "inference"]
    assert all(row["peers"]["torch"] == {"ms": 1.0, "times": 1.0} for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_wrong_op_gets_no_speed(
    bench: ops.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cases.conv(2, 16)
    right = case.run
    case.run = lambda **x: tuple(1.1 * out for out in right(**x))
    bench.case(case)
    assert bench.failed == ["conv 2 x 16"]
    (row,) = bench.report.data["results"]
    assert "ms" not in row and row["failed"]["out 0"] == pytest.approx(0.1, rel=0.1)
    assert "WRONG, no speed" in capsys.readouterr().out


def test_a_wrong_peer_gets_no_speed(bench: ops.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    case = cases.attention(SHAPES[1])
    right = case.peers["sdpa"]
    case.peers = {"sdpa": lambda: right()._replace(forward=lambda *x: 1.2 * right().forward(*x))}
    bench.case(case)
    assert not bench.failed and all(not row["peers"] for row in bench.report.data["results"])
    assert "differs from ours" in capsys.readouterr().out


def test_an_op_that_is_not_there_is_a_line(
    bench: ops.Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.case(cases.rowwise("no_such_op", 20, {"x": 20}, (2, 3)))
    assert not bench.failed and "has no no_such_op" in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_seen_are_counted_as_the_mask_has_them(shape: peers.Shape) -> None:
    rows = torch.arange(shape.past, shape.past + shape.rows)
    text = visible(rows, torch.arange(shape.past + shape.rows), shape.window)
    assert shape.seen() == int(text.sum()) + shape.rows * shape.meta
    assert peers.dense_mask(shape).sum() == shape.seen()


def test_the_limit_that_binds_is_the_slowest() -> None:
    assert ops.limit(cases.Work(bytes=4e9, flops=8e9, exps=1e9), LIMITS) == ("bytes", 1.0)
    assert ops.limit(cases.Work(bytes=1e9, flops=8e12), LIMITS) == ("FLOPs", 10.0)
    assert ops.limit(cases.Work(bytes=1e9, exps=8e9), LIMITS) == ("exps", 2.0)


# The released stack


def test_doors_are_replaced_for_a_while() -> None:
    before = door.rms_norm, door.attention
    with peers.replaced(model.all_plain()):
        assert door.rms_norm is peers.plain("rms_norm")
    assert (door.rms_norm, door.attention) == before


def test_mamba_ssm_gets_its_layout_and_gives_ours() -> None:
    """Its kernels stood in for by our own scan, a channel's tokens side by side."""

    class Kernels:
        @staticmethod
        def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> list[Tensor]:
            (C, D, z, bias, softplus), count = rest, len(u)
            assert softplus and u.stride(-1) == delta.stride(-1) == B.stride(-1) == 1
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (u, delta, B[:, 0], C[:, 0], z)]
            segments = door.Segments((u.shape[2],) * count)
            scan = peers.plain("selective_scan")
            y, state = scan(*flat[:2], A, *flat[2:4], D, flat[4], bias, segments)
            y = y.unflatten(0, (count, -1)).transpose(1, 2)
            return [y, torch.stack([state, state], -1).flatten(-2)[:, :, None], y]

    case = cases.scan(2, 16, cases.Options())
    inputs = case.inputs | {"initial_state": None}
    segments = door.Segments((16, 16))
    want = peers.plain("selective_scan")(**inputs, segments=segments)
    got = mamba.door(Kernels)(**case.inputs, segments=segments)
    for ours, theirs in zip(want, got, strict=True):
        assert gpu.relative_error(theirs, ours) < 1e-2


def test_every_size_of_mamba_ssm_is_built_once(tmp_path: Path) -> None:
    files = mamba.write_files(tmp_path)
    assert len(files) == len(set(files)) == 1 + 2 * (1 + len(mamba.SIZES))
    times = {file: file.stat().st_mtime_ns for file in files}
    assert {file: file.stat().st_mtime_ns for file in mamba.write_files(tmp_path)} == times
    chooser = (tmp_path / "bwd.cu").read_text()
    for threads, items in mamba.SIZES:
        named = f"template void selective_scan_bwd_launch<{threads}, {items}, at::BFloat16, float>"
        assert f"extern {named}" in chooser
        assert named in (tmp_path / f"bwd_{threads}_{items}.cu").read_text()


@pytest.mark.parametrize("name", ["mamba_ssm-2.3.2.post1.tar.gz", "mamba_ssm-2.3.2.post1"])
def test_version_of_a_source(name: str) -> None:
    assert mamba.version(Path("somewhere") / name) == "2.3.2.post1"


def test_what_a_failed_build_says() -> None:
    said = "[1/3] nvcc a.cu\na.cu(3): error: no such thing\nninja: build stopped\n"
    assert mamba.errors(said) == ["a.cu(3): error: no such thing"]
