#!/usr/bin/env python3
"""The README's figures, written from results/ops-*, train-*, trainer-*, prefill-, engine-, packed-
and device-*.json.

    python -m bench.table            writes them between the two markers in README.md
    python -m bench.table --check    says whether they are what the results say (1 if not)

Nobody types these figures; tests/bench/test_table.py keeps README and results equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- from results/, by bench/table.py -->", "<!-- end of bench/table.py -->"
UNSTEADY = 0.1  # of a step's median: a slower one than that is told
PEERS = {
    "mamba-ssm": "mamba-ssm",
    "flex": "FlexAttention",
    "sdpa": "SDPA",
    "torch": "plain PyTorch",
    "torch, chunks": "plain PyTorch",
}
# What a row of the table is called: op and the beginning of its size.
SHOWN = (
    ("selective scan", "scan", ("8 x 2048", "1 x 8192", "4 x 8192", "1 x 32768")),
    ("convolution", "conv", ("8 x 2048",)),
    ("attention", "attention", ("1 x 8192, ", "8 x 2048, ", "1 x 2048 behind ")),
    ("attention, decode", "attention decode", ("batch 1, full", "batch 16, full", "batch 128, ")),
    ("SSM, decode", "SSM decode", ("batch 1", "batch 16", "batch 128")),
    ("RMSNorm", "rms_norm", ("",)),
    ("residual + RMSNorm", "add_rms_norm", ("",)),
    ("head fusion", "fuse_heads", ("",)),
    ("SwiGLU", "swiglu", ("",)),
    ("rotary", "rotate", ("",)),
    ("linear + cross-entropy", "linear + CE", ("",)),
)


def found(folder: Path, benchmark: str) -> Iterator[dict[str, Any]]:
    """The results of a benchmark, a device each, in the order of their names."""
    for path in sorted(folder.glob(f"{benchmark}-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("benchmark") == benchmark:  # hymba-made files only
            yield data | {"file": f"results/{path.name}"}


def generate(folder: Path) -> str:
    """Everything between the markers."""
    makers: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("ops", ops_table),
        ("train", train_table),
        ("trainer", trainer_table),
        ("prefill", prefill_table),
        ("engine", engine_table),
        ("packed", packed_table),
        ("device", device_table),
    )
    parts = [make(data) for name, make in makers for data in found(folder, name)]
    return "\n\n".join(parts) if parts else "No results are kept here."


def headed(data: Mapping[str, Any], what: str) -> str:
    limits = data["ceilings"]
    return (
        f"**{what}** on one {data['device']} (driver {data['driver']}, torch {data['torch']}, "
        f"{data['date'][:10]}; limits measured in the same run: "
        f"{limits['copy_bytes_per_s'] / 1e12:.2f} TB/s copied, "
        f"{limits['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s in bf16 matrix products, "
        f"{limits['exps_per_s'] / 1e12:.2f} T exponentials/s; [{data['file']}]({data['file']})):"
    )


def ops_table(data: Mapping[str, Any]) -> str:
    lines = [
        headed(data, "Kernels, bfloat16, forward / backward,"),
        "",
        "| op | size | ms | rate | share of the limit | best peer, its time over ours |",
        "|---|---|---|---|---|---|",
    ]
    for title, op, sizes in SHOWN:
        rows = [row for row in data.get("results", []) if row["op"] == op and "ms" in row]
        for size in dict.fromkeys(row["size"] for row in rows):
            if size.startswith(sizes):
                lines.append(ops_row(title, size, [row for row in rows if row["size"] == size]))
    return "\n".join(lines)


def ops_row(title: str, size: str, rows: list[dict[str, Any]]) -> str:
    """One line for what was timed of an op at one size; a forward makes inference superfluous."""
    trained = [row for row in rows if row["pass"] != "inference"]
    rows = trained or rows
    cells = [
        title + (", both passes at once" if rows[0]["pass"] == "both" else ""),
        size.replace(" x ", "×"),
        " / ".join(f"{row['ms']:.3g}" for row in rows),
        joined([rate(row) for row in rows]),
        joined([(f"{row['share']:.0%}", f"of {row['limit']}") for row in rows]),
        joined([best_peer(row) for row in rows]),
    ]
    return f"| {' | '.join(cells)} |"


def joined(parts: list[tuple[str, str]]) -> str:
    """(number, what of) of each pass; what is the same is said once."""
    if len({what for _, what in parts}) == 1:
        return f"{' / '.join(number for number, _ in parts)} {parts[0][1]}".strip()
    return " / ".join(f"{number} {what}".strip() for number, what in parts)


def rate(row: Mapping[str, Any]) -> tuple[str, str]:
    compute = row["limit"] == "FLOPs"
    return (f"{row['tflop_per_s']:.0f}", "TFLOP/s") if compute else (
        f"{row['gb_per_s']:,.0f}", "GB/s"
    )  # fmt: skip


def best_peer(row: Mapping[str, Any]) -> tuple[str, str]:
    """The fastest of the others."""
    if not row["peers"]:
        return "", ""
    name = min(row["peers"], key=lambda peer: row["peers"][peer]["ms"])
    return f"{row['peers'][name]['times']:.1f}×", PEERS.get(name, name)


def train_table(data: Mapping[str, Any]) -> str:
    what = f"A training step of {data['model']}, {data['rows']}×{data['length']} tokens, bfloat16,"
    lines = [
        headed(data, what),
        "",
        "| | ms | tokens a second | MFU | memory |",
        "|---|---|---|---|---|",
    ]
    for row in data.get("results", []):
        figures = f"{row['ms']:.0f} | {row['tokens_per_s']:,} | {row['mfu']:.1%}"
        lines.append(f"| {row['name']} | {figures} | {row['peak_gib']:.0f} GiB |")
    lines += ["", f"Forward and backward; fused AdamW takes {optimiser(data)} more."]
    return "\n".join(lines)


def trainer_table(data: Mapping[str, Any]) -> str:
    """A line for each shape and length: ours, the twin, and its time over ours."""
    rows = data.get("results", [])
    gpus = data["gpus"]
    lines = [
        f"**`hymba train`**, whole steps of {rows[0]['tokens'] // gpus:,} tokens a GPU, AdamW"
        " included, float32 weights, activations in bfloat16, beside an attention-only twin of as"
        f" many parameters, on {gpus} × {data['device']} (driver {data['driver']},"
        f" torch {data['torch']}, {data['date'][:10]}; {data['matrix_flops_per_s'] / 1e12:.0f}"
        f" TFLOP/s in bf16 matrix products; [{data['file']}]({data['file']})):",
        "",
        "| | rows of | at once | ms a step, twin | tokens a second, twin | MFU, twin | memory, twin"
        " | time over the twin's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["preset"], row["length"], row["plan"]): row for row in rows}
    for preset, length in dict.fromkeys((row["preset"], row["length"]) for row in rows):
        both = [found.get((preset, length, plan)) for plan in ("hymba", "llama")]
        lines.append(trainer_row(preset, length, *both))
    notes = []
    if any(row["recompute"] for row in rows):
        notes.append("* with activations computed again in backward, for memory's sake.")
    if any(row["spread"] > UNSTEADY for row in rows):
        notes.append("(+n%): how much longer the slowest timed step took than the median one.")
    notes += [data["note"]] if "note" in data else []
    lines += ["", " ".join(notes)] if notes else []
    return "\n".join(lines)


def trainer_row(
    preset: str, length: int, ours: Mapping[str, Any] | None, twin: Mapping[str, Any] | None
) -> str:
    there = [row for row in (ours, twin) if row]

    def cell(key: str, form: str, unit: str = "") -> str:
        return f"{' / '.join(format(row[key], form) for row in there)}{unit}"

    steps = " / ".join(
        f"{row['ms']:.0f}"
        + "*" * row["recompute"]
        + (f" (+{row['spread']:.0%})" if row["spread"] > UNSTEADY else "")
        for row in there
    )
    times = f"{ours['ms'] / twin['ms']:.2f}×" if ours and twin else ""
    at_once = f"{there[0]['micro_tokens']:,}"
    cells = steps, cell("tokens_per_s", ","), cell("mfu", ".1%"), cell("peak_gib", ".0f", " GiB")
    return f"| {' | '.join((preset, f'{length:,}', at_once, *cells, times))} |"


def optimiser(data: Mapping[str, Any]) -> str:
    ms = data.get("optimiser_ms")
    return "an unmeasured time" if ms is None else f"{ms:.0f} ms"


def prefill_table(data: Mapping[str, Any]) -> str:
    what = f"A prompt of {data['tokens']} tokens through {data['model']}, bfloat16,"
    lines = [headed(data, what), "", "| | ms | tokens a second | MFU |", "|---|---|---|---|"]
    for row in data.get("results", []):
        figures = f"{row['ms']:.1f} | {row['tokens_per_s']:,} | {row['mfu']:.1%}"
        lines.append(f"| {row['name']} | {figures} |")
    return "\n".join(lines)


def engine_table(data: Mapping[str, Any]) -> str:
    lines = [
        headed(data, f"Decoding behind {data['context']} tokens a sequence, bfloat16,"),
        "",
        "| | batch | ms a step | tokens a second | limit of the bytes | share | over it, a layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data.get("results", []):
        figures = f"{row['batch']} | {row['ms']:.3g} | {row['tokens_per_s']:,}"
        limit = f"{row['limit_tokens_per_s']:,} | {row['share']:.1%}"
        over = "" if row["name"].startswith("transformers") else f"{row['over_us_per_layer']} µs"
        lines.append(f"| {row['name']} | {figures} | {limit} | {over} |")
    return "\n".join([*lines, "", " ".join(engine_notes(data))])


def engine_notes(data: Mapping[str, Any]) -> list[str]:
    """What a table has no columns for, as far as it was measured."""
    limits = data["ceilings"]
    fastest = max(limits.get("read_bytes_per_s", 0), limits["copy_bytes_per_s"]) / 1e12
    notes = [
        f"The limit is what must be moved, once, over the {fastest:.2f} TB/s of the same run;"
        " layers that share K/V read it again, which is not counted."
    ]
    ours = [row for row in data.get("results", []) if row["name"] == data["model"]]
    best, peer = max(ours, key=lambda row: row["batch"], default=None), data.get("peer")
    if best and peer:
        times = best["tokens_per_s"] / peer["limit_tokens_per_s"]
        notes.append(
            f"{data['model']} at batch {best['batch']} is {times:.2f} times the *limit* of"
            f" {peer['name']} at batch {peer['batch']} on this GPU"
            f" ({peer['limit_tokens_per_s']:,} tokens a second)."
        )
    first = data.get("prefill")
    if first:
        notes.append(
            f"A prompt of {first['tokens']:,} tokens has its first token after"
            f" {first['first_token_ms']:.1f} ms, of which the forward alone takes"
            f" {first['forward_ms']:.1f} ({first['share']:.0%})."
        )
    if best:
        held = best["cache"]
        notes.append(
            f"A sequence holds {held['per_sequence'] / 1e6:.1f} MB as allocated, and all together"
            f" {held['meta_once'] / 1e6:.1f} MB of what the meta tokens left."
        )
    same = data.get("agreement")
    if same:
        notes.append(
            f"Of a trained model's tokens {same['greedy']:.1%} (greedy) and"
            f" {same['temperature 0.8']:.1%} (drawn at temperature 0.8) are the same alone and in a"
            " batch of 16, in bfloat16; in float32 all are."
        )
    return notes


def packed_table(data: Mapping[str, Any]) -> str:
    steps, rows = data["engine"], data["results"]
    context, read = steps[0]["context"], data["ceilings"]["read_bytes_per_s"] / 1e12
    lines = [
        f"**Weights in few bits on a GPU:** a decode step of {data['model']} behind {context:,}"
        f" tokens a sequence, random weights, on one {data['device']} (driver {data['driver']},"
        f" torch {data['torch']}, {data['date'][:10]}; {read:.2f} TB/s read in the same run;"
        f" [{data['file']}]({data['file']})):",
        "",
        "| | batch | ms a step | tokens a second | times bfloat16 | of the limit | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {row["batch"]: row["ms"] for row in steps if row["name"] == "bfloat16"}
    for row in steps:
        figures = (
            f"{row['ms']:.2f} | {row['tokens_per_s']:,} | {plain[row['batch']] / row['ms']:.2f}"
        )
        share, weights = row["limit_ms"] / row["ms"], row["weights_mb"] / 1000
        lines.append(
            f"| {row['name']} | {row['batch']} | {figures} | {share:.0%} | {weights:.2f} GB |"
        )
    whats = list(dict.fromkeys(row["what"] for row in rows))
    counts = (1, 8)
    lines += [
        "",
        f"| µs of a product, 1 / 8 rows (times as fast as bfloat16) | {' | '.join(whats)} |",
        "|---" * (len(whats) + 1) + "|",
    ]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        cells = [packed_cell(rows, scheme, what, counts) for what in whats]
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    cells = [peer_cell(data["peers"], what, counts) for what in whats]
    lines.append("| PyTorch's int4 kernel, nothing around it | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def packed_cell(rows: list[dict[str, Any]], scheme: str, what: str, counts: tuple[int, ...]) -> str:
    by = {row["rows"]: row for row in rows if (row["scheme"], row["what"]) == (scheme, what)}
    us = " / ".join(f"{by[n]['us']:.1f}" for n in counts)
    times = " / ".join(f"{by[n]['bfloat16_us'] / by[n]['us']:.2f}" for n in counts)
    return f"{us} ({times})"


def peer_cell(peers: list[dict[str, Any]], what: str, counts: tuple[int, ...]) -> str:
    by = {row["rows"]: row["us"] for row in peers if row["what"] == what}
    return " / ".join(f"{by[n]:.1f}" for n in counts) if by else ""


# Shapes and formats of bench/device.py, in words.
SIDES = {
    "llama-3b": "Llama-3.2-3B",
    "llama-1b": "Llama-3.2-1B",
    "falcon-h1-1.5b": "Falcon-H1-1.5B",
    "q4_0": "Q4_0, llama.cpp",
    "q8_0": "Q8_0, llama.cpp",
}


def device_table(data: Mapping[str, Any]) -> str:
    """A line a side, then a line for each of ours against each other side."""
    groups = [group for group in data["groups"] if group["results"]]
    deepest = max(data["depths"])
    reads = [r for g in groups for row in g["results"] for r in row["read_gb_per_s"].values()]
    lines = [
        f"**{data['preset']} on a CPU,** batch 1, random weights, {data['threads']} threads of an"
        f" {data['cpu']} (torch {data['torch']}, {data['date'][:10]}), tokens a second: median"
        f" (least to most) of {data['rounds']} rounds. A plain read with as many threads, beside"
        f" each measurement: {statistics.median(reads):.0f} GB/s ({min(reads):.0f} to"
        f" {max(reads):.0f}). [{data['file']}]({data['file']}):",
        "",
        f"| | {' | '.join(f'behind {depth:,} tokens' for depth in data['depths'])} | bandwidth,"
        f" of that read | prompt of {data['prompt']} | memory behind {deepest:,} |",
        f"|---|{'---|' * (len(data['depths']) + 3)}",
    ]
    seen: set[str] = set()
    for group in groups:
        for side in group["sides"]:
            if side not in seen:
                lines.append(device_row(side, group, data))
            seen.add(side)
    rows = [row for group in groups for row in device_ratios(group, data)]
    if rows:
        columns = " | ".join(f"behind {depth:,}" for depth in data["depths"])
        lines += ["", f"| times as fast, in the same round | {columns} | prompt | memory |"]
        lines += [f"|---|{'---|' * (len(data['depths']) + 2)}", *rows]
    return "\n".join([*lines, "", device_notes(groups)])


def device_row(side: str, group: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    best = {
        (row["what"], row["depth"]): row
        for row in group["results"]
        if row["side"] == side and row["best"]
    }
    speeds = [best.get(("decode", depth)) for depth in data["depths"]]
    shares = [row["share"] for row in speeds if row]
    share = f"{min(shares):.0%} to {max(shares):.0%}" if shares else ""
    memory = group["sides"][side]["memory"].get("all")
    least = group["sides"][side].get("memory_not_mapped", {}).get("all")
    held = f"{memory / 1e9:.2f} GB" if memory else ""
    held += f" (not mapped {least / 1e9:.2f})" if least else ""
    cells = [*map(speed_cell, speeds), share, speed_cell(best.get(("prefill", 0))), held]
    return f"| {side_name(side, data)} | {' | '.join(cells)} |"


def speed_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    middle, least, most = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (row["tokens_per_s"], row["tokens_per_s_least"], row["tokens_per_s_most"])
    )
    mark = "*" if row["mode"] == "plain" else ""
    return f"{middle}{mark} ({least} to {most})"


def device_ratios(group: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """Each of ours over each side measured after it; memory over the lesser of what that took."""
    found = {(r["ours"], r["theirs"], r["what"], r["depth"]): r for r in group["ratios"]}
    for ours, theirs in dict.fromkeys((r["ours"], r["theirs"]) for r in group["ratios"]):
        asked = [("decode", depth) for depth in data["depths"]] + [("prefill", 0)]
        rows = [found.get((ours, theirs, *key)) for key in asked]
        cells = [times_cell(row) for row in rows]
        held = [least_memory(group["sides"][side]) for side in (ours, theirs)]
        cells.append(f"{held[0] / held[1]:.2f}×" if all(held) else "")
        names = f"{side_name(ours, data)} / {side_name(theirs, data)}"
        yield f"| {names} | {' | '.join(cells)} |"


def least_memory(about: Mapping[str, Any]) -> float:
    """With the file mapped or read, whichever took less; 0 where nobody knows."""
    ways = (about["memory"], about.get("memory_not_mapped", {}))
    return min((way["all"] for way in ways if "all" in way), default=0)


def times_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['times']:.2f}× ({row['times_least']:.2f} to {row['times_most']:.2f})"


def side_name(side: str, data: Mapping[str, Any]) -> str:
    if side.endswith("-kv16"):
        return side_name(side.removesuffix("-kv16"), data) + ", K/V bfloat16"
    shape, _, form = side.rpartition("-")
    if shape in ("hymba", "transformers"):
        return f"{data['preset']} {form}" + (", transformers" if shape != "hymba" else "")
    return f"{SIDES.get(shape, shape)} {SIDES.get(form, form)}"


def device_notes(groups: list[Mapping[str, Any]]) -> str:
    plain = any(row["best"] and row["mode"] == "plain" for g in groups for row in g["results"])
    note = (
        "Bandwidth: the bytes that a token cannot do without moving, over its time; least and most"
        " of these depths. Memory: all that the process has in memory, the files it has mapped"
        " included; llama.cpp holds repacked weights beside a mapped file."
    )
    return note + (" * without flash attention, which was slower there." if plain else "")


def placed(text: str, table: str) -> str:
    """The document with the table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/table.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="their folder")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the document")
    options = parser.parse_args(argv)
    text = options.readme.read_text(encoding="utf-8")
    new = placed(text, generate(options.results))
    if new == text:
        return 0
    if options.check:
        print("README.md is not what results/ say: python -m bench.table", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    print("README.md: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
