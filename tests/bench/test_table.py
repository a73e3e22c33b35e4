"""The README's table of GPU figures is what results/ say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import table

HEAD: dict[str, Any] = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "date": "2026-11-22T03:00:00+00:00",
    "ceilings": {"copy_bytes_per_s": 4.2e12, "matrix_flops_per_s": 7.85e14, "exps_per_s": 4.1e12},
}


def row(op: str, size: str, kind: str, **more: Any) -> dict[str, Any]:
    figures = {"ms": 0.4567, "gb_per_s": 1234.5, "tflop_per_s": 0.0, "limit": "bytes"}
    return {"op": op, "size": size, "pass": kind, "share": 0.51, "peers": {}} | figures | more


@pytest.fixture
def results(tmp_path: Path) -> Path:
    peers = {"torch": {"ms": 50.0, "times": 100.0}, "mamba-ssm": {"ms": 0.92, "times": 2.04}}
    slower = {"mamba-ssm": {"ms": 4.6, "times": 3.07}}
    ops = [
        row("scan", "8 x 2048", "inference", ms=0.3),
        row("scan", "8 x 2048", "forward", peers=peers),
        row("scan", "8 x 2048", "backward", ms=1.5, share=0.4, limit="exps", peers=slower),
        row("attention decode", "batch 1, full cache of 8192 + 128 meta", "inference"),
        {"op": "conv", "size": "8 x 2048", "failed": {"out 0": 0.5}},
        row("linear + CE", "16384 x 1600 x 32001", "both", limit="FLOPs", tflop_per_s=600.4),
    ]
    step = {"name": "ours", "ms": 400.2, "tokens_per_s": 40960, "mfu": 0.4321, "peak_gib": 55.5}
    size = {"model": "hymba-1.5b", "rows": 8, "length": 2048, "tokens": 8192}
    for name, found in (("ops", ops), ("train", [step]), ("prefill", [step])):
        data = HEAD | size | {"benchmark": name, "results": found, "optimiser_ms": 4.6}
        (tmp_path / f"{name}-h200.json").write_text(json.dumps(data))
    return tmp_path


def test_readme_is_what_the_results_say() -> None:
    readme = (table.ROOT / "README.md").read_text(encoding="utf-8")
    assert table.placed(readme, table.generate(table.ROOT / "results")) == readme, (
        "README.md's GPU figures are not those of results/: python -m bench.table"
    )


def test_rows(results: Path) -> None:
    made = table.generate(results)
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    assert rows[1:4] == [
        "| selective scan | 8×2048 | 0.457 / 1.5 | 1,234 / 1,234 GB/s | 51% of bytes / 40% of exps "
        "| 2.0× / 3.1× mamba-ssm |",
        "| attention, decode | batch 1, full cache of 8192 + 128 meta | 0.457 | 1,234 GB/s "
        "| 51% of bytes |  |",
        "| linear + cross-entropy, both passes at once | 16384×1600×32001 | 0.457 | 600 TFLOP/s "
        "| 51% of FLOPs |  |",
    ]
    assert "| ours | 400 | 40,960 | 43.2% | 56 GiB |" in rows
    assert "| ours | 400.2 | 40,960 | 43.2% |" in rows
    assert "fused AdamW takes 5 ms more" in made
    assert made.count("4.20 TB/s copied, 785 TFLOP/s") == 3


def test_no_results_no_figures(tmp_path: Path) -> None:
    (tmp_path / "cpu-somewhere.json").write_text("{}")
    assert table.generate(tmp_path) == "No results of a GPU are kept here."


def test_written_and_checked(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    there = ["--results", str(results), "--readme", str(readme)]
    assert table.main([*there, "--check"]) == 1
    assert "old" in readme.read_text()
    assert table.main(there) == 0 and table.main([*there, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "H200" in text


def test_a_readme_without_markers_is_said(results: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here\n")
    with pytest.raises(SystemExit, match="needs the lines"):
        table.main(["--results", str(results), "--readme", str(tmp_path / "README.md")])
