"""The record of a run: survives kills, is taken back by a resume, reads well."""

import json
from pathlib import Path

import pytest

from hymba.train.metrics import MetricsLog, duration, held_out_line, read, series, step_line

RECORD = {
    "step": 7,
    "loss": 3.21449,
    "lr": 0.003,
    "grad_norm": 0.714,
    "tokens_per_second": 18234.4,
    "eta": 200.4,
    "skipped_steps": 0,
}


def test_records_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "loss": 2.5})
    assert read(path) == [{"step": 1, "loss": 2.5}]
    log.close()


def test_resuming_takes_back_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": i / 3}) + "\n" for i in range(1, 6)))
    log = MetricsLog(path, step=3)
    log.write({"step": 4, "loss": 0.1})
    log.close()
    assert [r["step"] for r in read(path)] == [1, 2, 3, 4]
    assert read(path)[0]["loss"] == 1 / 3  # exactly
    MetricsLog(path).close()
    assert read(path) == []


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(path, step=2)
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert [r["step"] for r in read(path)] == [1, 2]
    assert read(tmp_path / "absent") == []


def test_odd_numbers_are_null_and_left_out_of_plots(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    for step, loss in enumerate([2.0, float("nan"), float("inf"), 1.0], start=1):
        log.write({"step": step, "loss": loss})
    log.close()
    assert "NaN" not in (tmp_path / "m").read_text()
    assert series(read(tmp_path / "m"), "loss") == ([1, 4], [2.0, 1.0])
    assert series([{"step": 1}, {"step": 2, "bits": 3.0}], "bits") == ([2], [3.0])


def test_step_line() -> None:
    line = step_line(RECORD, steps=1000)
    assert line == ("step    7/1000  loss 3.2145  lr 3.00e-03  grad 0.71  18,234 tok/s  eta 3m20s")
    assert step_line(RECORD | {"skipped_steps": 2}, 1000).endswith("skipped 2")
    held = held_out_line({"step": 7, "held_out_loss": 3.0, "bits_per_byte": 1.25})
    assert "loss 3.0000" in held and "bits per byte 1.2500" in held


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (187_000, "2d03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
