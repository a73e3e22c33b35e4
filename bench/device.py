#!/usr/bin/env python3
"""The 1.5B in few bits on a plain CPU, beside llama.cpp and beside bfloat16 in torch.

Every side (a model and what runs it) is a process of its own that holds its model, and decodes or
reads a prompt when told to. All sides of a group are measured in turns, round by round, and before
and after each of them how fast this process reads a large array with as many threads: a machine's
bandwidth may change from second to second, and so it changes for all alike. Ratios are taken
within a round. Weights are random everywhere, which changes no speed.

    decode     tokens a second behind `--depths` tokens that are in the cache already, batch 1
    prefill    tokens a second of a new prompt of 512
    memory     what the process holds behind the deepest prompt, after it was computed
    share      of the bandwidth read beside it: bytes a token cannot do without moving, over time

llama.cpp decodes with flash attention and without, and the better one counts; its memory is told
with the file mapped, as it does unless told otherwise, and without. A file that cannot be made or
a side that fails is left out in one line, and the others go on. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import cpu
from bench.device_side import LLAMA, OURS, Side, SideError
from bench.gpu import Report, rounded, slug

EXAMPLES = """examples:
  python -m bench.device --llama-python ~/llama/bin/python    everything, about 40 minutes
  python -m bench.device --sides hymba-int4,llama-3b-q4_0 --depths 0,4096
  python -m bench.device --sides hymba-int4,hymba-bf16,transformers-bf16 --rounds 3
  python -m bench.device --sides hymba-int8,llama-3b-q8_0 --again      into the same file
  python -m bench.device --preset hymba-tiny --sides hymba-int4,hymba-int8 --depths 0,64

llama.cpp's sides need a Python that has it, this one or another:
  python -m venv ~/llama && CMAKE_ARGS=-DGGML_NATIVE=ON ~/llama/bin/pip install \\
      llama-cpp-python gguf numpy
