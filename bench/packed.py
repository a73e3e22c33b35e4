#!/usr/bin/env python3
"""Matrices in few bits on one GPU: is a product right, how fast is it, and what does it make of a
whole decode step?

First every matrix of the model is checked against float64, in every scheme: nothing that is wrong
gets a speed. Then each is timed for 1, 2, 4 and 8 rows as a decode step meets it: in a CUDA graph
of one product after the other, of as many copies as do not fit in the second-level cache. "share"
is of the bandwidth that the same run measured, for the packed bytes. Beside it torch's product with
the bfloat16 matrix and PyTorch's own 4-bit product (the kernel behind torchao's int4). In the end
the model with random weights through the engine: a decode step in bfloat16 and in each scheme,
sampling and reading of tokens included, and the GPU's memory.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import engine, gpu
from bench.gpu import Stopwatch, attempt, relative_error, rounded
from bench.model import breakdown, build, largest_lines, parts_line
from hymba.config import Config
from hymba.model.accounting import step_bytes
from hymba.model.decoder import LanguageModel
from hymba.model.packed import _Tiles, make_room, plan
from hymba.ops import Packed, packed
from hymba.schemes import SCHEMES, Scheme, scheme_named

EXAMPLES = """examples:
  python -m bench.packed
  python -m bench.packed --tune
  python -m bench.packed --schemes int4 --batches 1,8 --skip engine
