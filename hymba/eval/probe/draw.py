"""Figures as SVG text: bars, stacked bars, lines, heat maps. No package, no fonts, no scripts.

Each panel is drawn into a box of its own and returns SVG; `svg` puts panels side by side. Colours
are told apart by people who see few colours (Okabe and Ito), text is the page's colour, so that a
figure can be read on light and dark alike. Bars and cells have a <title>, which a pointer shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, log10

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 250, 52, 30, 40
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:currentColor}.t{font-weight:600;font-size:12px}"
    ".g{stroke:currentColor;opacity:.15}.a{stroke:currentColor;opacity:.6}"
    "svg{color:#1d2327}@media(prefers-color-scheme:dark){svg{color:#e4e8ea}}"
)
Series = dict[str, Sequence[float | None]]


def svg(panels: Sequence[str], alt: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Panels (two in a line) as one picture, which says what it is."""
    columns = min(2, len(panels))
    rows = ceil(len(panels) / 2)
    placed = "".join(
        f'<g transform="translate({i % 2 * width} {i // 2 * height})">{panel}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {rows * height}"'
        f' width="{columns * width}" role="img" aria-label="{escape(alt)}">'
        f"<style>{STYLE}</style>{placed}</svg>"
    )


def stacked(title: str, labels: Sequence[str], series: Series, top: float = 1.0) -> str:
    """A column for each label, its parts one on the other."""
    frame, y, step = _frame(title, labels, 0.0, top)
    marks = []
    for i, label in enumerate(labels):
        below = 0.0
        for colour, (name, values) in zip(PALETTE, series.items(), strict=False):
            value = values[i]
            if value is None:
                continue
            x, high = LEFT + i * step + step * 0.12, y(below) - y(below + value)
            marks.append(_bar(x, y(below + value), step * 0.76, high, colour, label, name, value))
            below += value
    return frame + "".join(marks) + _legend(list(series))


def bars(title: str, labels: Sequence[str], series: Series) -> str:
    """A group of columns for each label."""
    low, high = _range(series)
    frame, y, step = _frame(title, labels, min(0.0, low), high)
    wide = step * 0.8 / len(series)
    marks = []
    for n, (name, values) in enumerate(series.items()):
        for i, value in enumerate(values):
            if value is not None:
                x, ends = LEFT + i * step + step * 0.1 + n * wide, sorted((y(0), y(value)))
                size = max(0.5, ends[1] - ends[0])
                marks.append(_bar(x, ends[0], wide, size, PALETTE[n], labels[i], name, value))
    return frame + "".join(marks) + _legend(list(series))


