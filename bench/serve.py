#!/usr/bin/env python3
"""A small model's server on a CPU, against a loop of transformers' `generate` on the same folder.

Starts `hymba serve` on random weights in float32 and sends it streamed completions of mixed lengths
from another process, `--concurrency` at a time, each client asking again when it has its answer.
Against it, in the same run and by turns, the same requests through `AutoModelForCausalLM`:

    loop      one after the other, as a script would
    batches   eight at a time, padded on the left, sorted by length of answer, which no server knows

Both sides are greedy and say as many tokens as asked for. Each round has prompts of its own, so no
cache knows them. Ended answers a second, time to the first token and a token, and the CPU time
of each side as a number of cores. Answers are compared first: where too many differ there is no
speed. Medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cpu
from bench.gpu import Report, rounded, slug
from hymba.commands import choose_threads
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.recipes import demo
from hymba.tokenizer import Tokenizer
from hymba.train.sources import python_library
from hymba.weights import save

EXAMPLES = """examples:
  python -m bench.serve                                the demo's model and hymba-125m
  python -m bench.serve --only demo --threads 4 --replicas 1,4
  python -m bench.serve --only hymba-125m --requests 16 --rounds 1   a quick look
  python -m bench.serve --loop-threads 1,2,4 --json results/serve-my-machine.json
"""
MODELS = ("demo", "hymba-125m")
PROMPTS, ANSWERS = (16, 384), (16, 96)  # tokens, evenly in their logarithm
BATCH = 8
AGREE = 0.8  # of the text: two tokens of random weights may be as likely but for rounding
STARTS_WITHIN = 300.0  # seconds


# What is asked


class Ask(NamedTuple):
    prompt: str
    answer: int  # tokens


class Texts:
    """Pieces of text of so many tokens, never the same twice."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, seed: int = 0):
        self.texts, self.tokenizer, self.random = texts, tokenizer, random.Random(seed)

    def asks(self, count: int) -> list[Ask]:
        return [
            Ask(self._piece(self._between(PROMPTS)), self._between(ANSWERS)) for _ in range(count)
        ]

    def _between(self, ends: tuple[int, int]) -> int:
        return round(math.exp(self.random.uniform(*map(math.log, ends))))

    def _piece(self, tokens: int) -> str:
        text = self.random.choice(self.texts)
        begin = self.random.randrange(max(1, len(text) - 8 * tokens))
        ids = self.tokenizer.encode(text[begin : begin + 8 * tokens])
        return self.tokenizer.decode(ids[:tokens]).replace("\ufffd", "?") or "?"


def config_of(name: str) -> Config:
    return demo.hybrid() if name == "demo" else Config.preset(name)


def make(name: str, folder: Path) -> Texts:
    """A model with random weights, and a tokenizer learnt from Python's own library."""
    config = config_of(name)
    texts = [text for text in python_library() if len(text) > 4000]
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    save(LanguageModel(config).init_weights(0), folder, tokenizer)
    return Texts(texts, tokenizer)


# One side: the server


class Answer(NamedTuple):
    text: str
    tokens: int
    first_s: float  # from the call to the first piece of text
    token_s: float  # between two tokens of this answer, mean


class Served(NamedTuple):
    """What the clients' process found in one pass."""

    seconds: float
    answers: list[Answer]
    client_s: float  # CPU time of the clients, and of the server meanwhile
    server_s: float