"""
PARTS = ("matrices", "peers", "engine")
MATRICES = (  # rows and columns: into the branches, out of them, gate and up, down, head, dt B C
    (10000, 1600),
    (1600, 3200),
    (11008, 1600),
    (5504, 1600),
    (1600, 5504),
    (32001, 1600),
    (132, 3200),
)
CHECKED = (
    (1600, 5504),
    (11008, 1600),
    (10000, 1600),
    (32001, 1600),
    (132, 3200),
    (3200, 100),
    (70, 129),
)
ROTATED_BYTES = 256 << 20  # several times any second-level cache
ALLOWED = 4e-3  # of float64's result: a bfloat16 result's own rounding is 1.7e-3
# How a product may be cut (halves of a tile, columns of a turn, warps, registers).
MANY = ((2, 512, 4, None), (2, 512, 4, 128), (2, 256, 4, None), (1, 512, 4, None))
FEW = ((1, 2048, 8, None), (1, 2048, 8, 128), (1, 1024, 8, None), (1, 2048, 16, 128))


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
        how = packed_triton.how(held.scheme)
        written = packed_triton.dequantize(held.tiles, rows, columns, *how, torch.float32)
        same["written out"] = torch.equal(written, weight)
        limit = {what: self._allowed(what) for what in errors}
        right = all(e <= limit[count] for count, e in errors.items())
        good = right and all(same[what] for what in ("again", "looked up", "written out"))
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

        norm, residual = activations(1, held.columns)[0], activations(len(x), held.rows)
        errors: dict[int | str, float] = {}
        for count in (1, len(x)):
            wide = x[:count].double()
            normed = torch.nn.functional.rms_norm(wide, norm.shape, norm.double(), 1e-6)
            product = normed @ weight.double().T
            gate, up = product.chunk(2, dim=-1)
            more = residual[:count]
            pairs = {
                "norm": (
                    packed_triton.packed_norm_linear(x[:count], norm, 1e-6, held),
                    product,
                ),
                "swiglu": (
                    packed_triton.packed_norm_swiglu(x[:count], norm, 1e-6, held),
                    F.silu(gate) * up,
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

    def ours(self, rows: int, columns: int, scheme: Scheme, count: int) -> tuple[float, int]:
        """(microseconds, bytes)"""
        from hymba.ops import packed_triton

        first = random_packed(rows, columns, scheme)
        held = [
            first._replace(tiles=first.tiles.clone())
            for _ in range(self.copies(first.tiles.nbytes))
        ]
        x = activations(count, columns)
        works = [lambda p=p: packed_triton.packed_linear(x, p) for p in held]
        return self.microseconds(works), first.tiles.nbytes

    def matrices(self, good: dict[str, bool]) -> None:
        for rows, columns in MATRICES:
            plain = attempt(
                f"bfloat16 {rows} x {columns}", lambda r=rows, c=columns: self.plain(r, c)
            )
            for scheme in self.schemes:
                if not good[scheme.name]:
                    continue
                for count in self.options.batches:
                    what = scheme.name, rows, columns, count
                    row = attempt(f"{what}", lambda what=what: self.row(*what))
                    if row is not None:
                        row["bfloat16_us"] = (plain or {}).get(count)
                        self.report.add(row)
                        print(self.line(row), flush=True)
            if "peers" not in self.options.skip:
                attempt(f"peers {rows} x {columns}", lambda r=rows, c=columns: self.peers(r, c))

    def row(self, name: str, rows: int, columns: int, count: int) -> dict[str, Any]:
        us, nbytes = self.ours(rows, columns, scheme_named(name), count)
        rate = nbytes / us * 1e6
        return {
            "scheme": name,
            "matrix": [rows, columns],
            "rows": count,
            "us": rounded(us),
            "bytes": nbytes,
            "gb_per_s": rounded(rate / 1e9),
            "share": rounded(rate / self.bandwidth, 3),
        }

    def line(self, row: dict[str, Any]) -> str:
        rows, columns = row["matrix"]
        plain = row.get("bfloat16_us")
        times = f", {plain / row['us']:.2f}x torch's bfloat16 ({plain} us)" if plain else ""
        return (
            f"{row['scheme']:5} {rows:6} x {columns:5} rows {row['rows']:2} {row['us']:8.2f} us"
            f" {row['gb_per_s']:6.0f} GB/s {row['share']:5.1%}{times}"
        )

    def plain(self, rows: int, columns: int) -> dict[int, float]:
        """torch's product with the same matrix in bfloat16: us by rows."""
        count = self.copies(2 * rows * columns)
        held = [activations(rows, columns) for _ in range(count)]
        found = {}
        for n in self.options.batches:
            x = activations(n, columns)
            us = self.microseconds([lambda w=w, x=x: F.linear(x, w) for w in held])
            found[n] = rounded(us)
        return found

    def peers(self, rows: int, columns: int) -> None:
        """PyTorch's 4-bit product with groups of 32 columns."""
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
            row = {"name": "aten int4", "matrix": [rows, columns], "rows": n, "us": rounded(us)}
            self.report.add(row, to="peers")
            print(f"  aten int4 {rows:6} x {columns:5} rows {n:2} {us:8.2f} us", flush=True)

    # ---- how to cut

    def tune(self) -> None:
        """Try all cuts on some matrices of both kinds; the best on average goes on."""
        from hymba.ops import packed_triton
        from hymba.ops.packed_triton import Cut

        places = (
            ("many", MANY, ((10000, 1600), (5504, 1600))),
            ("few", FEW, ((1600, 3200), (1600, 5504))),
        )
        for place, cuts, matrices in places:
            found: dict[Cut, float] = {}
            for cut in (Cut(*cut) for cut in cuts):
                packed_triton.TILING = packed_triton.TILING._replace(**{place: cut})
                us = {
                    f"{scheme.name} {rows} x {columns}, {count}": attempt(
                        f"{cut}",
                        lambda a=(rows, columns, scheme, count): rounded(self.ours(*a)[0]),
                    )
                    for scheme in self.schemes
                    for rows, columns in matrices
                    for count in (1, 8)
                }
                self.report.add({"place": place, "cut": list(cut), "us": us}, to="cuts")
                print(f"{place} {tuple(cut)}: {us}", flush=True)
                if None not in us.values():
                    found[cut] = math.prod(us.values()) ** (1 / len(us))  # type: ignore[arg-type]
            if found:
                best = min(found, key=found.__getitem__)
                packed_triton.TILING = packed_triton.TILING._replace(**{place: best})
        print(f"going on with {packed_triton.TILING}", flush=True)
        self.report.put(tiling=str(packed_triton.TILING))

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
    from hymba.ops import packed_triton

    torch.manual_seed(0)
    begin, watch = time.perf_counter(), Stopwatch(0.05)
    report = gpu.Report(gpu.json_path(options, "packed"), gpu.machine("packed"))
    ceilings = {
        "read_bytes_per_s": rounded(read_bandwidth(watch)),
        "copy_bytes_per_s": rounded(copy_bandwidth(watch)),
    }
    report.put(ceilings=ceilings, tiling=str(packed_triton.TILING))
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
