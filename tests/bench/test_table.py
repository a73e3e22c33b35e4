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


def test_a_training_run_beside_its_twin(tmp_path: Path) -> None:
    step = {"preset": "hymba-1.5b", "length": 2048, "tokens": 131072, "recompute": False}
    step |= {"spread": 0.02, "micro_tokens": 16384}
    step |= {"tokens_per_s": 65536, "mfu": 0.4, "peak_gib": 99.6}
    found = [
        step | {"plan": "hymba", "ms": 1500.0},
        step | {"plan": "llama", "ms": 1000.0},
        step | {"plan": "hymba", "ms": 1600.0, "length": 8192, "recompute": True, "spread": 0.23},
    ]
    data = HEAD | {"benchmark": "trainer", "gpus": 2, "matrix_flops_per_s": 7.9e14}
    (tmp_path / "trainer-h200.json").write_text(json.dumps(data | {"results": found}))
    made = table.generate(tmp_path)
    assert "65,536 tokens a GPU" in made and "on 2 × NVIDIA H200" in made
    assert [line for line in made.splitlines() if line.startswith("| hymba")] == [
        "| hymba-1.5b | 2,048 | 16,384 | 1500 / 1000 | 65,536 / 65,536 | 40.0% / 40.0%"
        " | 100 / 100 GiB | 1.50× |",
        "| hymba-1.5b | 8,192 | 16,384 | 1600* (+23%) | 65,536 | 40.0% | 100 GiB |  |",
    ]


def test_no_results_no_figures(tmp_path: Path) -> None:
    (tmp_path / "cpu-somewhere.json").write_text("{}")
    assert table.generate(tmp_path) == "No results are kept here."


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


def test_engine(tmp_path: Path) -> None:
    row = {"name": "hymba-1.5b", "batch": 128, "ms": 5.912, "tokens_per_s": 21651, "share": 0.5791}
    row |= {"limit_tokens_per_s": 37390, "over_us_per_layer": 77.7}
    row |= {"cache": {"per_sequence": 81_905_920, "meta_once": 11_345_920}}
    theirs = row | {"name": "transformers, static cache", "batch": 1, "ms": 25.6}
    prefill = {"tokens": 8064, "first_token_ms": 74.24, "forward_ms": 68.9, "share": 0.93}
    data = HEAD | {"benchmark": "engine", "model": "hymba-1.5b", "context": 8064}
    data |= {"results": [row, theirs], "prefill": prefill}
    data |= {"peer": {"name": "llama-3.2-3b", "batch": 128, "limit_tokens_per_s": 4240}}
    data |= {"agreement": {"greedy": 0.945, "temperature 0.8": 0.93}}
    (tmp_path / "engine-h200.json").write_text(json.dumps(data))
    made = table.generate(tmp_path)
    assert "| hymba-1.5b | 128 | 5.91 | 21,651 | 37,390 | 57.9% | 77.7 µs |" in made
    assert "| transformers, static cache | 1 | 25.6 | 21,651 | 37,390 | 57.9% |  |" in made
    assert "first token after 74.2 ms, of which the forward alone takes 68.9 (93%)" in made
    assert "5.11 times the *limit* of llama-3.2-3b at batch 128 on this GPU (4,240" in made
    assert "81.9 MB as allocated, and all together 11.3 MB" in made
    assert "94.5% (greedy) and 93.0% (drawn at temperature 0.8)" in made
