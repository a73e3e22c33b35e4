"""What the demo shows at its end: a continued prompt, a table, a figure."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hymba
from hymba.config import Config
from hymba.engine import Sampling, stream
from hymba.model.accounting import cache_bytes, parameters
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.train import TokenStore, metrics

LENGTHS = (512, 2048, 4096)  # text tokens at which the cache is weighed
SPEED_TOKENS = 64
SMOOTH = 20  # steps that the last training loss is averaged over
CHUNK = 512


@dataclass(frozen=True)
class Trained:
    name: str
    model: LanguageModel
    metrics: Path


@dataclass(frozen=True)
class Row:
    """Everything the table and the figure say of one model."""

    name: str
    config: Config
    steps: list[int]
    losses: list[float]
    held_out_loss: float
    bits_per_byte: float
    train_speed: float  # tokens a second
    decode_speed: float
    allocated: dict[int, int]  # cache bytes really held, by length
    predicted: dict[int, int]

    @property
    def loss(self) -> float:
        last = self.losses[-SMOOTH:]
        return sum(last) / len(last)


def show_text(trained: Trained, tokenizer: Tokenizer, prompt: str) -> None:
    """Continue the prompt on the screen, token by token."""
    text = tokenizer.stream()
    print(prompt, end="")
    sampling = Sampling(max_tokens=96, temperature=0.7, top_p=0.9, seed=0)
    ids = tokenizer.encode(prompt, bos=True)
    for _, token, _ in stream(trained.model, [ids], sampling):
        if token is not None:
            print(text.push(token), end="", flush=True)
    print(text.finish())


def compare(trained: Sequence[Trained], held_out: TokenStore) -> list[Row]:
    tokens = torch.from_numpy(held_out.read(0, max(LENGTHS)).astype("int64"))
    return [_row(one, tokens) for one in trained]


def _row(trained: Trained, tokens: torch.Tensor) -> Row:
    records = metrics.read(trained.metrics)
    steps, losses = metrics.series(records, "loss")
    last = [record for record in records if record.get("bits_per_byte") is not None][-1]
    speeds = sorted(record["tokens_per_second"] for record in records)
    lengths = [length for length in LENGTHS if length <= len(tokens)]
    measured = {length: _allocated(trained.model, tokens[:length]) for length in lengths}
    return Row(
        name=trained.name,
        config=trained.model.config,
        steps=steps,
        losses=losses,
        held_out_loss=last["held_out_loss"],
        bits_per_byte=last["bits_per_byte"],
        train_speed=speeds[len(speeds) // 2],
        decode_speed=_decode_speed(trained.model, tokens[:CHUNK].tolist()),
        allocated=measured,
        predicted={n: cache_bytes(trained.model.config, n, kv_bytes=4)["total"] for n in lengths},
    )


@torch.no_grad()
def _allocated(model: LanguageModel, tokens: torch.Tensor) -> int:
    """Bytes that a cache really holds after computing these tokens in chunks."""
    cache = model.new_cache(1)
    for part in tokens.split(CHUNK):
        model(part, Batch.of((len(part),), past=(cache.lengths[0],)), cache)
    return cache.nbytes()["total"]


def _decode_speed(model: LanguageModel, prompt: list[int]) -> float:
    """Tokens a second of one sequence, after its prompt."""
    sampling = Sampling(max_tokens=SPEED_TOKENS, stop_ids=())
    times = [time.perf_counter() for _ in stream(model, [prompt], sampling)]
    return (len(times) - 1) / (times[-1] - times[0])


def show_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(row.name for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cells in lines(rows):
        table.add_row(label, *cells)
    Console().print(table)


def lines(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """The table as (label, a cell for each model)."""
    found = [
        ("parameters", [f"{parameters(row.config)['total']:,}" for row in rows]),
        ("training loss, last steps", [f"{row.loss:.3f}" for row in rows]),
        ("held-out loss, nats a token", [f"{row.held_out_loss:.3f}" for row in rows]),
        ("held-out bits per byte", [f"{row.bits_per_byte:.3f}" for row in rows]),
        ("training, tokens a second", [f"{row.train_speed:,.0f}" for row in rows]),
        ("decode, tokens a second", [f"{row.decode_speed:,.0f}" for row in rows]),
    ]
    for length in rows[0].allocated:
        for kind in ("predicted", "allocated"):
            cells = [f"{getattr(row, kind)[length]:,}" for row in rows]
            found.append((f"cache bytes at {length:,} tokens, {kind}", cells))
    return found


def save_json(rows: Sequence[Row], path: Path) -> None:
    """The table for programs, with what it was measured on."""
    facts = {
        "hymba": hymba.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "steps": len(rows[0].steps),
    }
    table = {
        label: dict(zip([r.name for r in rows], cells, strict=True)) for label, cells in lines(rows)
    }
    path.write_text(json.dumps(facts | {"table": table}, indent=2) + "\n", encoding="utf-8")


def save_figure(rows: Sequence[Row], path: Path) -> bool:
    """Loss curves, cache growth, and the mask of a window layer. False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: pip install matplotlib")
        return False
    figure, (losses, growth, mask) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for row in rows:
        losses.plot(row.steps, row.losses, label=f"{row.name} ({row.bits_per_byte:.2f} bits/byte)")
        _plot_growth(growth, row)
    losses.set(title="training loss", xlabel="step", ylabel="nats a token")
    losses.legend()
    growth.set(title="cache of one sequence", xlabel="text tokens", ylabel="MB (float32)")
    growth.legend()
    _plot_mask(mask, rows[0].config)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _plot_growth(axes: object, row: Row) -> None:
    lengths = range(64, max(row.allocated) + 1, 64)
    sizes = [cache_bytes(row.config, n, kv_bytes=4)["total"] / 1e6 for n in lengths]
    (line,) = axes.plot(lengths, sizes, label=f"{row.name}, predicted")  # type: ignore[attr-defined]
    held = [size / 1e6 for size in row.allocated.values()]
    axes.plot(  # type: ignore[attr-defined]
        list(row.allocated), held, "o", color=line.get_color(), label=f"{row.name}, allocated"
    )


def _plot_mask(axes: object, config: Config) -> None:
    from matplotlib.colors import ListedColormap

    from hymba.ops.attention import visible

    window = next(layer.window for layer in config.layers if layer.window)
    text = torch.arange(2 * window + config.meta_tokens)
    seen = visible(text, text, window).int()  # (T, T)
    meta = torch.full((len(text), config.meta_tokens), 2)
    colours = ListedColormap(["#f2f2f2", "#1f77b4", "#ff7f0e"])
    axes.imshow(torch.cat([meta, seen], dim=1).numpy(), cmap=colours, interpolation="nearest")  # type: ignore[attr-defined]
    axes.set(  # type: ignore[attr-defined]
        title=f"mask of a window layer: {config.meta_tokens} meta tokens, {window} back",
        xlabel="key (meta tokens, then text)",
        ylabel="query (text)",
    )
