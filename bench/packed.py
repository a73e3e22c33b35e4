#!/usr/bin/env python3
"""Matrices in few bits on one GPU: is a product right, how fast is it, and what does it make of a
whole decode step?

First every matrix of the model is checked against float64, in every scheme: nothing that is wrong
gets a speed. Then each is timed for 1, 2, 4 and 8 rows as a decode step meets it, with the norm or
the sum around it: in a CUDA graph of one product after the other, of as many copies as do not fit
in the second-level cache. "share" is of the bandwidth that the same run measured, for the packed
bytes. Beside it what the same model does in bfloat16, and PyTorch's own 4-bit product (the kernel
behind torchao's int4) with nothing around it. In the end the model with random weights through the
engine: a decode step in bfloat16 and in each scheme, sampling and reading of tokens included, and
the GPU's memory.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import engine, gpu
from bench.gpu import Stopwatch, attempt, relative_error, rounded
from bench.model import breakdown, build, largest_lines, parts_line
from hymba import ops
from hymba.config import Config
from hymba.model.accounting import step_bytes
from hymba.model.decoder import LanguageModel, _product
from hymba.model.packed import _Tiles, make_room, plan
from hymba.ops import Packed, packed
from hymba.schemes import SCHEMES, Scheme, scheme_named

EXAMPLES = """examples:
  python -m bench.packed
  python -m bench.packed --tune
  python -m bench.packed --schemes int4 --batches 1,8 --skip engine
"""
PARTS = ("matrices", "peers", "engine")
MATRICES = {  # of a layer and the head: rows, columns, and what a step has around the product
    "into the branches": (10000, 1600, "norm"),
    "out of them": (1600, 3200, "fuse"),
    "gate and up": (11008, 1600, "gated"),
    "down": (1600, 5504, "add"),
    "dt, B, C": (132, 3200, ""),
    "head": (32001, 1600, "norm"),
}
CHECKED = (
    (1600, 5504),
    (1600, 3200),
    (11008, 1600),
    (10000, 1600),
    (32001, 1600),
    (132, 3200),
    (3200, 100),
    (70, 129),
)
ROTATED_BYTES = 256 << 20  # several times any second-level cache
EPS = 1e-6
ALLOWED = 4e-3  # of float64's result: a bfloat16 result's own rounding is 1.7e-3
# By which matrix a place of `Tiling` is decided, and how it may be cut (warps, groups ahead).
PLACES = {
    "least": "dt, B, C",
    "few": "down",
    "mean": "out of them",
    "many": "into the branches",
    "gated": "gate and up",
    "most": "head",
}
FEW = ((8, 3), (8, 7), (16, 1), (16, 2), (16, 4), (16, 7), (32, 1), (32, 3))
MANY = ((4, 1), (4, 2), (4, 4), (4, 5), (6, 1), (7, 1), (8, 1), (8, 2))


def random_tiles(rows: int, columns: int, scheme: Scheme, device: str = "cuda") -> Tensor:
    """Any codes, and scales of both signs with which weights are 0.04 at most, as a rule."""
    tiles, groups = -(-rows // packed.TILE), scheme.groups(columns)
    made = torch.randint(
        0, 256, (tiles, groups, scheme.group_bytes), dtype=torch.uint8, device=device
    )
    if scheme.kind == "e4m3":
        made[made & 127 == 127] = 0  # not numbers
    scales = torch.randn(tiles, groups, packed.TILE, device=device) * 0.04 / scheme.most
    made[..., -2 * packed.TILE :] = scales.half().view(torch.uint8)
    return made.view(tiles, -1)


def random_packed(rows: int, columns: int, scheme: Scheme) -> Packed:
    return Packed(random_tiles(rows, columns, scheme), rows, columns, scheme)


def activations(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def weights_of(columns: int) -> Tensor:
    """A norm's."""
    return activations(1, columns)[0]


