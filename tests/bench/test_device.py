"""bench/device.py: options, what it makes of rounds, sides that fail, and one small run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import device, device_llama, device_side, table
from bench.device_llama import SHAPES, nbytes, tensors, values

# A side that decodes as fast as it is told, and what it says besides disturbs nobody.
FAKE = """
import json, os, sys
from bench.device_child import resident, serve

class Fake:
    def __init__(self, name, **rest):
        print("a library says something")
        self.name, self.calls = name, 0
        if name == "llama-1b-q8_0":
            raise ValueError("no room\\nfor it")
    def about(self):
        return {"modes": ["flash", "plain"] if "llama" in self.name else [""]}
    def fill(self, depth, mode="", compute=None):
        return {"seconds": 1.0, "memory": resident()}
    def bytes(self, depth):
        return 10**9 + depth
    def decode(self, depth, mode, tokens):
        self.calls += 1
        if self.name == "llama-1b-q4_0" and self.calls > 4:
            print("out of luck", file=sys.stderr)
            os._exit(3)
        return tokens / {"hymba": 40, "llama": 10 if mode == "flash" else 16}[self.name[:5]]
    def prefill(self, tokens):
        return tokens / 100

serve(Fake)
"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(name: str, options: argparse.Namespace, special: dict[str, Any]) -> list[str]:
        return [sys.executable, "-P", "-c", FAKE, json.dumps({"name": name})]

    monkeypatch.setattr(device_side, "command", command)
    monkeypatch.setattr(device, "without_llama", lambda options: [])
    monkeypatch.setattr(device, "Reader", lambda threads: ConstantReader())


class ConstantReader:
    def __init__(self, stops_after: int = 10**9) -> None:
        self.left = stops_after

    def read(self) -> float:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return 50.0