def lines(title: str, labels: Sequence[str], series: Series) -> str:
    """A line for each series, broken where there is no value; markers differ in shape too."""
    _, high = _range(series)
    frame, y, step = _frame(title, labels, 0.0, high)
    marks = []
    for n, (name, values) in enumerate(series.items()):
        points = [(LEFT + (i + 0.5) * step, v, i) for i, v in enumerate(values) if v is not None]
        path = " ".join(f"{x:.1f},{y(v):.1f}" for x, v, _ in points)
        dash = ' stroke-dasharray="5 3"' if n % 2 else ""
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="{PALETTE[n]}" stroke-width="2"{dash}/>'
        )
        for x, v, i in points:
            said = f"<title>{escape(f'layer {labels[i]}, {name}: {v:.3g}')}</title>"
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y(v):.1f}" r="3" fill="{PALETTE[n]}">{said}</circle>'
            )
    return frame + "".join(marks) + _legend(list(series))


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    across: str,
    signed: bool = False,
    numbers: bool = False,
) -> str:
    """Cells: white is 0, blue is more, orange is less (`signed`); the strongest has full colour."""
    most = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    left = 14 + 7 * max(map(len, rows), default=1)
    wide = (WIDTH - left - 10) / max(1, len(columns))
    high = min(30.0, (HEIGHT - TOP - BOTTOM) / max(1, len(rows)))
    marks = [f'<text class="t" x="8" y="18">{escape(title)}</text>']
    for r, (row, found) in enumerate(zip(rows, values, strict=True)):
        y = TOP + r * high
        marks.append(_text(left - 5, y + high / 2 + 4, row, "end"))
        for c, value in enumerate(found):
            if value is None:
                continue
            x, part = left + c * wide, abs(value) / most
            colour = "#b35806" if signed and value < 0 else "#08519c"
            said = f"<title>{escape(f'{row}, {across} {columns[c]}: {value:.3g}')}</title>"
            box = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            marks.append(f'<rect {box} fill="#fff"/>')
            marks.append(f'<rect {box} fill="{colour}" fill-opacity="{part:.3f}">{said}</rect>')
            if numbers:
                ink = "#fff" if part > 0.5 else "#1d2327"
                at = f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}" text-anchor="middle"'
                marks.append(f'<text {at} style="fill:{ink}">{value:.2f}</text>')
    end = TOP + high * len(rows)
    every = ceil(len(columns) / 16)
    for c in range(0, len(columns), every):
        marks.append(_text(left + (c + 0.5) * wide, end + 14, columns[c], "middle"))
    marks.append(_text((left + WIDTH) / 2, end + 30, across, "middle"))
    return "".join(marks)


def _range(series: Series) -> tuple[float, float]:
    found = [v for values in series.values() for v in values if v is not None]
    low, high = min(found, default=0.0), max(found, default=1.0)
    return low, high if high > 0 else 1e-9 if low >= 0 else 0.0


def _frame(title: str, labels: Sequence[str], low: float, high: float):  # type: ignore[no-untyped-def]
    """Axes -> (SVG, y of a value, width of a label's place)."""
    end, span = HEIGHT - BOTTOM, (high - low) or 1.0
    size = end - TOP - 18

    def y(value: float) -> float:
        return end - (value - low) / span * size

    step = (WIDTH - LEFT - 10) / max(1, len(labels))
    marks = [f'<text class="t" x="8" y="16">{escape(title)}</text>']
    for tick in _ticks(low, high):
        at = f"{y(tick):.1f}"
        marks.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - 10}" y1="{at}" y2="{at}"/>')
        marks.append(_text(LEFT - 5, y(tick) + 4, f"{tick:.3g}", "end"))
    zero = f"{y(min(max(0.0, low), high)):.1f}"
    marks.append(f'<line class="a" x1="{LEFT}" x2="{WIDTH - 10}" y1="{zero}" y2="{zero}"/>')
    for i in range(0, len(labels), ceil(len(labels) / 16) or 1):
        marks.append(_text(LEFT + (i + 0.5) * step, end + 15, labels[i], "middle"))
    marks.append(_text((LEFT + WIDTH) / 2, end + 31, "layer", "middle"))
    return "".join(marks), y, step


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers."""
    raw = (high - low) / 4 or 1.0
    power = 10 ** int(log10(raw) // 1)
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = ceil(low / step - 1e-9)
    return [n * step for n in range(first, int(high / step + 1e-9) + 1)]


def _bar(
    x: float, y: float, wide: float, high: float, colour: str, label: str, name: str, value: float
) -> str:
    said = f"<title>{escape(f'layer {label}, {name}: {value:.3g}')}</title>"
    box = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{max(0.0, high):.1f}"'
    return f'<rect {box} fill="{colour}">{said}</rect>'


def _legend(names: Sequence[str]) -> str:
    marks, x = [], float(LEFT)
    for colour, name in zip(PALETTE, names, strict=False):
        marks.append(f'<rect x="{x:.0f}" y="24" width="10" height="10" fill="{colour}"/>')
        marks.append(_text(x + 14, 33, name))
        x += 26 + 6.2 * len(name)
    return "".join(marks)


def _text(x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'