def inputs_of(count: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two inputs of a product, a norm's weights, and what is added behind it."""
    x, y = activations(count, columns), activations(count, columns)
    return x, y, weights_of(columns), activations(count, rows)


class Bench:
    def __init__(self, options: argparse.Namespace, report: gpu.Report, bandwidth: float):
        self.options, self.report, self.bandwidth = options, report, bandwidth
        self.watch = Stopwatch(0.02)
        self.schemes = [scheme_named(name) for name in options.schemes]

    # ---- right or wrong

    def check(self) -> dict[str, bool]:
        """Each scheme: products of all kinds, look-ups, rows alone and beside others."""
        good = {}
        for scheme in self.schemes:
            found = [
                attempt(f"{scheme.name} {size}", lambda s=scheme, n=size: self._check(s.name, *n))
                for size in CHECKED
            ]
            good[scheme.name] = all(found)
        return good

    def _check(self, name: str, rows: int, columns: int) -> bool:
        from hymba.ops import packed_triton

        held = random_packed(rows, columns, scheme_named(name))
        weight = packed.dequantize(held)
        errors: dict[int | str, float] = {}
        x = activations(40, columns)
        want = x.double() @ weight.double().T
        for count in (1, 3, 8, 20, 40):
            got = packed_triton.packed_linear(x[:count], held)
            errors[count] = rounded(relative_error(got, want[:count]), 2)
        if (rows, columns) == CHECKED[0]:  # float32 goes in three parts
            got = packed_triton.packed_linear(x[:3].float(), held)
            errors["float32"] = rounded(relative_error(got, want[:3]), 2)
        if rows % 64 == 0:
            errors |= self._neighbours(held, x[:8], weight)
        alone = packed_triton.packed_linear(x[2:3], held)
        same = {
            "again": torch.equal(alone, packed_triton.packed_linear(x[2:3], held)),
            "alone and beside 7": torch.equal(
                alone[0], packed_triton.packed_linear(x[:8], held)[2]
            ),
        }
        ids = torch.tensor([rows - 1, 0, rows // 2], device="cuda")
        same["looked up"] = torch.equal(packed_triton.packed_rows(ids, held), weight[ids])
        written = packed_triton.dequantize(held)
        same["written out"] = torch.equal(written, weight)
        limit = {what: self._allowed(what) for what in errors}
        right = all(e <= limit[count] for count, e in errors.items())
        good = right and all(same.values())
        row = {"scheme": name, "matrix": [rows, columns], "errors": errors, "same": same}
        self.report.add(row | {"right": good}, to="checks")
        print(
            f"{'ok   ' if good else 'WRONG'} {name} {rows} x {columns} {errors} {same}", flush=True
        )
        return good

    @staticmethod
    def _allowed(what: int | str) -> float:
        if what == "float32":
            return 2e-5
        return 3 * ALLOWED if isinstance(what, str) else ALLOWED  # roundings one after the other

    def _neighbours(self, held: Packed, x: Tensor, weight: Tensor) -> dict[int | str, float]:
        """Errors of products with what a decode step has before and behind them."""
        from hymba.ops import packed_triton

        norm, second = weights_of(held.columns), weights_of(held.columns)
        residual, other = activations(len(x), held.rows), activations(len(x), held.columns)
        errors: dict[int | str, float] = {}
        for count in (1, len(x)):
            wide = x[:count].double()
            normed = F.rms_norm(wide, norm.shape, norm.double(), EPS)
            both = normed + F.rms_norm(other[:count].double(), norm.shape, second.double(), EPS)
            product = normed @ weight.double().T
            gate, up = product.chunk(2, dim=-1)
            more = residual[:count]
            pairs = {
                "norm": (
                    packed_triton.packed_norm_linear(x[:count], norm, EPS, held),
                    product,
                ),
                "swiglu": (
                    packed_triton.packed_norm_swiglu(x[:count], norm, EPS, held),
                    F.silu(gate) * up,
                ),
                "fuse": (
                    packed_triton.packed_fuse_linear(
                        x[:count], other[:count], norm, second, EPS, held, more
                    ),
                    both / 2 @ weight.double().T + more.double(),
                ),
                "add": (
                    packed_triton.packed_linear_add(x[:count], held, more),
                    wide @ weight.double().T + more.double(),
                ),
            }
            for name, (got, want) in pairs.items():
                errors[f"{name}, {count}"] = rounded(relative_error(got, want), 2)
        return errors

    # ---- products

    def microseconds(self, products: Sequence[Callable[[], Any]]) -> float:
        """Of one of them, all in a graph, one after the other."""

        def work() -> None:
            for product in products:
                product()

        replay = gpu.graphed(work)
        return 1e3 * self.watch.time(replay, flush=False).ms / len(products)

    def copies(self, nbytes: int) -> int:
        return max(3, min(64, math.ceil(ROTATED_BYTES / nbytes)))

    def ours(self, what: str, scheme: Scheme, count: int) -> tuple[float, int]:
        """(microseconds, bytes)"""
        from hymba.ops import packed_triton as ops

        rows, columns, around = MATRICES[what]
        first = random_packed(rows, columns, scheme)
        held = [
            first._replace(tiles=first.tiles.clone())
            for _ in range(self.copies(first.tiles.nbytes))
        ]
        x, y, norm, residual = inputs_of(count, rows, columns)
        calls = {
            "": lambda w: ops.packed_linear(x, w),
            "norm": lambda w: ops.packed_norm_linear(x, norm, EPS, w),
            "gated": lambda w: ops.packed_norm_swiglu(x, norm, EPS, w),
            "add": lambda w: ops.packed_linear_add(x, w, residual),
            "fuse": lambda w: ops.packed_fuse_linear(x, y, norm, norm, EPS, w, residual),
        }
        works = [partial(calls[around], w) for w in held]
        return self.microseconds(works), first.tiles.nbytes

    def matrices(self, good: dict[str, bool]) -> None:
        for what in MATRICES:
            plain = attempt(f"bfloat16 {what}", lambda w=what: self.plain(w))
            for scheme in self.schemes:
                if not good[scheme.name]:
                    continue
                for count in self.options.batches:
                    row = attempt(
                        f"{scheme.name} {what}",
                        lambda w=what, s=scheme.name, n=count: self.row(s, w, n),
                    )
                    if row is not None:
                        row["bfloat16_us"] = (plain or {}).get(count)
                        self.report.add(row)
                        print(self.line(row), flush=True)
            if "peers" not in self.options.skip:
                attempt(f"peers {what}", lambda w=what: self.peers(w))

    def row(self, name: str, what: str, count: int) -> dict[str, Any]:
        us, nbytes = self.ours(what, scheme_named(name), count)
        rate = nbytes / us * 1e6
        return {
            "scheme": name,
            "what": what,
            "matrix": list(MATRICES[what][:2]),
            "rows": count,
            "us": rounded(us),
            "bytes": nbytes,
            "gb_per_s": rounded(rate / 1e9),
            "share": rounded(rate / self.bandwidth, 3),
        }

    def line(self, row: dict[str, Any]) -> str:
        plain = row.get("bfloat16_us")
        times = f", {plain / row['us']:.2f}x our bfloat16 ({plain} us)" if plain else ""
        return (
            f"{row['scheme']:5} {row['what']:18} rows {row['rows']:2} {row['us']:8.2f} us"
            f" {row['gb_per_s']:6.0f} GB/s {row['share']:5.1%}{times}"
        )

    def plain(self, what: str) -> dict[int, float]:
        """What the same model does in bfloat16 (`Block.step`): us by rows."""
        rows, columns, around = MATRICES[what]
        count = self.copies(2 * rows * columns)
        held = [activations(rows, columns) for _ in range(count)]
        found = {}
        for n in self.options.batches:
            call = self._thin(around, n, rows, columns) if n <= ops.THIN_ROWS else None
            call = call or self._library(around, n, rows, columns)
            found[n] = rounded(self.microseconds([partial(call, w) for w in held]))
        return found

    @staticmethod
    def _thin(around: str, n: int, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        x, y, norm, residual = inputs_of(n, rows, columns)
        return {
            "": lambda w: ops.linear(x, w),
            "norm": lambda w: ops.norm_linear(x, norm, EPS, w),
            "gated": lambda w: ops.norm_swiglu(x, norm, EPS, *w.chunk(2)),
            "add": lambda w: ops.linear_add(x, w, residual),
            "fuse": lambda w: ops.fuse_linear(x, y, norm, norm, EPS, w, residual),
        }[around]

    @staticmethod
    def _library(around: str, n: int, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        x, y, norm, residual = inputs_of(n, rows, columns)
        return {
            "": lambda w: ops.narrow_linear(x, w),
            "norm": lambda w: _product(ops.rms_norm(x, norm, EPS), w),
            "gated": lambda w: ops.swiglu(*(ops.rms_norm(x, norm, EPS) @ w.T).chunk(2, dim=-1)),
            "add": lambda w: residual.addmm_(x, w.T),
            "fuse": lambda w: residual.addmm_(ops.fuse_heads(x, y, norm, norm, EPS), w.T),
        }[around]

    def peers(self, what: str) -> None:
        """PyTorch's 4-bit product with groups of 32 columns, nothing around it."""
        rows, columns, _ = MATRICES[what]
        if rows % 8 or columns % 64:
            return
        aten = torch.ops.aten
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        first = aten._convert_weight_to_int4pack(codes, 2)
        scales = torch.rand(columns // 32, rows, 2, device="cuda", dtype=torch.bfloat16)
        held = [first.clone() for _ in range(self.copies(first.nbytes + scales.nbytes))]
        for n in self.options.batches:
            x = activations(n, columns)
            us = self.microseconds(
                [lambda w=w, x=x: aten._weight_int4pack_mm(x, w, 32, scales) for w in held]
            )
            row = {"name": "aten int4", "what": what, "rows": n, "us": rounded(us)}
            self.report.add(row, to="peers")
            print(f"  aten int4, alone, {what} rows {n:2} {us:8.2f} us", flush=True)

    # ---- how to cut

    def tune(self) -> None:
        """Try all cuts, each place by its matrix; the best on average goes on."""
        from hymba.ops import packed_cuda

        for place, what in PLACES.items():
            for bits in {scheme.bits for scheme in self.schemes}:
                found: dict[tuple[int, int], float] = {}
                for cut in MANY if place in ("many", "gated", "most") else FEW:
                    self._cut(bits, place, cut)
                    us = {
                        f"{scheme.name}, {count}": attempt(
                            f"{cut}", lambda a=(what, scheme, count): rounded(self.ours(*a)[0])
                        )
                        for scheme in self.schemes
                        if scheme.bits == bits
                        for count in (1, 8)
                    }
                    self.report.add({"place": place, "cut": list(cut), "us": us}, to="cuts")
                    print(f"{place} {cut}: {us}", flush=True)
                    if None not in us.values():
                        found[cut] = math.prod(us.values()) ** (1 / len(us))  # type: ignore[arg-type]
                if found:
                    self._cut(bits, place, min(found, key=found.__getitem__))
        print(f"going on with {packed_cuda.TILINGS}", flush=True)
        self.report.put(tilings=str(packed_cuda.TILINGS))

    @staticmethod
    def _cut(bits: int, place: str, cut: tuple[int, int]) -> None:
        from hymba.ops import packed_cuda

        tiling = packed_cuda.TILINGS[bits]
        packed_cuda.TILINGS[bits] = tiling._replace(**{place: packed_cuda.Cut(*cut)})

    # ---- the engine

    def engine(self) -> None:
        options = SimpleNamespace(context=self.options.context, batches=self.options.engine_batches)
        limits = {"read_bytes_per_s": self.bandwidth, "copy_bytes_per_s": self.bandwidth}
        bench = engine.Bench(options, self.report, limits)  # type: ignore[arg-type]
        config = Config.preset(self.options.preset).replace(max_positions=options.context + 128)
        for scheme in (None, *self.schemes):
            name = scheme.name if scheme else "bfloat16"
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            model = packed_model(config, scheme) if scheme else build(config).eval()
            weights = torch.cuda.memory_allocated() - before
            for batch in options.batches:
                attempt(
                    f"{name}, batch {batch}",
                    lambda b=batch, n=name, m=model, w=weights: self.step(bench, n, m, b, w),
                )
            del model

    def step(
        self, bench: engine.Bench, name: str, model: LanguageModel, batch: int, weights: int
    ) -> None:
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        made = bench.engine(model, batch)
        bench.fill(made, batch)
        for _ in range(engine.WARM):
            made.step()
        start = time.perf_counter() - begin
        times = [bench.steps(made, engine.STEPS) / engine.STEPS for _ in range(engine.GROUPS)]
        seconds = statistics.median(times)
        found = step_bytes(model.config, self.options.context + 64, batch)
        needed = found["total"] - found["weights"] + weights
        row: dict[str, Any] = {
            "name": name,
            "batch": batch,
            "context": self.options.context,
            "ms": rounded(1e3 * seconds),
            "spread": rounded((max(times) - min(times)) / seconds, 2),
            "tokens_per_s": round(batch / seconds),
            "limit_ms": rounded(1e3 * needed / self.bandwidth),
            "weights_mb": round(weights / 1e6),
            "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6),
        }
        print(
            f"{name:8} batch {batch:3} {row['ms']:7.3f} ms ±{row['spread']:<4.0%}"
            f" {row['tokens_per_s']:6,} tok/s, limit {row['limit_ms']} ms, weights"
            f" {row['weights_mb']:,} MB, at most {row['peak_mb']:,} MB (start {start:.1f} s)",
            flush=True,
        )
        if batch == min(self.options.engine_batches):
            parts = attempt("breakdown", lambda: breakdown(made.step, runs=4))
            if parts is not None:
                row["breakdown"] = parts
                print(parts_line(parts) + "\n" + largest_lines(parts, 14), flush=True)
        self.report.add(row, to="engine")


def packed_model(config: Config, scheme: Scheme) -> LanguageModel:
    """Random weights, those that are packed made directly as tiles."""
    model = build(config).eval()
    make_room(model, plan(model, scheme), config.tie_embeddings)
    for module in model.modules():
        if isinstance(module, _Tiles):
            module.tiles.data.copy_(random_tiles(module.rows, module.columns, module.scheme))
    return model


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def read_names(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        wrong = sorted(set(found) - set(known))
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: there are {', '.join(known)}")
        return found

    return read_names


def read(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/packed.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = engine.numbers
    parser.add_argument("--preset", default="hymba-1.5b", help="the engine's model (hymba-1.5b)")
    parser.add_argument(
        "--schemes", type=names(list(SCHEMES)), default=list(SCHEMES), metavar="NAME,NAME"
    )
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8], metavar="N,N")
    parser.add_argument("--engine-batches", type=numbers, default=[1, 4, 8], metavar="N,N")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache (1024)")
    parser.add_argument("--tune", action="store_true", help="first try how to cut the products")
    parser.add_argument(
        "--skip", type=names(PARTS), default=[], metavar="PART,PART", help=f"of {', '.join(PARTS)}"
    )
    gpu.add_json(parser, "packed")
    options = parser.parse_args(argv)
    if options.context < 2 * max(options.engine_batches):
        parser.error("--context must be at least twice the largest batch")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read(argv)
    gpu.need_cuda("bench/packed.py")
    from bench.ceilings import copy_bandwidth, read_bandwidth
    from hymba.ops import packed_cuda

    torch.manual_seed(0)
    begin, watch = time.perf_counter(), Stopwatch(0.05)
    report = gpu.Report(gpu.json_path(options, "packed"), gpu.machine("packed"))
    ceilings = {
        "read_bytes_per_s": rounded(read_bandwidth(watch)),
        "copy_bytes_per_s": rounded(copy_bandwidth(watch)),
    }
    report.put(ceilings=ceilings, model=options.preset, tilings=str(packed_cuda.TILINGS))
    torch.cuda.empty_cache()
    bandwidth = max(ceilings.values())
    print(f"{report.data['device']}: bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    bench = Bench(options, report, bandwidth)

    def done(what: str) -> None:
        print(f"-- {what}: {time.perf_counter() - begin:.0f} s", flush=True)

    if options.tune:
        bench.tune()
        done("cuts")
    good = bench.check()
    done("checks")
    if "engine" not in options.skip:
        if all(good.values()):
            attempt("engine", bench.engine)
        else:
            print("the engine is not timed: a product is wrong")
        done("engine")
    if "matrices" not in options.skip:
        bench.matrices(good)
        done("matrices")
    report.put(clocks=gpu.clocks())
    print(f"written: {report.path}")
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