"""
GROUPS = (
    "hymba-int4,hymba-int8,llama-3b-q4_0,llama-3b-q8_0"
    "/hymba-int4,hymba-int8,llama-1b-q4_0,llama-1b-q8_0"
    ",falcon-h1-1.5b-q4_0,falcon-h1-1.5b-q8_0"
    "/hymba-int4,hymba-int4-kv16,hymba-bf16,transformers-bf16"
)
PROMPT = 512


# The machine's bandwidth


class Reader:
    """Reads an array that no cache holds, in pieces that threads take as they come."""

    def __init__(self, threads: int, gigabytes: float = 1.0):
        piece = 1 << 21
        self.pieces = np.ones((int(gigabytes * 2**30 / 8 / piece), piece), np.uint64)
        self.pool = ThreadPoolExecutor(threads)

    def read(self, passes: int = 3) -> float:
        """GB/s, the median of some passes."""
        return statistics.median(self._once() for _ in range(passes))

    def _once(self) -> float:
        begin = time.perf_counter()
        list(self.pool.map(np.bitwise_or.reduce, self.pieces))
        return self.pieces.nbytes / (time.perf_counter() - begin) / 1e9


# Rounds


class Work(NamedTuple):
    """What is measured in each round."""

    side: str
    what: str  # "decode" or "prefill"
    depth: int
    mode: str  # of attention, where there is a choice
    tokens: int

    def once(self, side: Side) -> float:
        """Tokens a second."""
        if self.what == "prefill":
            return self.tokens / side.ask("prefill", tokens=self.tokens)
        return self.tokens / side.ask(
            "decode", depth=self.depth, mode=self.mode, tokens=self.tokens
        )


class Group:
    """Sides that are measured in turns."""

    def __init__(self, names: Sequence[str], options: argparse.Namespace, reader: Reader):
        self.names, self.options, self.reader = list(names), options, reader
        self.sides: dict[str, Side] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.work: list[Work] = []
        self.bytes: dict[tuple[str, int], int] = {}
        self.speeds: dict[Work, dict[int, float]] = {}  # by round
        self.reads: dict[Work, dict[int, float]] = {}  # GB/s beside it
        self.left_out: dict[str, str] = {}

    def start(self) -> None:
        for name in self.names:
            try:
                self._start(name)
            except SideError as error:
                self._leave_out(name, error)

    def _start(self, name: str) -> None:
        began = time.perf_counter()
        deepest, *others = sorted(self.options.depths, reverse=True)
        print(f"{name}: starts", end="", flush=True)
        least = self._least(name, deepest)
        side = self.sides[name] = Side(name, self.options)
        about = side.ask("about")
        first = side.ask("fill", depth=deepest, mode=about["modes"][0])
        about["memory"] = first["memory"] | {"context": deepest}
        about |= {"memory_not_mapped": least} if least else {}
        about["prompt"] = {"tokens": deepest, "seconds": rounded(first["seconds"])}
        for depth in sorted({*others, 0} - {deepest}):
            side.ask("fill", depth=depth, mode=about["modes"][0])
        for depth in self.options.depths:
            for mode in about["modes"][1:] if depth else ():
                side.ask("fill", depth=depth, mode=mode)
        for depth in self.options.depths:
            self.bytes[name, depth] = side.ask("bytes", depth=depth)
            for mode in about["modes"] if depth else about["modes"][:1]:
                self.work.append(Work(name, "decode", depth, mode, self.options.tokens))
        self.work.append(Work(name, "prefill", 0, about["modes"][0], PROMPT))
        self.about[name] = about
        held = about["memory"].get("all", 0) / 1e9
        seconds = time.perf_counter() - began
        print(f", {held:.2f} GB behind {deepest} tokens ({seconds:.0f} s)", flush=True)

    def _least(self, name: str, depth: int) -> dict[str, int] | None:
        """Memory of llama.cpp where the file is read, not mapped, in a process of its own. K/V are
        all there from the start, so few tokens are enough."""
        if name not in LLAMA:
            return None
        side = Side(name, self.options, mapped=False)
        try:
            tokens = min(depth, PROMPT)
            return side.ask("fill", depth=depth, mode="flash", compute=tokens)["memory"]
        finally:
            side.close()

    def _leave_out(self, name: str, error: SideError) -> None:
        print(f"\n  ! {name} is left out: {error}", flush=True)
        self.left_out[name] = str(error)
        self.work = [work for work in self.work if work.side != name]
        self.about.pop(name, None)
        if name in self.sides:
            self.sides.pop(name).close()

    def close(self) -> None:
        for side in self.sides.values():
            side.close()

    def round(self, number: int) -> None:
        """Everything once. The order of the sides goes round too; round 0 only warms up."""
        for work in in_turns(self.work, [*self.sides], number):
            if work.side in self.sides:
                try:
                    before = self.reader.read()
                    speed = work.once(self.sides[work.side])
                    after = self.reader.read()
                except SideError as error:
                    self._leave_out(work.side, error)
                    continue
                if number:
                    self.speeds.setdefault(work, {})[number] = speed
                    self.reads.setdefault(work, {})[number] = (before + after) / 2

    def now(self) -> str:
        """The last round behind the deepest prompt, for somebody who waits."""
        deepest = max(self.options.depths)
        said = [
            f"{work.side} {[*speeds.values()][-1]:.3g}"
            for work, speeds in self.speeds.items()
            if work.what == "decode" and work.depth == deepest
        ]
        return f": {', '.join(said)} tok/s behind {deepest}" if said else ""

    # ---- what came out

    def result(self) -> dict[str, Any]:
        rows = [self.row(work) for work in self.work if work in self.speeds]
        mark_best(rows)
        return {
            "sides": self.about,
            "left_out": self.left_out,
            "results": rows,
            "ratios": ratios(rows, self.names),
        }

    def row(self, work: Work) -> dict[str, Any]:
        speeds, reads = self.speeds[work], self.reads[work]
        row = {"side": work.side, "what": work.what, "depth": work.depth, "mode": work.mode}
        row |= spread("tokens_per_s", speeds.values())
        if work.what == "decode":
            size = self.bytes[work.side, work.depth]
            row["bytes"] = size
            row["gb_per_s"] = rounded(size * statistics.median(speeds.values()) / 1e9)
            shares = [size * speed / 1e9 / reads[number] for number, speed in speeds.items()]
            row |= spread("share", shares)
        row["by_round"] = {number: rounded(speed) for number, speed in speeds.items()}
        row["read_gb_per_s"] = {number: rounded(read) for number, read in reads.items()}
        return row


def in_turns(work: Sequence[Work], sides: Sequence[str], number: int) -> Iterator[Work]:
    """By depth, and within it side by side, beginning with another side in each round."""
    turn = {side: (index - number) % len(sides) for index, side in enumerate(sides)}
    yield from sorted(work, key=lambda w: (w.what, w.depth, turn.get(w.side, 0)))


def spread(name: str, found: Any) -> dict[str, float]:
    numbers = list(found)
    return {
        name: rounded(statistics.median(numbers)),
        f"{name}_least": rounded(min(numbers)),
        f"{name}_most": rounded(max(numbers)),
    }


def mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Of each side's modes the faster one, at each depth."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["side"], row["what"], row["depth"]
        if key not in best or row["tokens_per_s"] > best[key]["tokens_per_s"]:
            best[key] = row
    for row in rows:
        row["best"] = row is best[row["side"], row["what"], row["depth"]]


def ratios(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """How many times as fast each of ours is as each side named after it, at its best: of the two
    speeds of a round, the median over rounds."""
    best = [row for row in rows if row["best"]]
    order = {name: place for place, name in enumerate(names)}
    pairs = [
        (ours, theirs)
        for ours in best
        for theirs in best
        if ours["side"].startswith("hymba-")
        and order[ours["side"]] < order[theirs["side"]]
        and (ours["what"], ours["depth"]) == (theirs["what"], theirs["depth"])
    ]
    return [ratio(*pair) for pair in pairs]


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = sorted(ours["by_round"].keys() & theirs["by_round"].keys())
    times = [ours["by_round"][number] / theirs["by_round"][number] for number in both]
    row = {"ours": ours["side"], "theirs": theirs["side"]}
    return row | {name: ours[name] for name in ("what", "depth")} | spread("times", times)


# What is printed


def line(row: dict[str, Any]) -> str:
    what = "prefill" if row["what"] == "prefill" else f"behind {row['depth']}"
    mode = {"": "", "flash": ", flash attention", "plain": ", plain attention"}[row["mode"]]
    least, most = row["tokens_per_s_least"], row["tokens_per_s_most"]
    text = f"  {row['side'] + mode:42} {what:12} {row['tokens_per_s']:8.4g} tok/s"
    text += f" ({least:.4g} to {most:.4g})"
    if "share" in row:
        text += f", {row['gb_per_s']:.3g} GB/s, {row['share']:.0%} of a read"
    return text


def summary(result: dict[str, Any]) -> str:
    lines = [line(row) for row in result["results"]]
    for name, about in result["sides"].items():
        memory = about["memory"]
        if memory.get("all"):
            own, file = memory["anonymous"] / 1e9, memory["file"] / 1e9
            said = f"  {name:42} {memory['all'] / 1e9:.2f} GB behind {memory['context']} tokens"
            least = about.get("memory_not_mapped", {}).get("all")
            said += f" ({own:.2f} its own, {file:.2f} of files)"
            lines.append(said + (f", {least / 1e9:.2f} not mapped" if least else ""))
    for row in result["ratios"]:
        where = "prefill" if row["what"] == "prefill" else f"behind {row['depth']}"
        spread = f"({row['times_least']:.2f} to {row['times_most']:.2f})"
        lines.append(
            f"  {row['ours']} is {row['times']:.2f} {spread} times {row['theirs']}, {where}"
        )
    return "\n".join(lines)


# The program


def groups(text: str) -> list[list[str]]:
    found = [[name for name in part.split(",") if name] for part in text.split("/")]
    unknown = [name for group in found for name in group if name not in OURS + LLAMA]
    if unknown or not all(found):
        known = ", ".join(OURS + LLAMA)
        what = f"there is no side {unknown[0]!r}" if unknown else f"{text!r} has an empty group"
        raise argparse.ArgumentTypeError(f"{what}: there are {known}")
    return found


def depths(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of depths such as 0,1024,4096")
    return found


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/device.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = os.cpu_count() or 1
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hymba-bench"
    parser.add_argument(
        "--threads", type=int, default=min(4, cores), help="of every side (4, or all cores)"
    )
    parser.add_argument(
        "--sides",
        type=groups,
        default=groups(GROUPS),
        metavar="A,B/A,C",
        help="those of a group are measured in turns, groups one after the other;"
        f" there are {', '.join(OURS + LLAMA)}",
    )
    parser.add_argument(
        "--depths", type=depths, default=[0, 1024, 4096], metavar="N,N", help="(0,1024,4096)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(7)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each round (16)")
    parser.add_argument("--preset", default="hymba-1.5b", help="our model (hymba-1.5b)")
    parser.add_argument(
        "--llama-python",
        type=Path,
        metavar="PYTHON",
        default=Path(sys.executable),
        help="one that has llama_cpp and gguf (this one)",
    )
    parser.add_argument(
        "--cache", type=Path, default=home, metavar="FOLDER", help=f"where weights go ({home})"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go (results/device-CPU.json)"
    )
    parser.add_argument(
        "--again", action="store_true", help="put these groups in the place of those in the file"
    )
    options = parser.parse_args(argv)
    for name in ("threads", "rounds", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    options.cache = options.cache.expanduser().absolute()
    # Behind each prompt: contexts that cannot be cut back grow by all that is decoded.
    needed = max(PROMPT, (options.rounds + 2) * options.tokens)
    options.room = -(-needed // 256) * 256
    return options


def without_llama(options: argparse.Namespace) -> list[str]:
    """Take llama.cpp's sides out where it cannot be run, and say which."""
    wanted = {name for group in options.sides for name in group if name in LLAMA}
    if not wanted:
        return []
    test = [str(options.llama_python), "-c", "import llama_cpp, gguf, numpy"]
    try:
        done = subprocess.run(test, capture_output=True, text=True, timeout=60)
        reason = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    if reason is None:
        return []
    print(
        f"left out: {', '.join(sorted(wanted))} ({options.llama_python}: {reason[:120]}; pip"
        " install llama-cpp-python gguf, or --llama-python)",
        file=sys.stderr,
    )
    kept = [[name for name in group if name not in LLAMA] for group in options.sides]
    options.sides = [group for group in kept if group]
    return sorted(wanted)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("threads", "depths", "rounds", "tokens")}
    return (
        cpu.machine()
        | {
            "benchmark": "device",
            "command": shlex.join(["python", "-m", "bench.device", *shown(sys.argv[1:])]),
            "preset": options.preset,
            "prompt": PROMPT,
        }
        | asked
    )


