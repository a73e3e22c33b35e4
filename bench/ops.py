#!/usr/bin/env python3
"""Every op on one GPU: is it right, how long does it take, how far is that from the limit?

First an op is compared with plain PyTorch in float64 on fresh random inputs, gradients too; one
that differs gets no speed, and the program ends with 1. Then come milliseconds, bytes or FLOPs a
second (those that must be moved or computed: the table in bench/cases.py), the share of the limit
measured in the same run, and what peers take for the same. Prints a line each and writes JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import gpu
from bench.gpu import Stopwatch, attempt, relative_error, rounded
from bench.peers import Missing

if TYPE_CHECKING:
    from bench.cases import Case, Work
    from bench.peers import Peer

EXAMPLES = """examples:
  python -m bench.ops                                   all ops
  python -m bench.ops --only scan,conv --quick          some, fewer sizes
  python -m bench.ops --mamba-ssm mamba_ssm-2.3.2.tar.gz
                                     with mamba-ssm's scan, built from its source package

HYMBA_BACKEND=torch measures plain PyTorch in place of the kernels.
"""
GROUPS = ("attention", "decode", "scan", "ssm", "elementwise", "conv", "head")
PEER_TOLERANCE = 5e-2  # a peer may round more often than we do


# Right or wrong


def outputs(run: Callable[..., Any], inputs: Mapping[str, Tensor], grads: set[str]) -> Any:
    """(outputs, gradients by name); every element of every output pulls on the inputs."""
    with torch.set_grad_enabled(bool(grads)):
        given = {k: x.detach().requires_grad_(k in grads) for k, x in inputs.items()}
        outs = as_list(run(**given))
        if not grads:
            return outs, {}
        leaves = {name: given[name] for name in sorted(grads)}
        found = torch.autograd.grad(outs, list(leaves.values()), pulls(outs))
    return [x.detach() for x in outs], dict(zip(leaves, found, strict=True))


def as_list(outs: Any) -> list[Tensor]:
    return list(outs) if isinstance(outs, (tuple, list)) else [outs]


def pulls(outs: list[Tensor]) -> list[Tensor]:
    """The same random gradients for outputs of the same shapes, whatever their dtype."""
    generator = torch.Generator(outs[0].device).manual_seed(7)
    draw = [torch.randn(x.shape, generator=generator, device=x.device) for x in outs]
    return [g.to(torch.bfloat16).to(x.dtype) for g, x in zip(draw, outs, strict=True)]


def pulled(case: Case) -> set[str]:
    return set(case.inputs) - case.fixed if case.backward else set()


def check(case: Case) -> dict[str, float]:
    """How far each output and gradient is from float64, as a share of its length."""
    grads = pulled(case)
    # An op that works in place gets copies; else the inputs themselves, strides and all.
    given = case.inputs if grads else {k: x.clone() for k, x in case.inputs.items()}
    wide = {k: x.detach().double() for k, x in case.inputs.items()}
    got, want = outputs(case.run, given, grads), outputs(case.reference, wide, grads)
    pairs = zip(got[0], want[0], strict=True)
    errors = {f"out {i}": relative_error(*pair) for i, pair in enumerate(pairs)}
    errors |= {f"gradient of {name}": relative_error(got[1][name], want[1][name]) for name in grads}
    return errors


# Time


def works(run: Callable[[list[Tensor]], Any], inputs: list[Tensor], mark: list[bool]) -> dict:
    """What is timed in each pass; forward's result is kept for backward."""

    def leaves() -> list[Tensor]:
        return [x.detach().requires_grad_(m) for x, m in zip(inputs, mark, strict=True)]

    def inference() -> Callable[[], Any]:
        plain = [x.detach() for x in inputs]
        return torch.no_grad()(lambda: run(plain))

    def forward() -> Callable[[], Any]:
        given = leaves()
        return lambda: run(given)

    def backward() -> Callable[[], Any]:
        given = leaves()
        outs = [x for x in as_list(run(given)) if x.requires_grad]
        goals, grads = [x for x in given if x.requires_grad], pulls(outs)
        return lambda: torch.autograd.grad(outs, goals, grads, retain_graph=True)

    def both() -> Callable[[], Any]:
        given = leaves()
        goals = [x for x in given if x.requires_grad]
        grads = pulls(as_list(run(given)))
        return lambda: torch.autograd.grad(as_list(run(given)), goals, grads)

    return {"inference": inference, "forward": forward, "backward": backward, "both": both}