def run(tmp_path: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "device.json"
    code = device.main([*argv, "--json", str(path), "--cache", str(tmp_path)])
    return code, json.loads(path.read_text()) if path.exists() else {}


# The command line


def test_examples_are_accepted() -> None:
    lines = [line for line in device.EXAMPLES.splitlines() if "-m bench.device" in line]
    assert len(lines) == 5
    for line in lines:
        words = re.split(r"\s{3,}", line.strip())[0].split()
        device.read(words[3:])


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        device.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "python -m bench.device" in said and "--llama-python" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--sides", "hymba-int5"], "no side 'hymba-int5': there are hymba-int4"),
        (["--sides", "hymba-int4//hymba-int8"], "empty group"),
        (["--depths", "0,x"], "no list of depths"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
    ],
)
def test_wrong_options_are_refused(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        device.read(wrong)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_report_names_no_paths() -> None:
    argv = ["--rounds", "3", "--llama-python", "/a/b", "--cache=/c/d", "--tokens", "8"]
    assert device.shown(argv) == ["--rounds", "3", "--tokens", "8"]


def test_without_llama_cpp_its_sides_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    groups = "hymba-int4,llama-3b-q4_0/llama-1b-q8_0"
    options = device.read(["--sides", groups, "--llama-python", "no-such-python"])
    assert device.without_llama(options) == ["llama-1b-q8_0", "llama-3b-q4_0"]
    assert options.sides == [["hymba-int4"]]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "left out: llama-1b-q8_0, llama-3b-q4_0" in said and "--llama-python" in said


# Rounds


def test_every_side_begins_a_round_in_its_turn() -> None:
    names = ["a", "b", "c"]
    work = [device.Work(side, "decode", d, "", 1) for side in names for d in (0, 64)]
    firsts = []
    for number in range(3):
        order = list(device.in_turns(work, names, number))
        assert sorted(order) == sorted(work)
        assert [w.depth for w in order] == [0, 0, 0, 64, 64, 64]
        firsts.append(order[0].side)
    assert sorted(firsts) == names


def test_ratios_are_of_one_round_and_of_the_better_mode() -> None:
    def row(side: str, mode: str, speeds: dict[int, float]) -> dict[str, Any]:
        found = {"side": side, "what": "decode", "depth": 64, "mode": mode, "by_round": speeds}
        return found | device.spread("tokens_per_s", speeds.values())

    rows = [
        row("hymba-int4", "", {1: 30.0, 2: 60.0, 3: 33.0}),
        row("llama-3b-q4_0", "flash", {1: 9.0, 2: 19.0, 3: 10.0}),
        row("llama-3b-q4_0", "plain", {1: 10.0, 2: 20.0}),
    ]
    device.mark_best(rows)
    assert [row["best"] for row in rows] == [True, False, True]
    (found,) = device.ratios(rows, ["hymba-int4", "llama-3b-q4_0"])
    assert (found["times"], found["times_least"], found["times_most"]) == (3.0, 3.0, 3.0)


def test_a_run_of_fakes(fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = "hymba-int4,llama-3b-q4_0/hymba-int8,llama-1b-q8_0,llama-1b-q4_0"
    code, data = run(tmp_path, "--sides", sides, "--depths", "0,64", "--rounds", "2")
    assert code == 0
    first, second = data["groups"]
    speeds = {(r["side"], r["what"], r["depth"], r["mode"]): r for r in first["results"]}
    assert speeds["llama-3b-q4_0", "decode", 64, "plain"]["tokens_per_s"] == 16
    assert speeds["llama-3b-q4_0", "decode", 64, "plain"]["best"]
    assert not speeds["llama-3b-q4_0", "decode", 64, "flash"]["best"]
    ours = speeds["hymba-int4", "decode", 0, ""]
    assert ours["by_round"] == {"1": 40, "2": 40} and ours["share"] == pytest.approx(0.8)
    behind = {r["depth"]: r["times"] for r in first["ratios"] if r["what"] == "decode"}
    assert behind == {0: 4.0, 64: 2.5}
    assert set(second["left_out"]) == {"llama-1b-q8_0", "llama-1b-q4_0"}
    assert second["left_out"]["llama-1b-q8_0"] == "no room"
    assert second["left_out"]["llama-1b-q4_0"] == "its process ended (exit 3): out of luck"
    assert {row["side"] for row in second["results"]} == {"hymba-int8"}
    made = table.device_table(data | {"file": "results/device-here.json"})
    row = "| Llama-3.2-3B Q4_0, llama.cpp | 10 (10 to 10) | 16* (16 to 16) | 20% to 32% | 100"
    assert row in made
    assert "| hymba-1.5b int4 / Llama-3.2-3B Q4_0, llama.cpp | 4.00× (4.00 to 4.00) | 2.5" in made
    assert "Llama-3.2-1B" not in made


def test_a_group_again(fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its place in the file is taken, the others stay; another measurement's is not touched."""
    asked = "--depths", "0", "--rounds", "2"
    _, before = run(tmp_path, "--sides", "hymba-int4,llama-3b-q4_0/hymba-int8", *asked)
    code, data = run(tmp_path, "--sides", "llama-3b-q4_0,hymba-int4", *asked, "--again")
    assert code == 0 and data["groups"][1] == before["groups"][1]
    assert list(data["groups"][0]["sides"]) == ["llama-3b-q4_0", "hymba-int4"]
    _, data = run(tmp_path, "--sides", "hymba-int4", *asked, "--again")
    assert [set(group["sides"]) for group in data["groups"]][2:] == [{"hymba-int4"}]
    with pytest.raises(SystemExit, match="has rounds 2, this would be 3"):
        run(tmp_path, "--sides", "hymba-int4", "--depths", "0", "--rounds", "3", "--again")
    assert json.loads((tmp_path / "device.json").read_text()) == data


def test_stopped_it_keeps_the_rounds_that_were_whole(
    fakes: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reads = 2 * 2 * 2  # two speeds, before and after: a round to warm up, and one that counts
    monkeypatch.setattr(device, "Reader", lambda threads: ConstantReader(reads + 1))
    code, data = run(tmp_path, "--sides", "hymba-int4", "--depths", "0", "--rounds", "5")
    assert code == 130 and "stopped" in capsys.readouterr().err
    (group,) = data["groups"]
    assert [row["by_round"] for row in group["results"]] == [{"1": 40}, {"1": 100}]


def test_nothing_measured_is_an_error(fakes: None, tmp_path: Path) -> None:
    code, data = run(tmp_path, "--sides", "llama-1b-q8_0", "--rounds", "1")
    assert code == 1 and data["groups"][0]["results"] == []


def test_reading_takes_time() -> None:
    assert 0.01 < device.Reader(2, gigabytes=0.05).read() < 10_000


# llama.cpp's files


def test_files_are_as_large_as_the_models() -> None:
    """Parameters as published, and bytes a weight as the formats have them."""
    for name, billions in (("llama-3b", 3.213), ("llama-1b", 1.236), ("falcon-h1-1.5b", 1.555)):
        count = sum(int(np.prod(dims)) for _, dims, _ in tensors(SHAPES[name], "q8_0"))
        assert count / 1e9 == pytest.approx(billions, abs=0.001)
    size = sum(nbytes(dims, kind) for _, dims, kind in tensors(SHAPES["llama-3b"], "q4_0"))
    assert size / 1e9 == pytest.approx(1.909, abs=0.005)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q6_k"])
def test_random_blocks_are_weights_of_usual_size(kind: str) -> None:
    rows = values("x", (64, 512), kind, np.random.default_rng(0))
    assert rows.nbytes == nbytes((64, 512), kind)
    _, size, at, _ = device_llama.BLOCKS[kind]
    blocks = rows.reshape(-1, size)
    scale = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    if kind == "q4_0":
        low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
        codes = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    elif kind == "q8_0":
        codes = blocks[:, 2:].copy().view(np.int8).astype(np.float32)
    else:
        low, top, groups = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208]
        nibbles = np.concatenate([low & 15, low >> 4], axis=1)
        tops = np.concatenate([top >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
        codes = (nibbles + 16.0 * tops - 32) * groups.view(np.int8)[:, :1]
    assert (codes * scale).std() == pytest.approx(device_llama.STD, rel=0.05)


# A real run


def test_our_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sides = "hymba-int4,transformers-bf16"
    small = ("--preset", "hymba-tiny", "--depths", "0,80", "--rounds", "1", "--tokens", "4")
    code, data = run(tmp_path, "--sides", sides, "--threads", "1", *small)
    (group,) = data["groups"]
    assert code == 0 and group["left_out"] == {}
    assert len(group["results"]) == 2 * 3 and len(group["ratios"]) == 3
    sizes = {row["bytes"] for row in group["results"] if row["what"] == "decode"}
    assert len(sizes) == 4 and min(sizes) > 1e6
    if sys.platform == "linux":
        assert group["sides"]["hymba-int4"]["memory"]["all"] > 50e6
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["device.json", "hymba-tiny-bf16", "hymba-tiny-int4"]


LLAMA = os.environ.get("LLAMA_PYTHON", sys.executable)
without = "LLAMA_PYTHON" not in os.environ and not importlib.util.find_spec("llama_cpp")


@pytest.mark.skipif(without, reason="needs llama-cpp-python, here or in LLAMA_PYTHON")
@pytest.mark.parametrize("shape", ["llama-tiny", "falcon-h1-tiny"])
def test_llamas_sides(shape: str, tmp_path: Path) -> None:
    small = ("--depths", "0,300", "--rounds", "1", "--tokens", "4", "--threads", "1")
    sides = f"{shape}-q4_0,{shape}-q8_0"
    code, data = run(tmp_path, "--sides", sides, *small, "--llama-python", LLAMA)
    (group,) = data["groups"]
    assert code == 0 and group["left_out"] == {}
    modes = [(row["depth"], row["mode"]) for row in group["results"] if row["what"] == "decode"]
    assert modes == [(0, "flash"), (300, "flash"), (300, "plain")] * 2
    assert all(about["memory_not_mapped"]["all"] for about in group["sides"].values())