class Server:
    """`hymba serve` in a process of its own; its CPU time counts that of its children."""

    def __init__(self, folder: Path, threads: int, replicas: int, sequences: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "hymba", "serve", str(folder), "--port", str(port)]
        command += ["--device", "cpu", "--threads", str(threads), "--name", "model"]
        command += ["--replicas", str(replicas), "--max-sequences", str(sequences)]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def wait(self) -> None:
        import httpx

        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        self.log.seek(0)
        raise RuntimeError(f"the server did not start:\n{self.log.read()[-2000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def cpu_seconds(process: int) -> float:
    """What a process and its children have worked."""
    import psutil  # type: ignore[import-untyped]

    root, total = psutil.Process(process), 0.0
    for one in (root, *root.children(recursive=True)):
        try:
            times = one.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def serving(folder: Path, threads: int, replicas: int, sequences: int) -> Iterator[Server]:
    server = Server(folder, threads, replicas, sequences)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def ask_server(server: Server, asks: Sequence[Ask], concurrency: int) -> Served:
    """Ask from another process, so that its work is not ours."""
    command = [sys.executable, "-m", "bench.serve", "--clients", server.url, str(concurrency)]
    command.append(str(server.process.pid))
    asked = json.dumps(list(asks))
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    answers = [Answer(*answer) for answer in found["answers"]]
    return Served(found["seconds"], answers, found["client_s"], found["server_s"])


async def clients(url: str, concurrency: int, process: int, asks: Sequence[Ask]) -> dict[str, Any]:
    """In the clients' process: `concurrency` of them, each asking again when it has its answer."""
    import httpx

    answers: list[Answer | None] = [None] * len(asks)
    waiting = iter(enumerate(asks))
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client() -> None:
            for place, ask in waiting:
                answers[place] = await stream(http, ask)

        def clocks() -> tuple[float, float, float]:
            return time.perf_counter(), time.process_time(), cpu_seconds(process)

        before = clocks()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        spent = [b - a for a, b in zip(before, clocks(), strict=True)]
    return dict(zip(("seconds", "client_s", "server_s"), spent, strict=True)) | {"answers": answers}


async def stream(http: Any, ask: Ask) -> Answer:
    body = {"model": "model", "prompt": ask.prompt, "max_tokens": ask.answer, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    text, tokens, first, last = "", 0, 0.0, 0.0
    begin = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:500]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            said = json.loads(line[6:])
            if said.get("usage"):
                tokens = said["usage"]["completion_tokens"]
            elif said["choices"]:
                last = time.perf_counter() - begin
                first = first or last
                text += said["choices"][0]["text"]
    return Answer(text, tokens, first, (last - first) / max(1, tokens - 1))


# The other side: transformers


class Loop:
    """`generate` of the same folder, in this process."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import hymba.hf  # noqa: F401

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.model.generation_config.eos_token_id = None  # as many tokens as asked for
        self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def generate(self, asks: Sequence[Ask]) -> list[str]:
        """One batch, until its longest answer is said; each is cut to what was asked for."""
        inputs = self.tokenizer([ask.prompt for ask in asks], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        most = max(ask.answer for ask in asks)
        out = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        said = out[:, inputs["input_ids"].shape[1] :]
        rows = [row[: ask.answer] for row, ask in zip(said, asks, strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def run(self, asks: Sequence[Ask], size: int) -> list[str]:
        order = sorted(range(len(asks)), key=lambda i: asks[i].answer if size > 1 else 0)
        said: dict[int, str] = {}
        for begin in range(0, len(order), size):
            places = order[begin : begin + size]
            texts = self.generate([asks[i] for i in places])
            said.update(zip(places, texts, strict=True))
        return [said[i] for i in range(len(asks))]


# Passes


class Side(NamedTuple):
    name: str
    cores: int  # that it may use
    run: Callable[[Sequence[Ask]], dict[str, Any]]  # figures of a pass, with "texts"


def server_side(server: Server, name: str, cores: int, concurrency: int) -> Side:
    def run(asks: Sequence[Ask]) -> dict[str, Any]:
        found = ask_server(server, asks, concurrency)
        wrong = [
            a.tokens for a, ask in zip(found.answers, asks, strict=True) if a.tokens != ask.answer
        ]
        if wrong:
            raise RuntimeError(f"{len(wrong)} answers are not as long as asked for")
        return figures(asks, found.seconds, found.server_s) | {
            "client_cores": found.client_s / found.seconds,
            "first_ms": [1e3 * a.first_s for a in found.answers],
            "token_ms": [1e3 * a.token_s for a in found.answers],
            "texts": [a.text for a in found.answers],
        }

    return Side(name, cores, run)


def loop_side(loop: Loop, name: str, threads: int, size: int) -> Side:
    def run(asks: Sequence[Ask]) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        begin, worked = time.perf_counter(), time.process_time()
        texts = loop.run(asks, size)
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        torch.set_num_threads(before)
        return figures(asks, seconds, worked) | {"texts": texts}

    return Side(name, threads, run)


def figures(asks: Sequence[Ask], seconds: float, worked: float) -> dict[str, Any]:
    return {
        "requests_per_s": len(asks) / seconds,
        "tokens_per_s": sum(ask.answer for ask in asks) / seconds,
        "cores": worked / seconds,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def agreement(sides: Sequence[Side], asks: Sequence[Ask]) -> float:
    """Share of the answers' text before a difference, of the side that is least like the first."""
    first, *others = (side.run(asks)["texts"] for side in sides)
    return min(sum(map(_shared, first, other)) / len(asks) for other in others)


def _shared(one: str, other: str) -> float:
    return len(os.path.commonprefix([one, other])) / max(1, len(one), len(other))


def measure(
    sides: Sequence[Side], texts: Texts, requests: int, rounds: int
) -> list[dict[str, Any]]:
    """All sides in turn, each round with requests of its own, in another order each time."""
    passes: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(rounds):
        asks = texts.asks(requests)
        for side in (*sides[turn % len(sides) :], *sides[: turn % len(sides)]):
            passes[side.name].append(side.run(asks))
        print(f"  round {turn + 1} of {rounds}", flush=True)
    return [summary(side, passes[side.name]) for side in sides]


def summary(side: Side, passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; of times to tokens, quantiles over all requests."""
    row: dict[str, Any] = {"side": side.name, "threads": side.cores}
    for key in ("requests_per_s", "tokens_per_s", "cores", "client_cores", "load"):
        found = [one[key] for one in passes if one.get(key) is not None]
        if found:
            row[key] = rounded(statistics.median(found))
    row["busy"] = rounded(row["cores"] / side.cores)
    speeds = [one["requests_per_s"] for one in passes]
    row["spread"] = rounded((max(speeds) - min(speeds)) / row["requests_per_s"])
    for key in ("first_ms", "token_ms"):
        found = sorted(x for one in passes for x in one.get(key, ()))
        if found:
            p95 = found[min(len(found) - 1, int(0.95 * len(found)))]
            row[key] = {"median": rounded(statistics.median(found)), "p95": rounded(p95)}
    return row


def line(row: dict[str, Any]) -> str:
    out = f"  {row['side']:28} {row['requests_per_s']:8.2f} {row['tokens_per_s']:8.0f}"
    out += f" {row['cores']:6.2f} {row['spread']:6.0%}"
    for key in ("first_ms", "token_ms"):
        if key in row:
            out += f" {row[key]['median']:9.1f} {row[key]['p95']:8.1f}"
    return out


HEAD = (
    f"  {'':28} {'requests/s':>8} {'tokens/s':>6} {'cores':>6} {'spread':>6}"
    f" {'first ms':>9} {'p95':>8} {'token ms':>9} {'p95':>8}"
)


def bench(name: str, options: argparse.Namespace, report: Report) -> bool:
    """One model; False where its two sides do not say the same."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        texts, sides = make(name, folder), []
        for replicas in options.replicas:
            server = stack.enter_context(
                serving(folder, threads, replicas, max(1, options.sequences // replicas))
            )
            label = f"serve, {threads} threads" + f", {replicas} replicas" * (replicas > 1)
            sides.append(server_side(server, label, threads, options.concurrency))
        loop = Loop(folder)
        for count in options.loop_threads or sorted({1, threads}):
            noun = "thread" if count == 1 else "threads"
            sides.append(loop_side(loop, f"generate, {count} {noun}", count, 1))
            sides.append(loop_side(loop, f"batches of {BATCH}, {count} {noun}", count, BATCH))
        same = agreement(sides, texts.asks(min(2 * BATCH, options.requests)))
        print(f"{name}: {same:.0%} of the answers' text is the same on all sides")
        if same < AGREE:
            return False
        rows = measure(sides, texts, options.requests, options.rounds)
    print(HEAD, *map(line, rows), sep="\n", flush=True)
    for row in rows:
        report.add({"model": name, "agree": rounded(same)} | row)
    return True


# The program


def numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,4")
    return found


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/serve.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=MODELS, help="one model; without it both")
    parser.add_argument("--threads", type=int, default=0, help="of the server (0: half the cores)")
    parser.add_argument(
        "--replicas",
        type=numbers,
        default=[1],
        metavar="N,N",
        help="servers with so many models, which share the threads (1)",
    )
    parser.add_argument(
        "--loop-threads", type=numbers, metavar="N,N", help="of generate (1 and the server's)"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="clients (16)")
    parser.add_argument("--sequences", type=int, default=16, help="computed at once (16)")
    parser.add_argument("--requests", type=int, default=64, help="in each round (64)")
    parser.add_argument("--rounds", type=int, default=5, help="of all sides by turns (5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go (results/serve-CPU.json)"
    )
    options = parser.parse_args(argv)
    for name in ("concurrency", "sequences", "requests", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if options.threads < 0:
        parser.error("--threads must be 0 or more")
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    versions = {name: version(name) for name in ("transformers", "fastapi", "uvicorn", "httpx")}
    asked = ("concurrency", "sequences", "requests", "rounds")
    return (
        cpu.machine()
        | {
            "benchmark": "serve",
            "command": shlex.join(["python", "-m", "bench.serve", *sys.argv[1:]]),
        }
        | versions
        | {name: getattr(options, name) for name in asked}
        | {"prompt_tokens": PROMPTS, "answer_tokens": ANSWERS}
    )


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the servers would stay behind
    choose_threads(options.threads)
    data = machine(options)
    path = options.json or Path("results") / f"serve-{slug(data['cpu'])}.json"
    report = Report(path, data)
    print(f"{data['cpu']}, {data['threads']} threads, torch {data['torch']}", end=", ")
    print(f"load {data['load_before']}")
    right = [bench(name, options, report) for name in MODELS if options.only in (None, name)]
    report.put(load_after=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    if not all(right):
        print("no speeds where the answers differ", file=sys.stderr)
        return 1
    print(f"written: {report.path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clients"]:  # the clients' process
        url, count, process = sys.argv[2:]
        asked = [Ask(*ask) for ask in json.load(sys.stdin)]
        print(json.dumps(asyncio.run(clients(url, int(count), int(process), asked))))
        sys.exit(0)
    sys.exit(main())