def memory(make: Mapping[str, Callable[..., Any]], outs_bytes: int) -> dict[str, float]:
    """MiB kept from forward to backward (the result itself not counted), and the most that is
    held until the gradients are there, the inputs not counted."""
    torch.cuda.synchronize()
    begin = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backward = make["backward"]()
    kept = torch.cuda.memory_allocated() - begin - 2 * outs_bytes  # the result and its gradient
    backward()
    peak = torch.cuda.max_memory_allocated() - begin
    return {"kept_mib": rounded(kept / 2**20), "peak_mib": rounded(peak / 2**20)}


def limit(work: Work, ceilings: Mapping[str, float]) -> tuple[str, float]:
    """Which limit binds, and the milliseconds it allows."""
    bandwidth = ceilings["read_bytes_per_s" if work.reads else "copy_bytes_per_s"]
    needs = {
        "bytes": work.bytes / bandwidth,
        "FLOPs": work.flops / ceilings["matrix_flops_per_s"],
        "exps": work.exps / ceilings["exps_per_s"],
    }
    name = max(needs, key=needs.__getitem__)
    return name, 1e3 * needs[name]


class Bench:
    def __init__(self, report: gpu.Report, watch: Stopwatch, ceilings: dict[str, float]):
        self.report, self.watch, self.ceilings = report, watch, ceilings
        self.failed: list[str] = []

    def case(self, case: Case) -> None:
        name = f"{case.op} {case.size}"
        try:
            errors = check(case)
        except Missing as missing:
            print(f"  - {name}: {missing}", flush=True)
            return
        except Exception:
            self.failed.append(name)
            raise
        worst = max(errors, key=errors.__getitem__)
        wrong = {k: rounded(v) for k, v in errors.items() if not v <= case.tolerance}
        head = {"op": case.op, "size": case.size}
        head |= {"error": rounded(errors[worst], 2), "error_of": worst}
        if wrong:
            self.failed.append(name)
            self.report.add(head | {"failed": wrong})
            said = ", ".join(f"{k} {v:.1e}" for k, v in list(wrong.items())[:5])
            print(f"  ! {name}: WRONG, no speed: {said}", flush=True)
            return
        self.passes(case, head)

    def passes(self, case: Case, head: dict[str, Any]) -> None:
        names = list(case.inputs)
        grads = pulled(case)
        make = works(
            lambda x: case.run(**dict(zip(names, x, strict=True))),
            list(case.inputs.values()),
            [name in grads for name in names],
        )
        rows = {}
        for kind, work in case.work.items():
            row = attempt(f"{case.op} {case.size} {kind}", lambda: self.row(case, make, kind, work))  # noqa: B023
            if row is not None:
                rows[kind] = head | row
        if case.saved and "backward" in rows:
            first = as_list(torch.no_grad()(case.run)(**case.inputs))
            rows["backward"]["memory"] = memory(make, gpu_bytes(first))
        for label, build in case.peers.items():
            attempt(f"{case.op} {case.size}, {label}", lambda: self.peer(case, label, build, rows))  # noqa: B023
        for row in rows.values():
            self.report.add(row)
            print(line(row), flush=True)

    def row(self, case: Case, make: dict, kind: str, work: Work) -> dict[str, Any]:
        once = make[kind]()
        found = {}
        if case.host:
            found["host_us"] = rounded(gpu.host_us(once))
        timing = self.watch.time(once)
        name, least = limit(work, self.ceilings)
        return {
            "pass": kind,
            "ms": rounded(timing.ms),
            "spread": rounded(timing.spread, 2),
            "runs": timing.runs,
            "gb_per_s": rounded(work.bytes / timing.ms / 1e6),
            "tflop_per_s": rounded(work.flops / timing.ms / 1e9),
            "limit": name,
            "limit_ms": rounded(least),
            "share": rounded(least / timing.ms, 3),
            **found,
            "peers": {},
        }

    def peer(self, case: Case, label: str, build: Callable[[], Peer], rows: dict) -> None:
        peer = build()
        if peer.ours is not None:
            want = as_list(peer.same() if peer.same else torch.no_grad()(case.run)(**case.inputs))
            with torch.no_grad():
                got = peer.ours(peer.forward(*peer.inputs))
            error = relative_error(got, want[0])
            if not error <= PEER_TOLERANCE:
                raise ValueError(f"differs from ours by {error:.1e}, so no speed")
        make = works(
            lambda x: peer.forward(*x), peer.inputs, [x.is_floating_point() for x in peer.inputs]
        )
        for kind, row in rows.items():
            if kind == "inference" and "forward" in rows:
                continue  # forward says it
            once = make[kind]()
            timing = self.watch.time(once)
            found = {"ms": rounded(timing.ms), "times": rounded(timing.ms / row["ms"], 3)}
            row["peers"][label] = found
        if case.saved and "backward" in rows:
            outs = as_list(torch.no_grad()(peer.forward)(*peer.inputs))
            rows["backward"]["peers"][label]["memory"] = memory(make, gpu_bytes(outs))