def shown(argv: Sequence[str]) -> list[str]:
    """A command line without where things are on this machine."""
    kept, skip = [], False
    for word in argv:
        name = word.partition("=")[0]
        if not skip and name not in ("--llama-python", "--cache", "--json"):
            kept.append(word)
        skip = name in ("--llama-python", "--cache", "--json") and "=" not in word
    return kept


def groups_of(path: Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has, if it is of the same measurement on the same machine."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"--again: {path} cannot be read ({error.strerror})")
    for name in ("cpu", "torch", "threads", "preset", "prompt", "depths", "rounds", "tokens"):
        if old.get(name) != data[name]:
            sys.exit(f"--again: {path} has {name} {old.get(name)}, this would be {data[name]}")
    return old["groups"]


def placed(groups: list[dict[str, Any]], group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group in the place of the one with its sides, or behind all."""
    sides = set(group["sides"]) | set(group["left_out"])
    same = [set(old["sides"]) | set(old["left_out"]) == sides for old in groups]
    if True not in same:
        return [*groups, group]
    return [group if here else old for here, old in zip(same, groups, strict=True)]


def measure(options: argparse.Namespace, report: Report) -> None:
    """Group after group; the report has each round as soon as it is over."""
    reader = Reader(options.threads)
    for names in options.sides:
        group, done = Group(names, options, reader), report.data["groups"]
        when = {name: report.data[name] for name in ("date", "command", "load_before")}
        try:
            group.start()
            for turn in range(options.rounds + 1):
                began = time.perf_counter()
                group.round(turn)
                report.put(groups=placed(done, group.result() | when))
                seconds = time.perf_counter() - began
                print(
                    f"round {turn} of {options.rounds} ({seconds:.0f} s){group.now()}", flush=True
                )
        finally:
            group.close()
            print(summary(group.result()), flush=True)


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the sides would stay behind
    data = machine(options) | {"left_out": without_llama(options)}
    if not options.sides:
        return 1
    path = options.json or Path("results") / f"device-{slug(data['cpu'])}.json"
    report = Report(path, data | {"groups": groups_of(path, data) if options.again else []})
    print(f"{data['cpu']}, {options.threads} threads, load {data['load_before']}")
    try:
        measure(options, report)
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured is in {report.path}", file=sys.stderr)
        return 130
    report.put(load_after=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    if not any(group["results"] for group in report.data["groups"]):
        print("nothing was measured", file=sys.stderr)
        return 1
    print(f"written: {report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