def gpu_bytes(tensors: list[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


# What is printed


def line(row: Mapping[str, Any]) -> str:
    compute = row["limit"] == "FLOPs"
    rate = f"{row['tflop_per_s']:.0f} TFLOP/s" if compute else f"{row['gb_per_s']:.0f} GB/s"
    name = f"{row['op']} {row['size']}"
    told = f"{name:48.48} {row['pass']:9} {row['ms']:8.3f} ms ±{row['spread']:<4.0%}"
    told += f" {rate:>11} {row['share']:4.0%} of {row['limit']:5}"
    peers = [f"{k} {v['ms']:.3g} ({v['times']:.2g}x)" for k, v in row["peers"].items()]
    told += " | " + ", ".join(peers) if peers else ""
    told += f" | host {row['host_us']:.0f} us" if "host_us" in row else ""
    if "memory" in row:
        kept = {"ours": row["memory"]}
        kept |= {k: v["memory"] for k, v in row["peers"].items() if "memory" in v}
        said = (f"{k} {v['kept_mib']:.0f}/{v['peak_mib']:.0f}" for k, v in kept.items())
        told += "\n    MiB kept for backward / peak: " + ", ".join(said)
    return told


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/ops.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    gpu.add_source(parser)
    gpu.add_json(parser, "ops")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    unknown = set(options.only) - set(GROUPS)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/ops.py")
    from bench import mamba
    from bench.cases import CASES, Options
    from bench.ceilings import ceilings

    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    report = gpu.Report(gpu.json_path(options, "ops"), gpu.machine("ops"))
    watch = Stopwatch(0.04 if options.quick else 0.1)
    limits = ceilings(watch)
    report.put(ceilings={k: rounded(v) for k, v in limits.items()}, clocks=gpu.clocks())
    print(gpu.headline(report.data), flush=True)
    wanted = options.mamba_ssm if "scan" in options.only else None
    build = None if wanted is None else mamba.Build(wanted)
    report.put(mamba_ssm=None if build is None else mamba.version(wanted))
    bench, begin = Bench(report, watch, limits), time.monotonic()
    for group in options.only:
        for builder in CASES[group](Options(options.quick, build)):
            attempt(group, lambda: bench.case(builder()))  # noqa: B023
        print(f"  -- {group}: {time.monotonic() - begin:.0f} s so far", flush=True)
    report.put(failed=bench.failed, seconds=round(time.monotonic() - begin))
    print(f"written: {report.path}")
    if bench.failed:
        print(f"WRONG, so without a speed: {'; '.join(bench.failed)}", file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
